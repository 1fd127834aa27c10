"""The sweep over live pairs and the training run: that they measure what they say, and stop at a wrong gradient."""

from __future__ import annotations

import itertools
import json
from functools import partial

import pytest
import torch
from conftest import needs_extension

from bench.harness import sandbox, variants
from bench.harness.cases import Case, live_share, make_batch
from bench.harness.options import Options
from bench.harness.progress import Progress
from bench.studies import live_pairs, training, training_data
from bench.studies import step as bench
from flashpair.tools.check import batch as make_any_batch

OPTIONS = Options(memory_limit=10**9, threads=1, repeats=1, warmup=0, data="trained", intrinsic=live_pairs.INTRINSIC)


@pytest.fixture
def unguarded(monkeypatch):
    """Every variant passes the sandbox without a process of its own; who asked, and with which data.

    A main() that sets torch's threads and the environment leaves neither behind.
    """
    asked, threads = [], torch.get_num_threads()
    monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "1")
    monkeypatch.setattr(
        sandbox, "attempt", lambda case, v: asked.append((case, v)) or sandbox.Attempt("ok", seconds=0.0)
    )
    yield asked
    torch.set_num_threads(threads)


def steep(case):
    """The right loss with a gradient that is 1 % too large."""

    def call(x, labels):
        loss = variants.criterion(case, "tiled")(x, labels)
        return loss + 0.01 * (loss - loss.detach())

    return call


def brute_live_share(x, labels, epsilon=0.1):
    """By loops over the dense matrix."""
    s = torch.nn.functional.normalize(x.double()) @ torch.nn.functional.normalize(x.double()).T
    live = negatives = 0
    for i in range(len(x)):
        same = labels == labels[i]
        negatives += int((~same).sum())
        same_others = same.clone()
        same_others[i] = False
        if same_others.any():
            live += int((s[i][~same] > s[i][same_others].min() - epsilon).sum())
    return live / negatives


@pytest.mark.parametrize("share", [1e-3, 0.02, 0.3])
def test_noise_is_found_for_a_share(share):
    case = live_pairs.find_noise(Case(OPTIONS, 512, 32), share)
    batch = make_batch(case)
    found = brute_live_share(batch.x.detach(), batch.labels)
    assert found == pytest.approx(share, rel=live_pairs.NEAR)
    assert found == pytest.approx(live_share(batch), rel=0.02)


def test_a_share_that_no_noise_leaves_is_refused():
    with pytest.raises(ValueError, match=r"no noise leaves 0\.0001 % of the pairs of N = 64"):
        live_pairs.find_noise(Case(OPTIONS, 64, 16), 1e-6)


def test_trained_data_is_what_it_was():
    """Old JSON has neither noise nor intrinsic."""
    old = Options.of({"memory_limit": 1, "threads": 1, "data": "trained"})
    assert (old.noise, old.intrinsic) == (0.2, 8)
    x = make_batch(Case(old, 64, 16)).x
    other = make_batch(Case(Options(1, 1, data="trained", noise=0.3), 64, 16)).x
    assert not torch.equal(x, other)


@needs_extension
def test_live_end_to_end(tmp_path, unguarded, capsys):
    baselines = "flashpair,flashpair-screened,pml,gemm_bound"
    size = ["--sizes", "256", "--dims", "32", "--shares", "0.5,2,20", "--variants", baselines]
    live_pairs.main([*size, "--repeats", "2", "--threads", "1", "--out", str(tmp_path)])
    (path,) = tmp_path.glob("ms-live_pairs-float32-*.json")
    document = json.loads(path.read_text())
    assert document["shares"] == [0.005, 0.02, 0.2]
    assert {"cpu", "cores", "torch", "instruction_set", "date"} <= set(document["machine"])
    cases = document["cases"]
    assert [c["share_asked_for"] for c in cases] == [0.005, 0.02, 0.2, None]
    assert [c["data"] for c in cases] == ["trained"] * 3 + ["random"]
    for case in cases[:3]:
        assert case["live_share_of_negatives"] == pytest.approx(case["share_asked_for"], rel=live_pairs.NEAR)
    noises = [c["noise"] for c in cases]
    assert noises[0] < noises[1] < noises[2]
    assert noises[3] is None
    for k, case in enumerate(cases):
        for variant in ("flashpair", "flashpair-screened"):
            assert case["variants"][variant]["check"]["right"]
            assert case["variants"][variant]["check"]["checked_n"] == 256
            assert len(case["variants"][variant]["seconds"]["samples"]) == 2
        assert ("pytorch-metric-learning" in case["variants"]) == (k in (0, 3))
    tried = {(case.options.data, case.options.noise) for case, _ in unguarded}
    assert len(tried) == 4  # each share's own data is what is tried, checked and timed
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    capsys.readouterr()
    bench.main(["--table", str(path)])
    rows = capsys.readouterr().out.splitlines()
    assert rows[0] == "| N | live pairs | flashpair | flashpair-screened | pytorch-metric-learning | GEMM bound |"
    assert [row.split("|")[2].strip() for row in rows[2:6]] == [
        live_pairs.percent(c["live_share_of_negatives"]) for c in cases
    ]


