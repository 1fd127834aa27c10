"""The product's compiled kernels, executed: losses and gradients by the project's rule, and no fault on the way.

tests/ptx runs their PTX for sm_80 and sm_90 on CPU tensors, in a process of its own, since Triton is an interpreter in
this one. `python -m tests.ptx` has the whole matrix.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


def _lines(*words):
    """What `python -m tests.ptx` says, a record a line."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.ptx", *words]
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, cwd=Path(__file__).resolve().parents[3]
    )
    assert not done.stderr or done.returncode in (0, 1), done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_losses_and_gradients(arch):
    found = _lines("quick", arch)
    assert len(found) >= 9
    for record in found:
        assert not record["fault"], f"{record['case']}: {record['fault']}"
        assert record["alive"] >= 0.2, f"{record['case']} is trivial: few rows have a gradient"
        assert record["good"], f"{record['case']}: errors {record['errors']} over {record['bounds']}"


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_the_executor_itself(arch):
    """Products of every type, layout and pipeline, scans, reductions: equal to numpy's."""
    found = _lines("trials", arch)
    assert len(found) > 60
    assert not [record["case"] for record in found if not record["good"]]


@pytest.mark.parametrize(("arch", "kinds"), [("sm_80", 4), ("sm_90", 7)])
def test_a_kernel_with_something_taken_from_it(arch, kinds):
    """Barriers, waits, fences and masks of the product's own kernels: without one of them, something is found.

    Not every one of them is needed: a compiler puts a barrier where another one follows, and a fence where none of the
    stores before it is read by a product. Each of those has its reason.
    """
    found = _lines("mutants", "quick", f"fused-{arch}-bf16-Multi")
    found_by_kind = {kind: 0 for kind in (record["mutant"] for record in found)}
    for record in found:
        found_by_kind[record["mutant"]] += record["found"]
        assert record["good"], f"{record['kernel']}: nothing finds {record['unexplained']}, and nothing says why"
        assert record["found"] + sum(record["why"].values()) == record["of"]
    assert len(found_by_kind) == kinds
    assert all(found_by_kind.values()), found_by_kind
    assert sum(r["found"] for r in found) >= 0.75 * sum(r["of"] for r in found)
