"""The row-reduction primitive: every reduction, side, transform, window and distance, tiled against the reference."""

from __future__ import annotations

import itertools
import zlib

import pytest
import torch
from helpers import FORMS, MAPPED, WITH_GRADIENT, assert_same, batch, gradients
from hypothesis import given, settings
from hypothesis import strategies as st

from flashpair import Bound, Reduction, row_reduce

DISTANCES = ["dot", "euclidean", "squared_euclidean"]
WINDOWS = ["open", "lower", "upper", "both"]


def _reduction(op, transform, side, window, n, m, generator):
    """A random reduction of that form, and the tensors in it that want a gradient."""

    def vector(size):
        return torch.randn(size, generator=generator, dtype=torch.float64)

    if (op, transform) == MAPPED:
        return Reduction(op, side, transform, scale=3.0, offset=0.5), []
    options, learn = {}, []
    if op in ("logsumexp", "sum"):
        options["scale"] = (vector(()) + 3).requires_grad_()
        options["offset"] = vector(n).requires_grad_()
        learn += [options["scale"], options["offset"]]
    if transform == "lifted":
        options["ref_offset"] = vector(m).requires_grad_()
        learn.append(options["ref_offset"])
    if window in ("lower", "both"):
        options["lower"] = vector(n) - 1
    if window in ("upper", "both"):
        options["upper"] = vector(n) + 1
    return Reduction(op, side, transform, **options), learn


def _compare(x, labels, y, ref_labels, reductions, learn, distance="dot"):
    inputs = [x, *([] if y is None else [y]), *learn]
    found, truth = (
        row_reduce(x, labels, *reductions, ref_emb=y, ref_labels=ref_labels, distance=distance, impl=impl)
        for impl in ("tiled", "reference")
    )
    for f, t in zip(found, truth, strict=True):
        assert_same(f.detach(), t.detach())
    found, truth = (tuple(torch.where(r.isfinite(), r, 0.0) for r in rows) for rows in (found, truth))
    for f, t in zip(gradients(found, inputs), gradients(truth, inputs), strict=True):
        assert_same(f, t)


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("references", [False, True], ids=["square", "references"])
@pytest.mark.parametrize("side", ["positives", "negatives", "all"])
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize(("op", "transform"), FORMS, ids=lambda word: word)
def test_equals_the_reference(op, transform, window, side, references, distance):
    generator = torch.Generator().manual_seed(zlib.crc32(repr((op, transform, window, side)).encode()) % 1000)
    x, labels = batch(70, 5, 4, torch.float64)
    y, ref_labels = batch(83, 5, 3, torch.float64, seed=1)
    x.requires_grad_()
    m = 83 if references else 70
    r, learn = _reduction(op, transform, side, window, 70, m, generator)
    if references:
        _compare(x, labels, y.requires_grad_(), ref_labels, [r], learn, distance)
    else:
        _compare(x, labels, None, None, [r], learn, distance)


