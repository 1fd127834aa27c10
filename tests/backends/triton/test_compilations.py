"""A kernel is compiled once for all N that it can serve: the last batch of an epoch waits for no compiler."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


@pytest.fixture(scope="module")
def report():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, str(Path(__file__).resolve().parents[2] / "support" / "compilations.py")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_no_size_of_a_batch_compiles_a_kernel_again(report):
    assert {"gather_rows", "reduce_rows", "merge_splits", "list_tiles", "backward_rows", "screen"} <= {
        kernel for case in report for kernel in case["new"]
    }
    again = {case["case"]: {k: at for k, at in case["new"].items() if set(at) != {case["sizes"][0]}} for case in report}
    assert not any(again.values()), again
