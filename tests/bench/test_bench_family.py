"""The table of every loss: that nothing is missing from it, that right and wrong are told apart, that it says so."""

from __future__ import annotations

import json

import pytest
import torch

import flashpair
from bench.harness import check, gemm_bound, sandbox, suite, units, variants
from bench.harness.cases import Case, make_batch
from bench.harness.options import GB, GEMM_BOUND, Options
from bench.harness.progress import Progress
from bench.harness.report import percent
from bench.studies import family, family_report
from bench.studies.family_cases import FAMILY

OPTIONS = Options(GB, 1, repeats=2, warmup=0, num_classes=12)
BASELINE = family.BASELINE
CLASSES = family.GROUPS["classes"]


def case_of(loss, n=64, d=16, **changes):
    return Case(Options(**{**vars(OPTIONS), "loss": loss, **changes}), n, d)


@pytest.fixture
def unguarded(monkeypatch):
    """Every variant passes the sandbox, without a process of its own."""
    threads = torch.get_num_threads()
    monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "1")
    found = sandbox.Attempt("ok", seconds=0.0, extra=1000, highest=9000)
    monkeypatch.setattr(sandbox, "attempt", lambda case, variant: found)
    yield
    torch.set_num_threads(threads)


def test_every_criterion_has_a_row():
    public = {getattr(flashpair, name) for name in flashpair.__all__}
    losses = {c for c in public if isinstance(c, type) and issubclass(c, flashpair.Criterion)}
    losses -= {flashpair.Criterion, flashpair.ClassCriterion}
    assert len(losses) > 25
    assert losses == {case.make for case in FAMILY.values()}
    shown = [case.shown for case in FAMILY.values()]
    assert len(set(shown)) == len(shown)


@pytest.mark.parametrize("loss", FAMILY)
def test_reference_and_peer_are_right_or_marked(loss):
    """A baseline that is marked is another number indeed."""
    case = case_of(loss)
    batch = make_batch(case)
    truth = check.find_truth(case, batch)
    assert truth.case == case
    assert truth.bound < 1e-3
    assert (truth.weights is not None) == (loss in CLASSES)
    verdict = check.judge(variants.make_step("reference", case, batch), truth)
    assert verdict.right, verdict.words
    if FAMILY[loss].baseline is None:
        with pytest.raises(variants.NotThere, match="no loss of this formula"):
            variants.make_step(BASELINE, case, batch)
        return
    pytest.importorskip("pytorch_metric_learning")
    verdict = check.judge(variants.make_step(BASELINE, case, batch), truth)
    assert verdict.right == (not FAMILY[loss].differs), verdict.words


@pytest.mark.parametrize("wrong", [False, True])
@pytest.mark.parametrize("loss", ["cosface", "proxy_anchor", "soft_triple"])
def test_gradients_of_class_weights_are_checked(loss, wrong):
    """Right in the embeddings, and a tenth too large in one class's weights."""
    case = case_of(loss)
    batch = make_batch(case)
    truth = check.find_truth(case, batch)
    step = variants.make_step("reference", case, batch)
    scale = torch.ones_like(step.weight)
    scale[:3] += 0.1 * wrong
    step.weight.register_hook(lambda gradient: gradient * scale)
    verdict = check.judge(step, truth)
    assert verdict.right != wrong
    if wrong:
        assert 3 <= verdict.rows_over <= 30
        assert "gradient off" in verdict.words


def test_labels_reach_over_all_classes():
    batch = make_batch(case_of("cosface", num_classes=1000))
    assert len(batch.labels.unique()) == 16
    assert 900 < batch.labels.max() < 1000
    assert batch.labels.bincount().max() == 4


def test_floor_of_class_weights(monkeypatch):
    case, made, real = case_of("arcface", num_classes=40), [], torch.zeros_like
    monkeypatch.setattr(gemm_bound.torch, "zeros_like", lambda t: made.append(real(t)) or made[-1])
    batch = make_batch(case)
    gemm_bound.make_gemm_bound(case, batch)()
    assert [tuple(t.shape) for t in made] == [(64, 16), (40, 16)]
    assert all(t.abs().sum() > 0 for t in made)
    assert gemm_bound.describe(case)["flop"] == 3 * 2 * 64 * 40 * 16


