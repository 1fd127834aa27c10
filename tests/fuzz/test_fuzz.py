"""A short run of the fuzzer with fixed seeds, the cases that it has found and are mended, and the fuzzer itself."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import needs_extension

from .case import read
from .found import FOUND
from .kinds import KINDS, run
from .losses import PAIR_LOSSES, draw
from .shrink import shrink

pytestmark = needs_extension
ROOT = Path(__file__).parents[2]
SEED = 2000000


@pytest.mark.parametrize("case", FOUND, ids=str)
def test_found_before(case):
    assert run(read(FOUND[case])) == ""


@pytest.fixture
def swallowed(monkeypatch):
    """A fault: the first row of every sum of losses is 0."""
    import flashpair.losses.base as base

    whole = base.reduce_losses

    def faulty(rows, reduction, pairs, extra=None):
        if rows.losses.requires_grad and pairs is not None and not hasattr(pairs, "z"):
            rows = rows._replace(losses=rows.losses * (torch.arange(len(rows.losses)) > 0))
        return whole(rows, reduction, pairs, extra)

    monkeypatch.setattr(base, "reduce_losses", faulty)


def test_a_fault_is_found_and_made_small(swallowed):
    case = next(c for c in map(lambda s: draw(s, ("tiled",)), range(10**4)) if c.name == "SupConLoss" and c.n > 30)
    case = case.with_(changes=[], m=-1, labels="pairs", dtype="float32")
    case = case.with_(options={**case.options, "reduction": "sum", "refs": "none", "normalize": True})
    words = "against the reference, loss"
    assert run(case).startswith(words)
    small = shrink(case, lambda c: run(c).startswith(words), seconds=10)
    assert run(small).startswith(words) and len(small.rows) <= 3 < case.n


def test_a_case_is_read_as_it_is_written():
    for seed in range(40):
        for kind in KINDS.values():
            case = kind.draw(seed, ("auto", "tiled"))
            assert read(case.json()) == case
    assert len(PAIR_LOSSES) > 20


def test_command():
    """Cases with fixed seeds, none of which fails."""
    command = [sys.executable, "-m", "tests.fuzz", "--cases", "150", "--seed", str(SEED)]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0 and "150 cases, 0 failed" in done.stdout, done.stdout + done.stderr
