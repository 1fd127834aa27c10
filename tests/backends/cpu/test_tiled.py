"""The CPU tiles: every edge of every tiled axis, threads, instruction sets, garbage, live lists, determinism.

`make sanitize` runs this file on a build with address and undefined-behaviour checks.
"""

from __future__ import annotations

import pytest
import torch
from conftest import needs_extension
from helpers import (
    CRITERIA,
    FORMULAS,
    PAIR_CRITERIA,
    REFERENCE_CRITERIA,
    assert_as_good_as,
    assert_same,
    assert_same_bits,
    batch,
)

from flashpair import MultiSimilarityLoss, Reduction, row_reduce
from flashpair.backends import extension
from flashpair.backends.cpu import tiled
from flashpair.engine import dispatch
from flashpair.tools.check import value_and_gradient

pytestmark = needs_extension

# 0 and 1; a vector, the band's 64 rows and the 256-row tile, each less one, whole and plus one; several ragged tiles
ROWS = [0, 1, 2, 15, 16, 17, 63, 64, 65, 255, 256, 257, 511, 513, 700]
WIDTHS = [1, 2, 15, 16, 17, 33, 100]


def _both(make, x, labels, y=None, ref_labels=None):
    """Value, gradient and references' gradient of tiled and of the reference, under a random upstream gradient."""
    found = []
    for impl in ("tiled", "reference"):
        a = x.detach().clone().requires_grad_()
        b = None if y is None else y.detach().clone().requires_grad_()
        rows = make(impl=impl, reduction="none")(a, labels, ref_emb=b, ref_labels=ref_labels)
        upstream = torch.randn(rows.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        rows.backward(upstream.to(rows.dtype))
        found.append([rows.detach(), a.grad, *([] if b is None else [b.grad])])
    return zip(*found, strict=True)


@pytest.mark.parametrize("n", ROWS)
@pytest.mark.parametrize("name", CRITERIA)
def test_tile_edges_of_the_batch(name, n):
    x, labels = batch(n, 24, 4, torch.float64, seed=n)
    for found, truth in _both(CRITERIA[name], x, labels):
        assert_same(found, truth)


@pytest.mark.parametrize("d", WIDTHS)
def test_edges_of_the_width(d, rows):
    # 300 points on a circle lie so close that float64 cancellation shows in their distances, in any code
    x, labels = batch(300 if d > 2 else 30, d, 4, torch.float64)
    for name, make in rows.items():
        if d == 1 and make().normalize:
            continue  # normalised numbers are +-1 and have no gradient but rounding
        for found, truth in _both(make, x, labels):
            assert_same(found, truth), name


@pytest.mark.parametrize("m", [0, 1, 255, 256, 257, 1300, 4200])
@pytest.mark.parametrize("n", [1, 63, 64, 257])
def test_tile_edges_of_references(n, m):
    """From 1,024 references on there are several lanes."""
    x, labels = batch(n, 24, 4, torch.float64)
    y, ref_labels = batch(m, 24, max(4, m // 20), torch.float64, seed=1)
    for name in ("MultiSimilarityLoss", "NPairsLoss", "GeneralizedLiftedStructureLoss(distance='euclidean')"):
        for found, truth in _both(CRITERIA[name], x, labels, y, ref_labels):
            assert_same(found, truth)


BY_POSITIVES = ("TripletMarginLoss", "AngularLoss")  # whose work goes with the positives of the largest class


@pytest.mark.parametrize("per_class", [1, 5, 64, 600])
def test_classes_from_single_samples_to_one_class(per_class, rows):
    """The band of positives grows from nothing to all pairs, and moves from narrow tiles to the grid's."""
    for name, make in rows.items():
        if name == "FastAPLoss" and per_class >= 64:
            continue  # rows without a negative have a loss of 0, which is a rounding of 1
        n = 600 if name in PAIR_CRITERIA and not name.startswith((*BY_POSITIVES, "HistogramLoss")) else 70
        x, labels = batch(n, 16, per_class, torch.float64)
        for found, truth in _both(make, x, labels):
            assert_same(found, truth)
        if name in REFERENCE_CRITERIA and not name.startswith(BY_POSITIVES):
            y, ref_labels = batch(n - 20, 16, per_class, torch.float64, seed=1)
            for found, truth in _both(make, x, labels, y, ref_labels):
                assert_same(found, truth)


@pytest.mark.parametrize("noise", [1.0, 0.3, 0.1, 0.03])
def test_mining_that_leaves_many_and_few_pairs(noise):
    """Dense tiles, listed tiles and tiles without a live pair, in one batch."""
    centres = torch.randn(200, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(800) // 4
    x = centres[labels] + noise * torch.randn(800, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for name in ("MultiSimilarityLoss", "LiftedStructureStarLoss(epsilon=0.1)"):
        for found, truth in _both(CRITERIA[name], x, labels):
            assert_same(found, truth)


@pytest.fixture(autouse=True, params=["whole", "by rows"])
def way(request, monkeypatch):
    """Small batches in one call where they can be, and by row reductions."""
    if request.param == "by rows":
        monkeypatch.setattr(dispatch, "WHOLE_PAIRS", -1)
    elif getattr(request.node, "callspec", None) and request.node.callspec.params.get("name", "") in ONE_WAY:
        pytest.skip("has one way, by rows")
    return request.param


@pytest.fixture
def rows(way):
    """The rows of the table that go that way."""
    return CRITERIA if way == "by rows" else FORMULAS


ONE_WAY = set(CRITERIA) - set(FORMULAS)


def test_live_lists_are_used_and_bounded(monkeypatch, way):
    """The sparse backward really runs where few pairs live, and a tile over its capacity is dense instead."""
    if way == "whole":
        pytest.skip("keeps its lists to itself")
    counts = []
    forward = tiled.forward

    def spy(*arguments):
        values, kept = forward(*arguments)
        counts.append(kept.live_count.clone())
        assert kept.live_entry.numel() <= tiled.LIVE_PAIRS_PER_ROW * 800
        return values, kept

    monkeypatch.setattr("flashpair.backends.cpu.tiled.forward", spy)
    centres = torch.randn(200, 16, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(800) // 4
    for noise in (0.4, 1.0):
        x = centres[labels] + noise * torch.randn(800, 16, generator=torch.Generator().manual_seed(1))
        value_and_gradient(MultiSimilarityLoss(impl="tiled"), x, labels)
    assert (counts[0] >= 0).all() and counts[0].sum() > 0
    assert (counts[1] == -1).any()


@pytest.mark.parametrize("name", CRITERIA)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_as_accurate_as_dense_code_of_the_same_precision(name, dtype):
    x, labels = batch(700, 64, 4, dtype)
    truth = value_and_gradient(CRITERIA[name](impl="reference"), x.double(), labels)
    eager = value_and_gradient(CRITERIA[name](impl="reference"), x, labels)
    found = value_and_gradient(CRITERIA[name](impl="tiled"), x, labels)
    assert found[0].dtype == torch.float32 and found[1].dtype == dtype
    for f, e, t in zip(found, eager, truth, strict=True):
        assert_as_good_as(f, e, t)


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_every_instruction_set(isa, rows, monkeypatch):
    if isa not in extension.require().instruction_sets():
        pytest.skip(f"this processor or build has no {isa}")
    monkeypatch.setattr(extension, "instruction_set", lambda: isa)
    for dtype in (torch.float64, torch.float32):
        x, labels = batch(300, 20, 4, dtype)
        for make in rows.values():
            truth = value_and_gradient(make(impl="reference"), x.double(), labels)
            eager = value_and_gradient(make(impl="reference"), x, labels)
            for f, e, t in zip(value_and_gradient(make(impl="tiled"), x, labels), eager, truth, strict=True):
                assert_same(f, t) if dtype == torch.float64 else assert_as_good_as(f, e, t)


def test_without_blas_and_openmp(monkeypatch):
    """What stands in where torch's own cannot be found: plain products and ordinary threads."""
    module = extension.require()
    monkeypatch.setenv("FLASHPAIR_RUNTIME", "builtin")
    from flashpair.backends import runtime

    monkeypatch.setattr(tiled, "INLINE_WORK", 0)
    try:
        runtime.connect(module)
        assert not any(runtime.addresses().values())
        x, labels = batch(600, 20, 4, torch.float64)
        y, ref_labels = batch(500, 20, 4, torch.float64, seed=1)
        for name in ("MultiSimilarityLoss", "NPairsLoss('all_pairs')"):
            for found, truth in _both(CRITERIA[name], x, labels, y, ref_labels):
                assert_same(found, truth)
            for found, truth in _both(CRITERIA[name], x, labels):
                assert_same(found, truth)
    finally:
        monkeypatch.undo()
        runtime.connect(module)


@pytest.mark.parametrize("references", [False, True], ids=["square", "references"])
def test_same_bits_whatever_the_threads_and_every_time(references, monkeypatch):
    monkeypatch.setattr(tiled, "INLINE_WORK", 0)
    x, labels = batch(900, 32, 4, torch.float32)
    y, ref_labels = batch(2100, 32, 8, torch.float32, seed=1)
    more = {"ref_emb": y.requires_grad_(), "ref_labels": ref_labels} if references else {}

    def step():
        x.grad = y.grad = None
        loss = MultiSimilarityLoss(impl="tiled")(x.requires_grad_(), labels, **more)
        loss.backward()
        return [loss.detach(), x.grad, *([y.grad] if references else [])]

    assert_same_bits(step, [1, 2, 3, 7] + [2] * 25)


def test_garbage_in_buffers_never_shows(rows):
    """A pass over NaN leaves NaN in every reused tile buffer, and torch fills what it allocates with NaN."""
    bad = torch.full((700, 24), torch.nan, dtype=torch.float64)
    torch.use_deterministic_algorithms(True)
    try:
        for n in (1, 17, 65, 257):
            x, labels = batch(n, 24, 4, torch.float64)
            for make in rows.values():
                make(impl="tiled")(bad, torch.arange(700) // 4)
                for found, truth in _both(make, x, labels):
                    assert_same(found, truth)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("n", [37, 100, 120])
def test_garbage_in_buffers_never_shows_in_learnable_scales(n):
    """The lanes past a tile's last column hold what the buffer held, NaN for one."""
    x, labels = batch(n, 16, 4, torch.float32)
    grads = []
    for before in (None, torch.nan):
        if before is not None:
            MultiSimilarityLoss(impl="tiled", epsilon=None)(torch.full((128, 16), before), torch.arange(128) // 4)
        for epsilon in (None, 0.1):
            alpha, beta = (torch.nn.Parameter(torch.tensor(v)) for v in (2.0, 50.0))
            MultiSimilarityLoss(alpha, beta, epsilon=epsilon, impl="tiled")(x, labels).backward()
            scale = torch.tensor(1.5, requires_grad=True)
            row_reduce(x, labels, Reduction("sum", "negatives", "softplus", scale=scale))[0].sum().backward()
            grads.append([alpha.grad, beta.grad, scale.grad])
    assert torch.equal(torch.tensor(grads[:2]), torch.tensor(grads[2:]))
    assert torch.tensor(grads).isfinite().all()


def test_what_the_caller_holds_is_not_written():
    x, labels = batch(300, 16, 4, torch.float32)
    y, ref_labels = batch(400, 16, 4, torch.float32, seed=1)
    held = [x, labels, y, ref_labels]
    before = [t.clone() for t in held]
    x.requires_grad_()
    MultiSimilarityLoss(impl="tiled")(x, labels, ref_emb=y, ref_labels=ref_labels).backward()
    assert all(torch.equal(t.detach(), b) for t, b in zip(held, before, strict=True))


def test_slices_and_strides():
    wide, labels = batch(301, 50, 4, torch.float64)
    views = {"columns": wide[:, ::2], "rows": wide[1:], "transposed": wide.T.contiguous().T, "inner": wide[:, 3:20]}
    for what, view in views.items():
        own = labels[-view.shape[0] :]
        found = value_and_gradient(MultiSimilarityLoss(impl="tiled"), view, own)
        truth = value_and_gradient(MultiSimilarityLoss(impl="reference"), view.clone(), own)
        for f, t in zip(found, truth, strict=True):
            assert_same(f, t), what


@pytest.mark.parametrize("want", [(True, False), (False, True), (True, True)], ids=str)
def test_only_the_gradients_that_are_asked_for(want):
    x, labels = batch(300, 16, 4, torch.float64)
    y, ref_labels = batch(500, 16, 4, torch.float64, seed=1)
    grads = []
    for impl in ("tiled", "reference"):
        a, b = x.clone().requires_grad_(want[0]), y.clone().requires_grad_(want[1])
        MultiSimilarityLoss(impl=impl)(a, labels, ref_emb=b, ref_labels=ref_labels).backward()
        assert (a.grad is not None, b.grad is not None) == want
        grads.append([g for g in (a.grad, b.grad) if g is not None])
    for found, truth in zip(*grads, strict=True):
        assert_same(found, truth)


def test_no_gradient_keeps_nothing_for_backward(monkeypatch, way):
    if way == "whole":
        pytest.skip("keeps a gradient or nothing")
    kept = []
    forward = tiled.forward
    monkeypatch.setattr("flashpair.backends.cpu.tiled.forward", lambda *a: kept.append(forward(*a)) or kept[-1])
    x, labels = batch(300, 16, 4, torch.float32)
    with torch.no_grad():
        MultiSimilarityLoss(impl="tiled")(x.requires_grad_(), labels)
    MultiSimilarityLoss(impl="tiled")(x.detach(), labels)
    assert kept and all(sum(t.numel() for t in k) == 0 for _, k in kept)


def test_extremes_over_lanes():
    """A few anchors against many references: the lanes' extremes merge to the same reference as in one piece."""
    x, labels = batch(5, 8, 1, torch.float64)
    y, ref_labels = batch(5000, 8, 10, torch.float64, seed=1)
    y[1000:3000:7] = y[4999]  # equal extremes far apart
    grads = []
    for impl in ("tiled", "reference"):
        a, b = x.clone().requires_grad_(), y.clone().requires_grad_()
        rows = row_reduce(
            a, labels, Reduction("max", "negatives"), Reduction("min", "negatives"), ref_emb=b, ref_labels=ref_labels,
            impl=impl,
        )  # fmt: skip
        sum(r.sum() for r in rows).backward()
        grads.append((*rows, a.grad, b.grad))
    for found, truth in zip(*grads, strict=True):
        assert_same(found.detach(), truth.detach())
