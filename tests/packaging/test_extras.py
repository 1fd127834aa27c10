"""Whatever optional package is missing, the error says what needs it and which extra brings it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import tomllib

from flashpair.core.extras import DISTRIBUTIONS, extra, need

ROOT = Path(__file__).resolve().parents[2]
WITHOUT = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == MODULE:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocked())
import torch, flashpair
"""
BATCH = "x, y = torch.eye(4), torch.tensor([0, 0, 1, 1])\n"
COMMAND = "sys.argv = ['flashpair', 'reality-check']\nfrom flashpair import __main__\n__main__.main()"
STREAM = "flashpair.NTXentLoss()(x, y, ref_emb=flashpair.StreamedReferences("
REALITY_CHECK = "flashpair.tools.reality_check"
LOAD = f"from {REALITY_CHECK} import load; load"
# The extra, the package that is missing, and what needs it.
USES = {
    "clustering": ("metrics", "sklearn", "flashpair.metrics.clustering(x, y)"),
    "clustering scores": ("metrics", "sklearn", "flashpair.metrics.clustering_scores(y, y)"),
    "intervals": ("metrics", "scipy", "flashpair.metrics.confidence_interval([1.0, 2.0])"),
    "fuse": ("compat", "pytorch_metric_learning", "from flashpair.compat.pml import fuse; fuse(None)"),
    "progress": ("stream", "rich", f"{STREAM}[x], y, progress=True))"),
    "digits": ("reality-check", "sklearn", f"{LOAD}('digits')"),
    "arrays": (
        "reality-check",
        "numpy",
        f"open('a.npz', 'w'); {LOAD}('a.npz')",
    ),
    "images": (
        "reality-check",
        "PIL",
        f"import os; os.makedirs('d/c'); open('d/c/1.png', 'w'); {LOAD}('d')",
    ),
    "study": (
        "reality-check",
        "optuna",
        "from flashpair.tools.reality_check import Data, Protocol, run; from pathlib import Path\n"
        "run(Data('made', x, y), ['contrastive'], Protocol(), Path('out'))",
    ),
    "report": ("reality-check", "rich", "import flashpair.tools.reality_check.report"),
    "bars": ("reality-check", "rich", "import flashpair.tools.reality_check.progress"),
    "picture": (
        "reality-check",
        "matplotlib",
        f"from {REALITY_CHECK}.report import draw\ntry: draw([], None, None, None)\nexcept AttributeError: pass",
    ),
    "example's data": ("examples", "sklearn", "from flashpair.examples import setting; setting.digits('cpu')"),
    "lightning": ("examples", "lightning", "import flashpair.examples.lightning_module"),
    "sentences": ("examples", "sentence_transformers", "import flashpair.examples.sentence_pairs"),
    "fused": ("triton", "triton", "flashpair.NTXentLoss(impl='fused')(x, y)"),
    "bench": ("bench", "rich", f"sys.path.insert(0, {str(ROOT)!r}); import bench"),
}


def without(module, code, cwd):
    script = f"MODULE = {module!r}\n{WITHOUT}{BATCH}{code}"
    return subprocess.run([sys.executable, "-c", script], cwd=cwd, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("use", USES)
def test_missing_package_is_named_with_its_extra(use, tmp_path):
    name, module, code = USES[use]
    done = without(module, code, tmp_path)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith(("ImportError: ", "RuntimeError: ")), done.stderr
    assert f"pip install 'flashpair[{name}]'" in last
    assert f"No module named '{module}" in last
    optional = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    brings = DISTRIBUTIONS.get(module, module).lower()
    direct = any(brings in dependency.lower() for dependency in optional[name])
    assert direct, f"the extra {name} does not bring {brings}"


@pytest.mark.parametrize("module", ["matplotlib", "numpy", "optuna", "rich", "scipy"])
def test_command_says_so_before_any_work(module, tmp_path):
    done = without(module, COMMAND, tmp_path)
    assert done.returncode == 2
    assert "pip install 'flashpair[reality-check]'" in done.stderr and "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("module", ["numpy", "triton", "sklearn", "scipy", "rich"])
def test_losses_need_none(module, tmp_path):
    code = "print(flashpair.MultiSimilarityLoss()(x, y).item(), flashpair.metrics.retrieval(x, y).recall[1])"
    done = without(module, code, tmp_path)
    assert done.returncode == 0, done.stderr


def test_what_is_wrong_within_flashpair_is_no_missing_package():
    with pytest.raises(ModuleNotFoundError, match=r"^No module named 'flashpair\.nowhere'$"), extra("metrics", "this"):
        import flashpair.nowhere  # noqa: F401
    with pytest.raises(ImportError, match=r"this needs a_package: pip install 'flashpair\[metrics\]'"):
        need("metrics", "this", "torch", "a_package")
