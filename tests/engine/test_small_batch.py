"""Losses computed whole, by `onchip` (its source, run on the CPU) and by `tiled`, against the float64 reference."""

from __future__ import annotations

import pytest
import torch
from conftest import needs_extension
from helpers import FORMULAS, assert_as_good_as, assert_parity, assert_same, batch, loss_and_gradients, relative

from flashpair import MultiSimilarityLoss, NPairsLoss
from flashpair.backends import extension
from flashpair.backends.cpu import tiled
from flashpair.core.problem import AVERAGINGS
from flashpair.engine import small_batch

emulated = pytest.mark.skipif(not extension.emulated(), reason="no compiler to build the emulated kernel with")


@pytest.fixture(params=[pytest.param("onchip", marks=emulated), pytest.param("tiled", marks=needs_extension)])
def impl(request, chip):
    """A schedule; `onchip` on eight multiprocessors, so that blocks own several rows."""
    chip(8)
    return request.param


@needs_extension
def test_tiled_takes_small_batches_whole(monkeypatch):
    called = []
    monkeypatch.setattr(tiled, "run_small_batch", lambda c, run=tiled.run_small_batch: called.append(c) or run(c))
    for n, d, takes in ((8, 4, True), (1024, 4, True), (1028, 4, False)):
        x, labels = batch(n, d, 4, torch.float32)
        for name in ("auto", "tiled"):
            called.clear()
            MultiSimilarityLoss(impl=name)(x, labels)
            assert bool(called) == takes
    for n, m, takes in ((2049, 0, True), (2050, 0, False), (4096, 1024, True), (1025, 1025, False)):  # one pair a class
        x, labels = batch(n, 4, 4, torch.float32)
        y, ref_labels = batch(m, 4, 4, torch.float32) if m else (None, None)
        called.clear()
        NPairsLoss()(x, labels, ref_emb=y, ref_labels=ref_labels)
        assert bool(called) == takes
    learned = torch.nn.Parameter(torch.tensor(2.0))
    called.clear()
    MultiSimilarityLoss(alpha=learned)(x[:8], labels[:8])
    assert not called


@needs_extension
@pytest.mark.parametrize("n", [0, 1, 2, 127, 128, 129, 300])
def test_tile_edges_of_tiled(n):
    x, labels = batch(n, 6, 4, torch.float64)
    y, ref_labels = batch(140, 6, 3, torch.float64, seed=1)
    for make in FORMULAS.values():
        assert_parity(make, "tiled", x, labels)
        assert_parity(make, "tiled", x, labels, y, ref_labels)


@pytest.mark.parametrize("reduction", AVERAGINGS[:5])
@pytest.mark.parametrize("name", FORMULAS)
def test_every_formula_and_reduction(name, reduction, impl):
    x, labels = batch(23, 7, 3, torch.float64)
    y, ref_labels = batch(18, 7, 4, torch.float64, seed=1)
    assert_parity(FORMULAS[name], impl, x, labels, reduction=reduction)
    assert_parity(FORMULAS[name], impl, x, labels, y, ref_labels, reduction=reduction)


PATTERNS = {
    "one class": torch.zeros(20, dtype=torch.int64),
    "all single": torch.arange(20),
    "two classes": torch.arange(20) % 2,
    "one large, many small": torch.tensor([0] * 10 + list(range(1, 11))),
    "far apart": torch.tensor([-(2**63), 2**63 - 1, 2**32, 0, 2**32 + 2**31] * 4),
}


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_label_patterns(pattern, name, impl):
    x, _ = batch(20, 6, 4, torch.float64)
    x[7] = x[2]  # a duplicate is a real pair
    x[11] = 0.0
    assert_parity(FORMULAS[name], impl, x, PATTERNS[pattern])


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8])
def test_other_integers_and_strides(dtype, impl):
    x, labels = batch(32, 12, 4, torch.float64)
    found = loss_and_gradients(MultiSimilarityLoss, impl, x[::2, ::2], labels.to(dtype)[::2])
    for f, t in zip(found, loss_and_gradients(MultiSimilarityLoss, "reference", x[::2, ::2], labels[::2]), strict=True):
        assert_same(f, t)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", FORMULAS)
def test_precision(name, dtype, impl):
    """As near to float64 as the dense code of that precision, which multiplies 16-bit numbers in float32 as well."""
    x, labels = batch(30, 33, 3, torch.float32)
    y, ref_labels = batch(20, 33, 3, torch.float32, seed=1)
    x, y = x.to(dtype), y.to(dtype)
    found = loss_and_gradients(FORMULAS[name], impl, x, labels, y, ref_labels)
    eager = loss_and_gradients(FORMULAS[name], "reference", x, labels, y, ref_labels)
    truth = loss_and_gradients(FORMULAS[name], "reference", x.double(), labels, y.double(), ref_labels)
    for f, e, t in zip(found, eager, truth, strict=True):
        assert f.dtype == e.dtype
        assert_as_good_as(f, e, t)


def test_embeddings_and_references_of_two_dtypes(impl):
    x, labels = batch(12, 6, 3, torch.float64)
    found = loss_and_gradients(MultiSimilarityLoss, impl, x.float(), labels, x, labels)
    truth = loss_and_gradients(MultiSimilarityLoss, "reference", x.float(), labels, x, labels)
    assert [f.dtype for f in found] == [torch.float64, torch.float32, torch.float64]
    for f, t in zip(found, truth, strict=True):
        assert relative(f, t) <= 8 * torch.finfo(f.dtype).eps


