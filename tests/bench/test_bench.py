"""The benchmark itself: that it checks before it times, survives what dies, and counts memory right. Never how fast."""

from __future__ import annotations

import json
import math
import mmap
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import needs_extension

import flashpair
from bench.harness import check, gemm_bound, measure, memory, report, sandbox, suite, units
from bench.harness.cases import Case, live_share, make_batch
from bench.harness.options import LOSSES, Options
from bench.harness.progress import Progress
from bench.harness.variants import NotThere, criterion, make_step, training_step
from bench.studies import launch_overhead
from bench.studies.step import main
from flashpair.backends import extension

ROOT = Path(__file__).resolve().parents[2]
OPTIONS = Options(memory_limit=10**9, threads=1, repeats=2)
needs_proc = pytest.mark.skipif(not memory.STATUS.exists(), reason="no /proc on this system")


def case_of(n=96, d=16, **changes):
    return Case(Options(**{**vars(OPTIONS), **changes}), n, d)


def run_bench(*arguments):
    command = [sys.executable, "-m", "bench", "step", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    """One small run from the command line: the folder, and what it printed."""
    out = tmp_path_factory.mktemp("bench")
    said = run_bench(
        "--sizes", "64,96", "--dims", 16, "--repeats", 2, "--threads", 1, "--out", out,
        "--variants", "flashpair,gemm_bound",
    )  # fmt: skip
    return out, said


def test_run_end_to_end(outcome):
    out, said = outcome
    (path,) = out.glob("*.json")
    document = json.loads(path.read_text())
    assert {"cpu", "cores", "memory_bytes", "torch", "flashpair", "instruction_set", "date"} <= set(document["machine"])
    assert document["options"]["sizes"] == [64, 96]
    assert [c["n"] for c in document["cases"]] == [64, 96]
    for case in document["cases"]:
        assert case["gemm_bound"]["gemm_bound"]["flop"] == 3 * 2 * case["n"] ** 2 * 16
        ours = case["variants"]["flashpair"]
        times = ours["seconds"]
        assert ours["status"] == "ok"
        assert ours["check"]["right"]
        assert ours["check"]["rows_over"] == 0
        assert 0 < ours["check"]["gradient_error"] < ours["check"]["bound"] < 1e-3
        assert len(times["samples"]) == 2
        assert min(times["samples"]) <= times["q1"] <= times["median"] <= times["q3"] <= max(times["samples"])
        assert ours["fraction_of_gemm_bound"] == case["variants"]["gemm_bound"]["seconds"]["median"] / times["median"]
        assert ours["memory"]["gradient"] == case["n"] * 16 * 4
        assert ours["memory"]["over_linear"] == ours["memory"]["peak_extra"] / (2 * case["n"] * 16 * 4)
    assert "flashpair" in said
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_table_and_plot_from_json_alone(outcome, tmp_path, capsys):
    (path,) = outcome[0].glob("*.json")
    document = report.read(path)
    ours = document["cases"][1]["variants"]["flashpair"]
    document["cases"][1]["variants"]["late"] = {"n": 96, "status": "over_memory", "words": "over 1 GB"}
    document["cases"][0]["variants"]["late"] = ours
    changed = tmp_path / "changed.json"
    changed.write_text(json.dumps(document))
    main(["--table", str(changed)])
    rows = capsys.readouterr().out.splitlines()
    assert rows[0] == "| N | flashpair | late | GEMM bound |"
    assert rows[3].startswith(f"| 96 | {units.duration(ours['seconds']['median'])} (")
    assert "| over 1 GB |" in rows[3]
    main(["--plot", str(changed)])
    assert changed.with_suffix(".png").stat().st_size > 10_000


def test_over_the_memory_limit_is_reported_and_not_fatal():
    options = case_of(sizes=(512, 768), dims=(16,), variants=("reference",), memory_limit=2_000_000).options
    cases = suite.run(options, Progress())["cases"]
    first, second = (c["variants"]["reference"] for c in cases)
    assert (first["status"], first["words"]) == ("over_memory", "over 2 MB")
    assert "seconds" not in first
    assert (second["status"], second["since_n"]) == ("over_memory", 512)  # not tried again


def test_over_the_time_limit_and_a_broken_variant_are_reported(tmp_path, monkeypatch):
    (tmp_path / "peculiar.py").write_text(
        "import os, time\n"
        "def asleep(case): return lambda x, labels: time.sleep(60 if len(x) > 64 else 0) or x.sum()\n"
        "def dead(case): os._exit(3)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(sandbox, "GRACE_SECONDS", 0.1)
    slow = sandbox.attempt(case_of(time_limit=0.2), "peculiar:asleep")
    assert (slow.status, slow.words) == ("over_time", "over 200 ms")
    dead = sandbox.attempt(case_of(), "peculiar:dead")
    assert dead.status == "failed"
    assert "ended with 3" in dead.words


def shifted(case):
    def call(x, labels, **refs):
        return criterion(case, "reference")(x, labels, **refs) * 1.0001

    return call


def steep(case):
    """The right loss with a gradient that is 1 % too large."""

    def call(x, labels, **refs):
        loss = criterion(case, "reference")(x, labels, **refs)
        return loss + 0.01 * (loss - loss.detach())

    return call


def few_rows(case):
    """The right loss with a gradient that is wrong for four samples."""

    def call(x, labels, **refs):
        loss = criterion(case, "reference")(x, labels, **refs)
        return loss + 0.1 * (x[:4].sum() - x[:4].sum().detach())

    return call


def not_finite(case):
    return lambda x, labels, **refs: criterion(case, "reference")(x, labels, **refs) * torch.nan


@pytest.mark.parametrize("data", ["random", "trained"])
@pytest.mark.parametrize("wrong", [shifted, steep, few_rows, not_finite])
def test_wrong_is_refused(wrong, data):
    case = case_of(data=data)
    truth = check.find_truth(case, make_batch(case))
    verdict = check.judge(training_step(wrong(case), truth.batch), truth)
    assert not verdict.right
    assert verdict.words.startswith("wrong: ")


@pytest.mark.parametrize("ref", [None, 160])
@pytest.mark.parametrize("loss", LOSSES)
def test_right_is_accepted(loss, ref):
    """All variants but the compiled one, whose code is the reference's."""
    if loss == "lifted" and ref:
        pytest.skip("defined within a batch")
    case = case_of(loss=loss, ref=ref, data="trained")
    batch = make_batch(case)
    truth = check.find_truth(case, batch)
    assert truth.case == case
    assert truth.bound < 1e-3
    for variant in ("flashpair", "reference", "pytorch-metric-learning"):
        try:
            step = make_step(variant, case, batch)
        except NotThere:
            assert variant == "pytorch-metric-learning"
            assert loss == "lifted_star" or (loss == "n_pairs" and ref)
            continue
        verdict = check.judge(step, truth)
        assert verdict.right, f"{variant}: {verdict.words}"
        assert verdict.rows_over == 0


def test_rows_that_eager_moves_over_a_threshold_are_forgiven(monkeypatch):
    """Twice as many as eager itself has over the bound, no more."""
    case = case_of(data="trained")
    batch, right = make_batch(case), check.criterion

    def moved(case, impl, count=3):
        def call(x, labels):
            loss = right(case, "reference")(x, labels)
            return loss if x.dtype == torch.float64 else loss + 0.1 * (x[:count].sum() - x[:count].sum().detach())

        return call

    monkeypatch.setattr(check, "criterion", moved)
    monkeypatch.setattr(check.torch.Tensor, "quantile", lambda errors, q: errors.sort().values[88])  # seven are moved
    monkeypatch.setattr(check, "ORDERS", 1)
    truth = check.find_truth(case, batch)
    assert truth.forgiven == pytest.approx(2 * 3 / 96)
    assert check.judge(training_step(moved(case, "", 6), batch), truth).right
    assert not check.judge(training_step(moved(case, "", 7), batch), truth).right


def test_rows_that_eager_moves_in_another_order_of_its_sums_are_forgiven(monkeypatch):
    """As many as in the worst order, and about as much; the bound on all others stays."""
    case = case_of(data="trained")
    batch, right = make_batch(case), check.criterion
    plain, first = check.find_truth(case, batch), batch.x.detach()[0, 0].item()

    def moved(case, impl, count=5, by=0.1):
        def call(x, labels):
            loss = right(case, "reference")(x, labels)
            untouched = x.dtype == torch.float64 or (impl and x[0, 0].item() == first)
            return loss if untouched else loss + by * (x[:count].sum() - x[:count].sum().detach())

        return call

    monkeypatch.setattr(check, "criterion", moved)
    truth = check.find_truth(case, batch)
    assert plain.forgiven == 0
    assert truth.forgiven == pytest.approx(2 * 5 / 96)
    assert truth.bound == plain.bound
    assert check.judge(training_step(moved(case, "", 10), batch), truth).right
    assert not check.judge(training_step(moved(case, "", 11), batch), truth).right
    assert not check.judge(training_step(moved(case, "", 5, by=1.0), batch), truth).right


@needs_extension
@pytest.mark.parametrize("wrong", [None, shifted, steep, few_rows, not_finite])
def test_a_soft_histogram_is_right_and_a_wrong_one_is_refused(wrong):
    """Of 256 samples, in whose 32,640 pairs dense float32 code, too, finds some on the other side of a node."""
    case = case_of(loss="histogram", n=256, d=32)
    truth = check.find_truth(case, make_batch(case))
    step = make_step("flashpair", case, truth.batch) if wrong is None else training_step(wrong(case), truth.batch)
    verdict = check.judge(step, truth)
    assert 0 < truth.forgiven * 256 < 16
    assert verdict.right == (wrong is None), verdict.words


def test_wrong_is_not_timed(monkeypatch):
    """Through the whole of a case, with the sandbox's attempt taken as passed."""
    monkeypatch.setattr(suite.sandbox, "attempt", lambda case, variant: sandbox.Attempt("ok", seconds=0.0))
    case = case_of(variants=("reference", f"{__name__}:steep"))
    records = suite.run_case(case, {}, Progress())["variants"]
    assert records["reference"]["status"] == "ok"
    assert records[f"{__name__}:steep"]["status"] == "wrong"
    assert "seconds" not in records[f"{__name__}:steep"]


@needs_extension
def test_large_sizes_are_checked_against_tiles_in_double():
    """The truth of a size whose dense matrices do not fit equals the dense one."""
    case, small = case_of(memory_limit=1_000_000), case_of()
    batch = make_batch(case)
    tiled, dense = check.find_truth(case, batch), check.find_truth(small, batch)
    assert "tiled" in tiled.how
    assert "dense" in dense.how
    assert math.isclose(tiled.loss, dense.loss, rel_tol=1e-12)
    assert check.row_errors(tiled.gradient, dense.gradient).max() < 1e-12


def test_row_errors_see_single_rows():
    truth = torch.tensor([[3.0, 4.0], [0.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    found = truth + torch.tensor([[0.0, 0.5], [0.0, 0.0], [0.1, 0.0]], dtype=torch.float64)
    typical = math.sqrt(26 / 3)
    expected = torch.tensor([0.5 / 5, 0.0, 0.1 / typical], dtype=torch.float64)
    torch.testing.assert_close(check.row_errors(found, truth), expected)


def test_trained_data_leaves_few_pairs_but_some():
    batch = make_batch(case_of(n=512, d=64, data="trained"))
    assert 0 < live_share(batch) < 0.01
    assert live_share(make_batch(case_of(n=512, d=64))) > 0.5


@pytest.mark.parametrize("ref", [None, 40])
def test_floor_in_row_blocks_is_the_same_products(ref, monkeypatch):
    case = case_of(n=50, d=8, ref=ref)
    batch = make_batch(case)
    x, made = batch.x.detach(), []
    y = x if batch.y is None else batch.y
    real = torch.zeros_like
    monkeypatch.setattr(gemm_bound.torch, "zeros_like", lambda t: made.append(real(t)) or made[-1])
    monkeypatch.setattr(gemm_bound, "WHOLE", 100)
    monkeypatch.setattr(gemm_bound, "BLOCK_ROWS", 16)
    step = gemm_bound.make_gemm_bound(case, batch)
    for _ in range(2):  # outputs are used again
        step()
    s = x @ y.T
    torch.testing.assert_close(made[0], s @ y)
    if ref is None:
        torch.testing.assert_close(made[1], s.T @ x)
    assert gemm_bound.describe(case)["row_blocks_of"] == 16
    assert len(gemm_bound.describe(case)["products"]) == 3


@needs_proc
@pytest.mark.parametrize("exact", [True, False])
def test_peak_memory(exact, monkeypatch):
    """The peak of a step, not what it leaves, by either method."""
    if not exact:
        monkeypatch.setattr(memory, "_reset_high_water", lambda: False)

    def step():
        for size in (32 * 2**20, 64 * 2**20):  # the system's own pages: malloc may keep what it is given back
            with mmap.mmap(-1, size) as pages:
                pages[:: mmap.PAGESIZE] = b"x" * (size // mmap.PAGESIZE)
                time.sleep(0.05)

    step()
    found = memory.peak_of(step)
    assert (found.method == "VmHWM") == exact
    assert 64 * 2**20 * 0.98 < found.extra < 64 * 2**20 + 4 * 2**20


def test_interleaving(monkeypatch):
    """Rounds start one variant later each, a failing variant is dropped, a slow one sits out."""
    order, calls, now = [], {"dead": 0}, [0.0]
    monkeypatch.setattr(measure, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    def dead():
        calls["dead"] += 1
        if calls["dead"] > 1:
            raise ValueError("no more")

    def step(name, seconds):
        def run():
            order.append(name)
            now[0] += seconds

        return run

    steps = {"a": step("a", 0.01), "slow": step("slow", 0.06), "dead": dead}
    options = case_of(repeats=3, warmup=1, time_limit=0.05).options
    found = measure.interleave(steps, options)
    assert order == ["a", "slow", "a", "slow", "slow", "a", "a", "a"]
    assert found["a"].record()["median"] == pytest.approx(0.01)
    assert found["slow"].samples == [pytest.approx(0.06)]
    assert str(found["dead"]) == "no more"


def test_units():
    assert units.duration(0.01234) == "12.3 ms"
    assert units.duration(30) == "30 s"
    assert units.span(0.0009, 0.0011) == "0.9 to 1.1 ms"
    assert units.size(21_485_026_713) == "21.5 GB"
    assert units.size(999_999) == "1 MB"


@pytest.mark.parametrize("phase", ["launch_overhead", "device"])
def test_phases_of_a_gpu_are_refused_on_the_cpu(phase):
    with pytest.raises(ValueError, match=f"phase {phase}: needs a GPU"):
        Options(memory_limit=1, threads=1, phase=phase)


def test_launch_overhead_leaves_the_kernel_as_it_was():
    x, labels = torch.randn(8, 4), torch.arange(8) // 2
    before = flashpair.MultiSimilarityLoss(impl="reference")(x, labels)
    assert set(launch_overhead.measure(calls=10, rounds=2)) == {"onchip", "autograd.Function", "dense eager code"}
    if extension.emulated():
        assert torch.allclose(flashpair.MultiSimilarityLoss(impl="onchip")(x, labels), before)
