"""The demo from end to end."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import assert_as_good_as

from bench.demo import train as demo
from flashpair.engine import dispatch

ROOT = Path(__file__).resolve().parents[2]


def test_both_curves_are_the_same(tmp_path):
    """Given the same embeddings, the float32 losses are as near to float64's as the reference's are.

    Trained apart, float32 curves may part wherever a rounding turns a ReLU or a mining decision, so that no
    tolerance follows for them. In float64 that is 2^29 times rarer, and twenty steps multiply the other
    roundings by far less than 2^29: rounded to float32, the curves are equal.
    """
    command = [sys.executable, "-m", "bench", "demo", "--steps", "20", "--no-bench", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")
    document = json.loads((tmp_path / "demo.json").read_text())
    own, reference, _, double, double_reference = (document["runs"][s.name] for s in demo.SETTINGS)
    losses, eager, truth = (torch.tensor(own[key], dtype=torch.float64) for key in ("losses", "eager", "truth"))
    assert len(losses) == document["steps"] == 20
    assert_as_good_as(losses.float(), eager.float(), truth)
    assert own["eager"][0] == reference["losses"][0]
    assert double["losses"] == pytest.approx(double_reference["losses"], rel=torch.finfo(torch.float32).eps)
    assert double["after"] == double_reference["after"]


def test_demo_without_the_extension(tmp_path, monkeypatch, capsys):
    why = ("tiled needs the compiled extension: not built",)
    monkeypatch.setattr(dispatch, "_unsupported_reasons", lambda impl, device: () if impl == "reference" else why)
    assert demo.main(["--steps", "1", "--no-bench", "--out", str(tmp_path)]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert 'impl="auto" is reference here' in said
    assert "not built" in said
    assert "say nothing about the kernels" in said
    assert json.loads((tmp_path / "demo.json").read_text())["implementation"] == "reference"


def test_training_raises_retrieval_of_unseen_digits():
    digits = demo.load()
    with demo.one_thread():
        before = demo.evaluate(demo.network(0), digits)
        run = demo.train(digits, demo.SETTINGS[0], 100, 0, lambda name: None)
    assert run["after"]["map_at_r"] > before["map_at_r"]
    assert run["losses"][-1] < run["losses"][0]