@pytest.mark.parametrize("right", [True, False])
def test_a_wrong_engine_is_no_truth(right, monkeypatch):
    """Large sizes are checked against tiles in float64 only where these equal the dense reference."""
    made = check.criterion

    def tiled(case, impl):
        loss = made(case, "reference")
        off = 1.0 if right or impl == "reference" else 1 + 1e-6
        return lambda x, labels: loss(x, labels) * off

    monkeypatch.setattr(check, "criterion", tiled)
    monkeypatch.setattr(check, "unsupported_reasons", lambda impl, device: [])
    case = case_of("binomial", n=96, memory_limit=1_000_000)
    truth = check.find_truth(case, make_batch(case))
    assert (truth.case == case) == right
    assert ("tiled" in truth.how) == right


def test_a_part_of_the_classes_is_checked_where_all_do_not_fit():
    case = case_of("cosface", num_classes=30_000, memory_limit=50_000_000)
    truth = check.find_truth(case, make_batch(case))
    assert truth.case.options.num_classes == 50_000_000 // (40 * 8 * 16)
    assert "on a part of the size" in truth.how
    assert truth.weights.shape == (truth.case.options.num_classes, 16)
    assert check.judge(variants.make_step("reference", truth.case, truth.batch), truth).right


@pytest.mark.parametrize(("off", "said"), [(3e-4, "rounds more"), (0.0, "wrong"), (0.5, "wrong")])
def test_a_peer_that_only_rounds_is_timed(off, said, monkeypatch):
    """A difference that is there in float64, too, is no rounding, however small; nor is a large one."""

    def rounding(case):
        loss = variants.criterion(case, "reference")
        factor = 1 + (off if off and case.options.dtype == "float32" else 1e-4 if not off else 0.0)
        return lambda x, labels: loss(x, labels) * factor

    monkeypatch.setitem(variants.REGISTRY, BASELINE, rounding)
    case = case_of("ms")
    batch = make_batch(case)
    truth = check.find_truth(case, batch)
    verdict = check.judge(variants.make_step(BASELINE, case, batch), truth)
    assert not verdict.right
    record = suite._difference(verdict, case, BASELINE)
    assert said in (record.get("status") or record["differs"])
    assert suite._difference(verdict, case, "flashpair")["status"] == "wrong"


def steep(case):
    """The right loss with a gradient that is 1 % too large."""

    def call(x, labels):
        loss = variants.criterion(case, "reference")(x, labels)
        return loss + 0.01 * (loss - loss.detach())

    return call


@pytest.fixture
def outcome(unguarded, monkeypatch, tmp_path, capsys):
    """A run of three losses: one whose flashpair is wrong, one whose baseline has another number, one without."""
    pytest.importorskip("pytorch_metric_learning")
    real = variants.REGISTRY["reference"]
    ours = {"ms": steep, "proxynca": real, "binlifted": real}
    monkeypatch.setitem(variants.REGISTRY, "flashpair", lambda case: ours[case.options.loss](case))
    size = ["--n", "64", "--dim", "16", "--classes", "12", "--repeats", "2", "--threads", "1", "--time-limit", "9"]
    family.main([*size, "--losses", "ms,proxynca,binlifted", "--out", str(tmp_path)])
    (path,) = tmp_path.glob("*.json")
    return path, capsys.readouterr().out