def test_wrong_is_not_timed_in_a_sweep(monkeypatch, unguarded):
    monkeypatch.setitem(variants.REGISTRY, "flashpair", steep)
    options = Options.of({**vars(OPTIONS), "sizes": (128,), "dims": (16,), "variants": ("flashpair", "reference")})
    for case in live_pairs.run(options, (0.02,), Progress())["cases"]:
        assert case["variants"]["flashpair"]["status"] == "wrong"
        assert "seconds" not in case["variants"]["flashpair"]
        assert case["variants"]["reference"]["status"] == "ok"


@pytest.mark.parametrize(("steps", "count"), [(400, 30), (3, 10), (1, 2), (1000, 7)])
def test_logged_steps(steps, count):
    found = training.logged_steps(steps, count)
    assert found[0] == 0
    assert found[-1] == steps
    assert min(count, steps + 1) * 0.5 <= len(found) <= count
    gaps = [b - a for a, b in itertools.pairwise(found)]
    assert gaps[0] <= gaps[-1] + 1


@pytest.mark.parametrize("rows", [40, 41])
def test_exact_live_share_equals_a_loop(rows):
    x, labels = make_any_batch(rows, 8, per_class=4, dtype=torch.float32)
    assert training.exact_live_share(x, labels) == pytest.approx(brute_live_share(x, labels), rel=1e-6)


def test_over_the_run_is_the_area_under_the_points():
    points = [{"step": s, "seconds": {"a": {"median": t}}} for s, t in ((0, 2.0), (10, 4.0), (30, 1.0))]
    points.insert(1, {"step": 3, "seconds": {}})
    assert training.over_the_run(points, "a") == pytest.approx(10 * 3 + 20 * 2.5)
    assert training.over_the_run(points[:1], "a") is None


@needs_extension
def test_training_end_to_end(tmp_path, unguarded):
    training.main(
        ["--steps", "12", "--logged", "3", "--batch", "256", "--threads", "1", "--repeats", "2", "--out", str(tmp_path)]
    )
    (path,) = tmp_path.glob("ms-training-float32-*.json")
    document = json.loads(path.read_text())
    assert {"cpu", "cores", "torch", "instruction_set", "date"} <= set(document["machine"])
    assert list(document["runs"]) == ["digits", "synthetic"]
    for run in document["runs"].values():
        points = run["points"]
        assert [p["step"] for p in points] == [0, 3, 12]
        for point in points:
            for variant in training.OURS:
                check = point["checks"][variant]
                assert check["right"]
                assert 0 < check["gradient_error"] < check["bound"] < 1e-2
                assert check["checked_n"] == run["n"]
                assert len(point["seconds"][variant]["samples"]) == 2
            assert 0 < point["live_share"] <= 1
        assert training.BASELINE in points[0]["seconds"]
        assert training.BASELINE in points[-1]["seconds"]
        assert all(run["run_seconds"][v] > 0 for v in run["run_seconds"])
    synthetic = document["runs"]["synthetic"]
    assert synthetic["points"][-1]["live_share"] < synthetic["points"][0]["live_share"] / 2
    assert synthetic["points"][-1]["loss"] < synthetic["points"][0]["loss"]
    assert synthetic["retrieval"]["after"]["map_at_r"] > synthetic["retrieval"]["before"]["map_at_r"]
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("variant", training.OURS)
def test_a_wrong_gradient_stops_the_training(variant, monkeypatch, unguarded):
    monkeypatch.setitem(variants.REGISTRY, variant, steep)
    with pytest.raises(training.Wrong, match=f"{variant}: wrong: gradient off"):
        training.run(training_data.synthetic(64, 0), 4, 2, OPTIONS, Progress())


def test_training_measures_on_a_copy(monkeypatch):
    """Timing leaves no gradient and no changed embeddings behind; each variant sees these embeddings."""
    x = torch.randn(32, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    before, labels = x.detach().clone(), torch.arange(8).repeat_interleave(4)
    seen = []

    def watched(impl, case):
        criterion = variants.criterion(case, impl)
        return lambda x, labels: seen.append(x.detach().clone()) or criterion(x, labels)

    for variant in training.OURS:
        monkeypatch.setitem(variants.REGISTRY, variant, partial(watched, "reference"))
    record = training.measure(Case(OPTIONS, 32, 8), x, labels, training.OURS)
    assert set(record["seconds"]) == set(training.OURS)
    assert x.grad is None
    assert torch.equal(x, before)
    assert all(torch.equal(each, before) for each in seen)
