"""Memory that runs out in a kernel, on whichever thread, is a MemoryError, after which the same call is right."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import emulated
import pytest
from conftest import needs_extension

HERE = Path(__file__).resolve().parents[2] / "support"
CASES = (
    "MultiSimilarityLoss():tiled",
    "MultiSimilarityLoss():screened",
    "TripletMarginLoss(triplets='hard'):screened",
    "HistogramLoss():tiled",
    "nearest",
)


@pytest.fixture(scope="module")
def shim(tmp_path_factory):
    if not sys.platform.startswith("linux") or not emulated.compiler():
        pytest.skip("needs Linux and a C++ compiler")
    out = tmp_path_factory.mktemp("shim") / "failing_new.so"
    source = HERE / "failing_new.cpp"
    subprocess.run([*emulated.compiler(), "-O1", "-shared", "-fPIC", "-o", str(out), str(source)], check=True)
    return out


@needs_extension
@pytest.mark.skipif("asan" in os.environ.get("LD_PRELOAD", ""), reason="the sanitizer has a new of its own")
@pytest.mark.parametrize("runtime", ["", "builtin"])  # OpenMP's threads, and the standard library's
@pytest.mark.parametrize("case", CASES)
def test_memory_that_runs_out_is_an_error(shim, case, runtime):
    env = {**os.environ, "LD_PRELOAD": str(shim), "FLASHPAIR_RUNTIME": runtime}
    command = [sys.executable, "-W", "ignore", str(HERE / "out_of_memory.py"), case, "2"]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, f"exit {done.returncode}: {done.stderr[-500:]}"
    found = json.loads(done.stdout)
    assert len(found) > 3 and any(came == "MemoryError" for came, _ in found)
    assert all(came in ("MemoryError", "right") and again for came, again in found)