def test_wrong_is_not_timed_and_another_number_is_marked(outcome):
    path, said = outcome
    document = json.loads(path.read_text())
    assert document["kind"] == "family"
    assert {"cpu", "torch", "date"} <= set(document["machine"])
    ms, proxies, binlifted = document["cases"]
    assert [c["loss"] for c in document["cases"]] == ["ms", "proxynca", "binlifted"]
    assert (ms["columns"], proxies["columns"]) == (64, 12)
    assert ms["variants"]["flashpair"]["status"] == "wrong"
    assert "seconds" not in ms["variants"]["flashpair"]
    assert ms["variants"][BASELINE]["check"]["right"]
    assert not proxies["variants"][BASELINE]["check"]["right"]
    assert proxies["variants"][BASELINE]["status"] == "ok"
    assert proxies["variants"][BASELINE]["differs"] == FAMILY["proxynca"].differs
    assert "differs" not in ms["variants"][BASELINE]
    assert BASELINE not in binlifted["variants"]
    assert f"Not timed, {ms['shown']}, flashpair: wrong: " in said
    assert said.count("\\*") == 2  # in the row and under the table
    assert "its sum has the own proxy, too" in said


def test_table_from_json_alone(outcome, capsys):
    path, said = outcome
    family.main(["--table", str(path)])
    again = capsys.readouterr().out
    assert again.strip() in said
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in again.splitlines() if line[0:1] == "|"]
    assert len(rows) == 2 + 3
    records = json.loads(path.read_text())["cases"][1]["variants"]
    seconds = {name: records[name]["seconds"]["median"] for name in (*family.OURS, BASELINE, GEMM_BOUND)}
    expected = [
        "`ProxyNCALoss()`", units.duration(seconds["flashpair"]), "1 kB",
        family_report.times(seconds["reference"] / seconds["flashpair"]), "1x",
        family_report.times(seconds[BASELINE] / seconds["flashpair"]) + "\\*", "1x",
        percent(seconds[GEMM_BOUND] / seconds["flashpair"]),
    ]  # fmt: skip
    assert rows[3] == expected
    assert rows[2][1:3] == ["wrong", ""]
    assert rows[4][5:7] == ["", ""]


def test_the_whole_process_is_told_of_many_classes(unguarded, capsys):
    document = family.run(
        Options(GB, 1, sizes=(16,), dims=(4,), repeats=1, num_classes=20_000), ("cosface",), Progress()
    )
    assert document["kind"] == "classes"
    table = family_report.markdown(document)
    assert "| 9 kB |" in table  # what `unguarded` says, not the 1 kB of the step
    assert "weights included" in table


def test_other_defaults_give_way_to_what_is_asked(monkeypatch, unguarded, tmp_path):
    asked = []
    monkeypatch.setattr(family, "run", lambda options, losses, *rest: asked.append((options, losses)) or {})
    monkeypatch.setattr(family.report, "write", lambda *arguments: tmp_path)
    monkeypatch.setattr(family_report, "markdown", lambda document: "")
    family.main(["--million"])
    family.main(["--million", "--classes", "500", "--losses", "pairs,cosface"])
    family.main(["--quick"])
    (options, losses), (other, others), (quick, everything) = asked
    assert (options.num_classes, options.sizes, options.dims) == (1_000_000, (512,), (128,))
    assert set(losses) == set(CLASSES) - {"soft_triple"}
    assert other.num_classes == 500
    assert others == (*family.GROUPS["pairs"], "cosface")
    assert (quick.sizes, quick.num_classes) == ((512,), 1000)
    assert everything == tuple(FAMILY)
    with pytest.raises(SystemExit):
        family.main(["--losses", "no_such"])


def test_limits_and_the_peak_of_a_process():
    """In real processes: weights count in the process's peak, not in what a step adds; a limit is named."""
    case = case_of("cosface", n=16, num_classes=100_000, d=32, variants=("reference",), memory_limit=2 * 10**8)
    record = suite.run_case(case, {}, Progress())["variants"]["reference"]
    memory = record["memory"]
    weights = 100_000 * 32 * 4
    assert memory["gradient"] == weights + 16 * 32 * 4
    rest = memory["process_peak"] - memory["peak_extra"] - 2 * weights  # the interpreter and torch
    assert 0 < rest < GB
    assert 16 * 100_000 * 4 < memory["peak_extra"] < 2 * 10**8
    small = case_of("histogram", n=256, variants=("reference",), memory_limit=20_000_000)
    record = suite.run_case(small, {}, Progress())["variants"]["reference"]
    assert (record["status"], record["words"]) == ("over_memory", "over 20 MB")