@settings(max_examples=60, deadline=None)
@given(
    n=st.sampled_from([0, 1, 2, 3, 17, 64, 65, 130, 257]),
    m=st.sampled_from([None, 0, 1, 5, 64, 300]),
    d=st.sampled_from([1, 2, 7, 16, 33]),
    classes=st.sampled_from([1, 2, 3, 20, 1000]),
    forms=st.lists(st.sampled_from(list(itertools.product(FORMS, WINDOWS))), min_size=1, max_size=4),
    sides=st.lists(st.sampled_from(["positives", "negatives", "all"]), min_size=4, max_size=4),
    huge=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_any_shape_and_labels(n, m, d, classes, forms, sides, huge, seed):
    generator = torch.Generator().manual_seed(seed)
    spread = 2**61 if huge else 1
    x = torch.randn(n, d, generator=generator, dtype=torch.float64).requires_grad_()
    labels = (torch.randint(classes, (n,), generator=generator) - classes // 2) * (spread // classes if huge else 1)
    y = ref_labels = None
    if m is not None:
        y = torch.randn(m, d, generator=generator, dtype=torch.float64).requires_grad_()
        ref_labels = (torch.randint(classes, (m,), generator=generator) - classes // 2) * (
            spread // classes if huge else 1
        )
    reductions, learn = [], []
    for ((op, transform), window), side in zip(forms, sides, strict=False):
        r, more = _reduction(op, transform, side, window, n, n if m is None else m, generator)
        reductions.append(r)
        learn += more
    _compare(x, labels, y, ref_labels, reductions, learn)


@pytest.mark.parametrize(("op", "transform"), WITH_GRADIENT, ids=lambda word: word)
@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("references", [False, True], ids=["square", "references"])
def test_gradcheck(op, transform, distance, references):
    """Values against finite differences, in every differentiable input at once, and second derivatives."""
    generator = torch.Generator().manual_seed(3)
    x, labels = batch(7, 3, 2, torch.float64)
    y, ref_labels = batch(6, 3, 2, torch.float64, seed=1)
    m = 6 if references else 7
    scale = torch.tensor(0.7, dtype=torch.float64)
    offset = torch.randn(7, generator=generator, dtype=torch.float64)
    ref_offset = torch.randn(m, generator=generator, dtype=torch.float64)

    def rows(x, y, scale, offset, ref_offset):
        lifted = {"ref_offset": ref_offset} if transform == "lifted" else {}
        if (op, transform) == MAPPED:
            scale, offset = 0.7, -0.2
        r = Reduction(op, "negatives", transform, scale=scale, offset=offset, **lifted)
        ref = {"ref_emb": y, "ref_labels": ref_labels} if references else {}
        (row,) = row_reduce(x, labels, r, distance=distance, impl="tiled", **ref)
        return torch.where(row.isfinite(), row, 0.0)

    inputs = [t.clone().requires_grad_() for t in (x, y, scale, offset, ref_offset)]
    assert torch.autograd.gradcheck(rows, inputs)
    assert torch.autograd.gradgradcheck(rows, inputs)


def test_bounds_run_in_stages_and_equal_separate_calls():
    x, labels = batch(300, 6, 4, torch.float64)
    lowest = Reduction("min", "positives", detach=True)
    bound = Bound(lowest, -0.25)
    staged = row_reduce(x, labels, lowest, Reduction("logsumexp", "negatives", lower=bound), impl="tiled")
    (low,) = row_reduce(x, labels, lowest, impl="tiled")
    (apart,) = row_reduce(x, labels, Reduction("logsumexp", "negatives", lower=low - 0.25), impl="tiled")
    assert torch.equal(staged[0], low)
    assert torch.equal(staged[1], apart)


def test_a_bound_must_stand_before():
    x, labels = batch(8, 3, 2, torch.float64)
    lowest = Reduction("min", "positives", detach=True)
    late = Reduction("sum", "negatives", lower=Bound(lowest))
    for impl in ("tiled", "reference"):
        with pytest.raises(ValueError, match="must be bound to an earlier reduction"):
            row_reduce(x, labels, late, lowest, impl=impl)


@pytest.mark.parametrize("impl", ["tiled", "reference"])
@pytest.mark.parametrize("op", ["min", "max"])
def test_equal_extremes_send_their_gradient_to_the_lowest_index(op, impl):
    x = torch.tensor([[1.0, 0.0], [0.5, 0.5], [0.5, 0.5], [0.5, 0.5]], dtype=torch.float64)
    labels = torch.tensor([5, 9, 1, 3])  # sorted, the lowest index among the equal ones comes last
    x.requires_grad_()
    (row,) = row_reduce(x, labels, Reduction(op, "negatives"), impl=impl)
    (grad,) = torch.autograd.grad(row[0], x)
    assert torch.equal(grad[1], torch.tensor([1.0, 0.0], dtype=torch.float64))
    assert not grad[2:].any()


def test_duplicates_are_pairs_and_self_is_not():
    x = torch.ones(3, 2, dtype=torch.float64)
    count, total = row_reduce(
        x, torch.tensor([4, 4, 4]), Reduction("count", "positives"), Reduction("sum", "positives"), impl="tiled"
    )
    assert count.tolist() == [2, 2, 2]
    assert total.tolist() == [4, 4, 4]


@pytest.mark.parametrize(
    ("arguments", "options", "words"),
    [
        (("mean", "positives"), {}, "op must be one of logsumexp, sum"),
        (("sum", "friends"), {}, "side must be one of positives, negatives, all"),
        (("sum", "all", "cube"), {}, "transform must be one of"),
        (("max", "all", "hinge"), {}, "goes with op 'sum' or 'logsumexp'"),
        (("logsumexp", "all", "lifted"), {"ref_offset": torch.zeros(3)}, "goes with op 'sum', got"),
        (("logsumexp", "all", "hinge"), {"lower": 0.0}, "takes no window"),
        (("logsumexp", "all", "hinge"), {"scale": torch.ones(())}, "takes numbers as scale"),
        (("min", "all"), {"scale": 2.0}, "takes no scale"),
        (("sum", "all", "lifted"), {"offset": torch.zeros(3)}, "ref_offset must be given with transform 'lifted'"),
        (("sum", "all"), {"ref_offset": torch.zeros(3)}, "ref_offset must be given with transform 'lifted'"),
    ],
)
def test_what_a_reduction_cannot_be(arguments, options, words):
    with pytest.raises(ValueError, match=words):
        Reduction(*arguments, **options)


def test_vectors_of_another_length_are_named():
    x, labels = batch(8, 3, 2, torch.float64)
    with pytest.raises(ValueError, match=r"lower of reductions\[0\] must have shape"):
        row_reduce(x, labels, Reduction("sum", "all", lower=torch.zeros(7)))
    with pytest.raises(ValueError, match=r"ref_offset of reductions\[0\] must have shape"):
        lifted = Reduction("sum", "all", "lifted", offset=torch.zeros(8), ref_offset=torch.zeros(9))
        row_reduce(x, labels, lifted)


def test_a_bound_takes_no_offset_and_a_scale_no_shape():
    x, labels = batch(8, 3, 2, torch.float64)
    shifted = Reduction("logsumexp", "positives", offset=torch.ones(8))
    with pytest.raises(ValueError, match="bound to a reduction with an offset"):
        row_reduce(x, labels, shifted, Reduction("count", "negatives", lower=Bound(shifted)))
    with pytest.raises(ValueError, match=r"scale must be a number or a tensor of shape \(\)"):
        Reduction("sum", "all", scale=torch.ones(8))
    assert Reduction("min", "all", scale=1).scale == 1


@pytest.mark.parametrize("impl", ["tiled", "reference"])
@pytest.mark.parametrize("op", ["logsumexp", "sum", "max"])
def test_detach_is_of_the_whole_row(op, impl):
    x, labels = batch(8, 3, 2, torch.float64)
    options = {} if op == "max" else {"scale": torch.ones((), requires_grad=True)}
    options |= {} if op == "max" else {"offset": torch.ones(8, requires_grad=True)}
    (row,) = row_reduce(x.requires_grad_(), labels, Reduction(op, "negatives", detach=True, **options), impl=impl)
    assert not row.requires_grad


@pytest.mark.parametrize("impl", ["tiled", "reference"])
@pytest.mark.parametrize("op", ["logsumexp", "sum"])
def test_the_embeddings_decide_the_dtype(op, impl):
    x, labels = batch(8, 3, 2, torch.float32)
    r = Reduction(op, "negatives", scale=torch.ones((), dtype=torch.float64), offset=torch.ones(8, dtype=torch.float64))
    assert row_reduce(x, labels, r, impl=impl)[0].dtype == torch.float32
    assert row_reduce(x, labels, r, ref_emb=x.double(), ref_labels=labels, impl=impl)[0].dtype == torch.float64


@pytest.mark.parametrize("impl", ["tiled", "reference"])
def test_not_finite_embeddings_reach_every_row_and_an_offset_only_its_own(impl):
    x, labels = batch(12, 3, 2, torch.float64)
    scale = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    offset = torch.zeros(12, dtype=torch.float64, requires_grad=True)

    def total(x, offset):
        lower = torch.tensor(0.1, dtype=torch.float64)
        r = Reduction("sum", "negatives", "softplus", scale=scale, offset=offset, lower=lower)
        return row_reduce(x, labels, r, impl=impl)[0]

    bad = x.clone()
    bad[3, 1] = torch.nan
    assert total(bad, offset).isnan().all()
    assert torch.autograd.grad(total(bad.requires_grad_(), offset).sum(), bad)[0].isnan().any()
    shifted = torch.zeros(12, dtype=torch.float64)
    shifted[labels.argsort()[0]] = torch.nan
    assert total(x, shifted).isnan().sum() <= 1


def test_pairs_of_ones_own_check_their_input():
    from flashpair import make_pairs

    x, labels = batch(40, 3, 2, torch.float32)
    with pytest.raises(ValueError, match="labels must have shape"):
        make_pairs(x, labels[:10])
    with pytest.raises(ValueError, match="ref_labels must be given with ref_emb"):
        make_pairs(x, labels, ref_emb=x)
    with pytest.raises(ValueError, match="distance must be one of"):
        make_pairs(x, labels, distance="l1")


def test_tracing_records_the_registered_ops():
    from torch.fx.experimental.proxy_tensor import make_fx

    x, labels = batch(40, 3, 2, torch.float32)
    (truth,) = row_reduce(x, labels, Reduction("logsumexp", "negatives"), impl="tiled")
    traced = make_fx(lambda t: row_reduce(t, labels, Reduction("logsumexp", "negatives"), impl="tiled")[0])(x)
    for _ in range(3):
        assert torch.equal(traced(x), truth)
