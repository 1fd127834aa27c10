"""The demo's retrieval metrics against the oracle and a plain loop, and the demo itself from end to end."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import golden
import pytest
import torch
from helpers import assert_as_good_as
from torch import Tensor

from bench import demo
from bench.retrieval import per_query, rank_scores, retrieval
from flashpair import dispatch

ROOT = Path(__file__).resolve().parent.parent
ORACLE = golden.load()["metrics"]
METRICS = ("precision_at_1", "r_precision", "map_at_r")


def loop(x: Tensor, labels: Tensor) -> list[tuple[float, ...]]:
    """P@1, R-Precision and MAP@R of each query of unit rows x (N, D) that has a reference, by definition."""
    scores = []
    for i in range(len(x)):
        similarity = (x @ x[i]).tolist()
        gallery = sorted((j for j in range(len(x)) if j != i), key=lambda j: (-similarity[j], j))
        hits = [bool(labels[j] == labels[i]) for j in gallery]
        if size := sum(hits):
            average = sum(sum(hits[:k]) / k for k in range(1, size + 1) if hits[k - 1])
            scores.append((float(hits[0]), sum(hits[:size]) / size, average / size))
    return scores


def test_rank_scores_equal_the_oracle():
    for row in ORACLE["seed_table"]:
        hits = torch.zeros(1, 10, dtype=torch.bool)
        hits[0, torch.tensor(row["relevant_ranks"]) - 1] = True
        _, r_precision, map_at_r = rank_scores(hits, torch.tensor([10]))[0].tolist()
        assert (r_precision, map_at_r) == pytest.approx((row["r_precision"], row["map_at_r"]), rel=1e-15)


@pytest.mark.parametrize("chunk", [1, 3, 512])
def test_retrieval_equals_the_oracle(chunk):
    case = ORACLE["retrieval"]
    x, labels = torch.tensor(case["x"], dtype=torch.float64), torch.tensor(case["labels"])
    found = retrieval(x, labels, chunk=chunk)._asdict()
    assert found == pytest.approx({name: case[name] for name in METRICS}, rel=1e-15)
    scores = per_query(x, labels, chunk=chunk)
    for column, name in enumerate(METRICS[1:], start=1):
        expected = [case["per_query"][name].get(str(i), torch.nan) for i in range(len(x))]
        assert scores[:, column].tolist() == pytest.approx(expected, rel=1e-15, nan_ok=True)


@pytest.mark.parametrize("ties", [False, True])
def test_retrieval_equals_a_loop(ties):
    """Corners (+-1/4, ...) of a cube in 16 dimensions are unit vectors with exact products: most tie."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(90, 16, generator=generator, dtype=torch.float64)
    x = x.sign() / 4 if ties else torch.nn.functional.normalize(x)
    labels = torch.randint(12, (90,), generator=generator)
    labels[:3] = torch.tensor([100, 101, 102])
    expected = torch.tensor(loop(x, labels), dtype=torch.float64)
    assert len(expected) < len(x)
    found = per_query(3 * x, labels, chunk=37)
    torch.testing.assert_close(found[~found.isnan().any(1)], expected, rtol=1e-14, atol=0)
    assert tuple(retrieval(x.float(), labels)) == pytest.approx(expected.mean(0).tolist(), rel=1e-14)


def test_retrieval_refuses_what_has_no_ranking():
    with pytest.raises(ValueError, match="all differ"):
        retrieval(torch.eye(3), torch.arange(3))
    with pytest.raises(ValueError, match="finite"):
        retrieval(torch.tensor([[1.0], [torch.nan]]), torch.zeros(2, dtype=torch.int64))


def test_both_curves_are_the_same(tmp_path):
    """Given the same embeddings, the float32 losses are as near to float64's as the reference's are.

    Trained apart, float32 curves may part wherever a rounding turns a ReLU or a mining decision, so that no
    tolerance follows for them. In float64 that is 2^29 times rarer, and twenty steps multiply the other
    roundings by far less than 2^29: rounded to float32, the curves are equal.
    """
    command = [sys.executable, "-m", "bench.demo", "--steps", "20", "--no-bench", "--out", str(tmp_path)]
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
    missing = {"reference": [], "tiled": ["tiled needs the compiled extension: not built"]}
    monkeypatch.setattr(dispatch, "obstacles", lambda impl, device: missing[impl])
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
    assert run["after"]["map_at_r"] > before.map_at_r
    assert run["losses"][-1] < run["losses"][0]
