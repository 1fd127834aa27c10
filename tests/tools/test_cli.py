"""The command line, as a user runs it."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from helpers import CRITERIA, FORMULAS, made

import flashpair
from flashpair import losses
from flashpair.backends import extension
from flashpair.engine.dispatch import IMPLEMENTATIONS
from flashpair.tools import check


def run(*arguments, **environment):
    import os

    return subprocess.run(
        [sys.executable, "-m", "flashpair", *arguments],
        capture_output=True,
        text=True,
        env={k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "FLASHPAIR_ONCHIP")} | environment,
    )


def test_info_names_versions_and_every_implementation_with_its_reasons():
    result = run("info")
    assert result.returncode == 0, result.stderr
    assert flashpair.__version__ in result.stdout and torch.__version__ in result.stdout
    for impl in IMPLEMENTATIONS:
        assert f"  {impl} on cpu: " in result.stdout
    assert "fused on cpu: cannot run: fused needs a CUDA device" in result.stdout


def test_info_says_why_a_named_extension_does_not_load():
    result = run("info", FLASHPAIR_EXTENSION="/nowhere/_C.so")
    assert result.returncode == 0
    assert "pure Python" in result.stdout and "/nowhere/_C.so" in result.stdout
    assert "tiled on cpu: cannot run: tiled needs the compiled extension" in result.stdout


def test_without_the_extension_auto_is_the_reference():
    import os

    script = "import torch, flashpair; print(flashpair.MultiSimilarityLoss()(torch.eye(4), torch.tensor([0, 0, 1, 1])))"
    environment = {**os.environ, "FLASHPAIR_EXTENSION": "/nowhere/_C.so"}
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert "tensor(" in result.stdout, result.stderr


def test_check_passes_here():
    result = run("check")
    assert result.returncode == 0, result.stdout
    assert "all pass" in result.stdout and "FAIL" not in result.stdout


def test_check_catches_a_wrong_gradient():
    class Wrong(losses.MultiSimilarityLoss):
        def row_losses(self, pairs):
            rows = super().row_losses(pairs)
            return rows._replace(losses=rows.losses.detach() * 2 - rows.losses)

    good, words = check.check(Wrong, "reference")
    assert not good and "gradcheck FAILS" in words


@pytest.mark.skipif(not extension.emulated(), reason="no emulated kernel")
def test_check_leaves_out_what_an_implementation_does_not_take():
    assert {name for name, make in CRITERIA.items() if not check.refusal(make, "onchip")} == set(FORMULAS)
    assert not any(check.refusal(make, impl) for make in CRITERIA.values() for impl in ("reference", "tiled"))
    assert "one of auto, tiled, reference" in check.refusal(CRITERIA["SoftTripleLoss"], "screened")


OWN = """
import torch, flashpair

flashpair.register_transform("bump", lambda t: torch.exp(-t * t))

class MyLoss(flashpair.Criterion):
    def __init__(self, **common):
        super().__init__(**{"normalize": True, "reduction": "mean", "impl": "auto", **common})

    def row_losses(self, pairs):
        pos, neg = pairs.reduce(
            flashpair.Reduction("sum", "positives", scale=-1.0),
            flashpair.Reduction("sum", "negatives", "bump", scale=3.0),
        )
        valid = pairs.num_positives() > 0
        return flashpair.RowLosses(pos + neg WRONG, valid, valid.shape[0])
"""


@pytest.mark.parametrize(("wrong", "code"), [("", 0), ("+ (pos - pos.detach())", 1)])
def test_check_takes_a_file_of_ones_own(wrong, code, tmp_path):
    path = tmp_path / "my_loss.py"
    path.write_text(OWN.replace("WRONG", wrong))
    result = run("check", f"{path}:MyLoss")
    assert result.returncode == code, result.stdout + result.stderr
    assert "tiled on cpu" in result.stdout and ("FAIL" in result.stdout) == bool(code)


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        ("MyLoss", "FILE.py:Name or module:Name"),
        ("nowhere.py:MyLoss", "there is no file nowhere.py"),
        ("nowhere.at_all:MyLoss", "there is no module nowhere.at_all"),
        ("torch.nn:Linear", "must be a subclass of flashpair.Criterion"),
    ],
)
def test_check_says_what_is_no_criterion(target, reason):
    result = run("check", target)
    assert result.returncode == 2 and reason in result.stderr


def test_every_criterion_of_the_package_is_checked():
    exported = {getattr(losses, name) for name in losses.__all__ if name.endswith("Loss")}
    assert {type(made(name, 4)) for name in CRITERIA} == exported


def test_version_is_printed():
    result = run("--version")
    assert result.returncode == 0 and result.stdout == f"flashpair {flashpair.__version__}\n"
