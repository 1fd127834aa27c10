"""bench/gpu_proof on the host: every stage from end to end, with tests/gpu_tools in the places of NVIDIA's."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("triton")
from bench.gpu_proof import counters, sanitizer, summary, sweep
from bench.gpu_proof.__main__ import main
from bench.gpu_proof.driver import Running
from bench.gpu_proof.plan import NAMES, Stage, Tile
from bench.gpu_proof.record import Record

ROOT = Path(__file__).resolve().parent.parent
TOOLS = Path(__file__).parent / "gpu_tools"


def _environment(**more):
    own = {"PATH": f"{TOOLS}{os.pathsep}{os.environ['PATH']}", "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    kept = {k: v for k, v in os.environ.items() if k not in ("CUDA_HOME", "CUDA_PATH") and not k.startswith("PYTEST_")}
    return kept | own | more


def _command(out, *options):
    return [sys.executable, "-m", "bench.gpu_proof", str(out), "--on-host", *options]


def _lines(out):
    return [json.loads(line) for line in (out / "proof.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def proof(tmp_path_factory):
    out = tmp_path_factory.mktemp("proof")
    done = subprocess.run(_command(out), cwd=ROOT, env=_environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr + (out / "log.txt").read_text()
    return out


def test_every_stage_passes_from_end_to_end(proof):
    lines = _lines(proof)
    ends = {line["stage"]: line for line in lines if "ended" in line}
    assert list(ends) and set(ends) == set(NAMES)
    assert all(end["done"] for end in ends.values()), ends
    assert not [line for line in lines if summary.bad(line)]
    known = ("bfloat16", "float32", "copy")
    assert all(any(name in line["ceiling"] for line in lines if "ceiling" in line) for name in known)


def test_what_each_stage_says(proof):
    lines = _lines(proof)
    truth = [line for line in lines if line["stage"] == "truth" and "gradient" in line]
    assert {line["case"].split(" ")[-1] for line in truth} == {"fused", "onchip"}
    assert all(0 < line["gradient"]["error"] <= line["gradient"]["bound"] for line in truth)
    variants = {line["variant"] for line in lines if line["stage"] == "table" and "seconds" in line and "variant" in line}
    assert variants == {"flashpair", "graph", "reference", "compiled", "floor", "pytorch-metric-learning"}
    tried = [line for line in lines if line["stage"] == "sweep" and "times" in line]
    assert any(line["tile"] is None for line in tried) and len(tried) == 5  # shipped, three, and what was picked
    assert [line["found"] for line in lines if line["stage"] == "sanitizer" and "tool" in line] == [0, 0]
    checks = {(line["check"], line["impl"]) for line in lines if line["stage"] == "launches" and line.get("right")}
    assert {("graphs", "fused"), ("streams", "onchip"), ("compiled", "fused")} <= checks
    parts = [line for line in lines if line["stage"] == "suite" and line.get("complete")]
    assert [line["part"] for line in parts] == ["all", "alone"] and all(line["tests"]["passed"] for line in parts)


def test_few_files_and_a_row_for_the_table(proof):
    from flashpair.kernels.configs import Config

    assert len(list(proof.iterdir())) <= 8 and not [f for f in proof.iterdir() if f.is_dir()]
    _, row = (proof / "configs.txt").read_text().splitlines()
    width, config = eval(row.partition("),  #")[0] + ")", {"Config": Config})
    assert width == 24 and config.rows in (16, 32) and isinstance(config, Config)
    words = (proof / "summary.md").read_text()
    assert all(f"| {name} | done |" in words for name in NAMES)
    assert "## Faults\n\nNone." in words and "| reduce_rows |" in words.replace("NTXentLoss ", "")
