"""Lists of losses are made from the losses' declarations: none is old, and a new loss comes into all of them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import generated
import pytest

from flashpair.losses.declaration import REGISTRY, Range, loss

ROOT = Path(__file__).resolve().parents[2]
NEW = '''"""The farthest positive."""

from __future__ import annotations

from ..core.pairs import PairAccess
from ..core.reduction import Reduction
from .base import Criterion, RowLosses
from .declaration import Range, Search, Source, loss
from .papers import Paper

SOMEBODY_2031 = Paper("Far Away", ("Somebody, Some",), 2031, arxiv="3101.00001")


@loss(
    key="farthest_positive", group="rows", sources=(Source(SOMEBODY_2031, "eq. 7"),),
    forms={"": {}, "(weight=2)": {"weight": 2.0}}, searches={"": Search({"weight": Range(0.5, 2.0)})},
)
class FarthestPositiveLoss(Criterion):
    """The farthest positive of each anchor (Somebody, 2031, eq. 7).

    Args:
        weight: a factor.
        normalize: see `Criterion`.
        reduction: see `Criterion`.
        impl: see `Criterion`.

    Shape:
        - output: ().

    Raises:
        ValueError: an unknown word.

    Examples:
        >>> loss = flashpair.FarthestPositiveLoss()
    """

    def __init__(
        self, weight: float = 1.0, *, normalize: bool = True, reduction: str = "mean_valid", impl: str = "auto"
    ) -> None:
        super().__init__(normalize=normalize, reduction=reduction, impl=impl)
        self.weight = weight

    def row_losses(self, pairs: PairAccess) -> RowLosses:
        (lowest,) = pairs.reduce(Reduction("min", "positives"))
        valid = pairs.num_positives() > 0
        return RowLosses(lowest.masked_fill(~valid, 0.0) * -self.weight, valid, valid.shape[0])
'''


@pytest.mark.parametrize("name", generated.FILES)
def test_what_is_made_of_the_declarations_is_not_old(name):
    assert (ROOT / name).read_text(encoding="utf-8") == generated.made(name), "python tests/support/generated.py"


def test_a_new_loss_is_one_file(tmp_path):
    """A file in losses/, and the generator: it is exported, a function, checked, searched for, listed and cited."""
    for name in ("python", "docs", "pyproject.toml", "README.md", "CITATION.cff", "tests/support/generated.py"):
        source, target = ROOT / name, tmp_path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(source, target) if source.is_dir() else shutil.copy(source, target)
    (tmp_path / "python/flashpair/losses/farthest_positive.py").write_text(NEW, encoding="utf-8")
    kernels = tmp_path / "python/flashpair/backends/triton/kernels"
    if not kernels.exists():
        shutil.copytree(ROOT / "kernels", kernels)
    here = {**os.environ, "PYTHONPATH": str(tmp_path / "python")}

    def python(*command: str) -> str:
        run = subprocess.run(
            [sys.executable, *command], cwd=tmp_path, env=here, capture_output=True, text=True, timeout=300
        )  # fmt: skip
        assert run.returncode == 0, run.stderr
        return run.stdout

    assert set(python("tests/support/generated.py").split()) == set(generated.FILES)
    assert not python("tests/support/generated.py")
    seen = python(
        "-c",
        "import torch, flashpair; from flashpair.losses.registry import CRITERIA;"
        "from flashpair.tools.reality_check.losses import LOSSES;"
        "x, labels = torch.eye(4).double(), torch.tensor([0, 0, 1, 1]);"
        "from flashpair.tools.check import check;"
        "assert check(CRITERIA['FarthestPositiveLoss(weight=2)'], 'reference')[0];"
        "print(flashpair.functional.farthest_positive_loss(x + 1, labels, 3.0).item(), "
        "flashpair.FarthestPositiveLoss(3.0)(x + 1, labels).item(), 'FarthestPositiveLoss(weight=2)' in CRITERIA, "
        "LOSSES['farthest_positive'].make(weight=1.5).weight)",
    )
    found, truth, checked, searched = seen.split()
    assert float(found) == float(truth) < 0 and checked == "True" and float(searched) == 1.5
    for page, words in {
        "README.md": "`FarthestPositiveLoss`",
        "docs/losses.md": "| [`FarthestPositiveLoss`](api/losses.md#flashpair.FarthestPositiveLoss)`(weight)` | "
        "Somebody 2031, eq. 7 | `mean_valid` |",
        "docs/api/losses.md": "::: flashpair.FarthestPositiveLoss",
        "docs/api/functional.md": "::: flashpair.functional.farthest_positive_loss",
        "CITATION.cff": "Far Away",
    }.items():
        assert words in (tmp_path / page).read_text(encoding="utf-8"), page


def test_a_declaration_that_is_none_is_refused():
    with pytest.raises(ValueError, match="group must be one of pairs"):
        loss(key="a", group="others", sources=())
    with pytest.raises(ValueError, match="key must be of lower-case letters"):
        loss(key="A-b", group="pairs", sources=())
    with pytest.raises(ValueError, match="key 'nt_xent' of Mine is taken by NTXentLoss"):
        loss(key="nt_xent", group="pairs", sources=())(type("Mine", (), {}))
    assert REGISTRY["nt_xent"].name == "NTXentLoss" and Range(1, 3, integer=True).value(1.6) == 2