@pytest.mark.parametrize("need", [(True, False), (False, True)])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_only_one_side_wants_a_gradient(need, reduction, impl):
    x, labels = batch(14, 6, 3, torch.float64)
    y, ref_labels = batch(11, 6, 3, torch.float64, seed=1)
    assert_parity(MultiSimilarityLoss, impl, x, labels, y, ref_labels, need=need, reduction=reduction)


def test_without_gradients(impl):
    x, labels = batch(14, 6, 3, torch.float64)
    with torch.no_grad():
        losses = [MultiSimilarityLoss(impl=which)(x, labels) for which in (impl, "reference")]
    assert_same(*losses)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf, 1e300])
@pytest.mark.parametrize("name", FORMULAS)
def test_what_is_not_finite_is_nan(name, bad, impl):
    """Nowhere does a comparison swallow it; nor that 1e300 squared overflows, in a norm or a product."""
    x, labels = batch(12, 6, 3, torch.float64)
    x[5, 2] = bad
    if bad == 1e300:
        x[labels == labels[5]] *= 1e300  # a whole class: products that overflow on either side
    for normalize in (True, False):
        loss, grad = loss_and_gradients(FORMULAS[name], impl, x, labels, normalize=normalize)
        truth, _ = loss_and_gradients(FORMULAS[name], "reference", x, labels, normalize=normalize)
        assert truth.isfinite() or not (loss.isfinite() or grad.isfinite().all())
        assert bad == 1e300 or truth.isnan()


def test_references_with_gradients_under_no_grad(impl):
    """The plan is made without blocks for their gradient, and so is the launch."""
    x, labels = batch(16, 6, 3, torch.float64)
    y, ref_labels = batch(16, 6, 3, torch.float64, seed=1)
    with torch.no_grad():
        x, refs = x.requires_grad_(), {"ref_emb": y.requires_grad_(), "ref_labels": ref_labels}
        losses = [MultiSimilarityLoss(impl=which)(x, labels, **refs) for which in (impl, "reference")]
    assert_same(*losses)


@pytest.mark.parametrize("kind", ["mean_sq", "tf_contrib", "mean_norm"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "mean_valid"])
@pytest.mark.parametrize("variant", ["mc", "ovo", "all_pairs"])
def test_penalty_on_norms(variant, reduction, kind, impl):
    x, labels = batch(11, 5, 3, torch.float64)

    def make(**options):
        return NPairsLoss(variant, 0.02, kind, **options)

    assert_parity(make, impl, x, labels, reduction=reduction)


def test_same_bits_and_untouched_inputs(impl):
    x, labels = batch(34, 20, 4, torch.float32)
    before = x.clone(), labels.clone()
    torch.use_deterministic_algorithms(True)  # fills what torch.empty returns with NaN
    try:
        runs = [loss_and_gradients(MultiSimilarityLoss, impl, x, labels) for _ in range(5)]
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0], strict=True))
    assert torch.equal(x, before[0]) and torch.equal(labels, before[1])


def test_backward_twice_and_second_derivatives(impl):
    x, labels = batch(6, 3, 2, torch.float64)
    a = x.clone().requires_grad_()
    loss = MultiSimilarityLoss(impl=impl)(a, labels)
    first, again = (torch.autograd.grad(loss, a, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, again)
    for name in ("MultiSimilarityLoss(epsilon=None)", "NPairsLoss('ovo')"):
        for reduction in ("mean", "none"):
            criterion = FORMULAS[name](impl=impl, reduction=reduction)
            assert torch.autograd.gradcheck(lambda t, c=criterion: c(t, labels), a, fast_mode=True)
            assert torch.autograd.gradgradcheck(lambda t, c=criterion: c(t, labels), a, fast_mode=True)


def test_registered_op(impl):
    x, labels = batch(6, 3, 2, torch.float64)
    formula = MultiSimilarityLoss().row_formula()
    spec = small_batch.plan(impl, formula, x, None, reduction="mean", normalize=True, distance="dot", penalty=False)
    torch.library.opcheck(
        torch.ops.flashpair.small_batch_loss, (x, labels, None, None, None, *spec, True, True, True, False)
    )


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_fullgraph_compile(reduction, dynamic, impl):
    criterion = MultiSimilarityLoss(impl=impl, reduction=reduction)
    compiled = torch.compile(criterion, fullgraph=True, dynamic=dynamic)
    for n in (12, 13, 30):
        x, labels = batch(n, 5, 3, torch.float64)
        found = loss_and_gradients(lambda impl: compiled, impl, x, labels)
        for f, t in zip(
            found, loss_and_gradients(MultiSimilarityLoss, "reference", x, labels, reduction=reduction), strict=True
        ):
            assert_same(f, t)


def test_a_subclass_with_rows_of_its_own_is_not_its_parent(impl):
    x, labels = batch(12, 5, 3, torch.float32)

    class Doubled(MultiSimilarityLoss):
        def row_losses(self, pairs):
            rows = super().row_losses(pairs)
            return rows._replace(losses=rows.losses * 2)

    if impl == "onchip":
        with pytest.raises(RuntimeError, match="this criterion does not declare such a row formula"):
            Doubled(impl=impl)(x, labels)
    else:
        assert_parity(Doubled, impl, x.double(), labels)

    class Renamed(MultiSimilarityLoss):
        pass

    assert Renamed(impl=impl)(x, labels) == MultiSimilarityLoss(impl=impl)(x, labels)
