"""What the kernels of `bench.gpu_cost` cost may fall, and may not rise, beside what is committed for this Triton."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parents[2]
COMMITTED = ROOT / f"bench/results/gpu-cost-{triton.__version__}.json"
NUMBERS = ("registers", "stack", "instructions")


def _by_kernel(result):
    return {tuple(r[k] for k in ("arch", "loss", "dtype", "d", "kernel")): r for r in result["kernels"]}


@pytest.mark.skipif(
    not COMMITTED.exists(), reason=f"no {COMMITTED.name} to compare with: another Triton's code differs"
)
def test_no_kernel_costs_more_than_what_is_committed(tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "bench.gpu_cost", "--json", str(tmp_path / "now.json")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    now = _by_kernel(json.loads((tmp_path / "now.json").read_text()))
    before = _by_kernel(json.loads(COMMITTED.read_text()))
    assert set(now) == set(before), "run python -m bench.gpu_cost --json on it again"
    worse = {kernel: {k: (before[kernel][k], own[k]) for k in NUMBERS} for kernel, own in now.items()
             if any(own[k] > before[kernel][k] for k in NUMBERS)}  # fmt: skip
    assert not worse, f"(committed, now): {worse}"
    for own in now.values():
        assert own["instructions"] > 100 and own["cycles"]["tensor"] > 0, f"the loop over tiles was not found: {own}"
