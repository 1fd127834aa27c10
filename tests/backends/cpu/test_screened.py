"""Screening is the full computation, and knows when to stop (its bound: test_screen_bound.py).

`make sanitize` runs this file on a build with address and undefined-behaviour checks.
"""

from __future__ import annotations

import itertools
import math

import golden
import pytest
import torch
from conftest import needs_extension
from helpers import CRITERIA, assert_as_good_as, assert_same, assert_same_bits, batch, gradients

import flashpair
from flashpair import Bound, MultiSimilarityLoss, Reduction, make_pairs, row_reduce
from flashpair.backends import extension
from flashpair.backends.cpu import screened, tiled
from flashpair.core.call import compile_call, encode
from flashpair.core.label_order import make_label_order
from flashpair.engine import dispatch
from flashpair.losses.mining import _mined
from flashpair.tools.check import value_and_gradient

pytestmark = needs_extension

FORMS = [("logsumexp", "identity"), ("sum", "identity"), ("sum", "softplus"), ("sum", "hinge"), ("count", "identity")]
FORMS += [("min", "identity"), ("max", "identity")]
HIGHEST = Reduction("max", "negatives")
MINED = ["MultiSimilarityLoss", "LiftedStructureStarLoss(epsilon=0.1)"]


@pytest.fixture(autouse=True)
def by_rows(monkeypatch):
    monkeypatch.setattr(dispatch, "WHOLE_PAIRS", -1)


def _reduction(op, transform, side, window, z, sign, generator):
    """A reduction whose window or hinge lets a few of the pairs `z` (N, M) through, and what wants a gradient."""
    n = z.shape[0]

    def quantile(of):
        return (z.detach().quantile(of, dim=1) + 1e-3 * torch.randn(n, generator=generator, dtype=z.dtype)).clone()

    options = {}
    if transform.endswith("hinge"):
        corner = quantile({"lower": 0.985, "upper": 0.015, "both": 0.5}.get(window, 0.5 + 0.48 * sign))
        options = {"scale": torch.tensor(0.7 * sign, dtype=z.dtype), "offset": -0.7 * sign * corner}
    elif op in ("logsumexp", "sum"):
        options = {"scale": torch.tensor(0.3, dtype=z.dtype), "offset": torch.randn(n, generator=generator).to(z.dtype)}
    learn = [t.requires_grad_() for t in options.values()]
    if window in ("lower", "both"):
        options["lower"] = quantile(0.98 if window == "lower" else 0.49)
    if window in ("upper", "both"):
        options["upper"] = quantile(0.02 if window == "upper" else 0.51)
    return Reduction(op, side, transform, **options), learn


def _similarities(x, y, distance):
    refs = x if y is None else y
    z = x @ refs.T if distance == "dot" else torch.cdist(x, refs)
    return (z.square() if distance == "squared_euclidean" else z).detach()


def _compare(x, labels, y, ref_labels, reductions, learn, distance):
    """Values and gradients of a screened call and of the reference, in float64; and what the screen did."""
    inputs = [x.requires_grad_(), *([] if y is None else [y.requires_grad_()]), *learn]
    with flashpair.screening() as seen:
        found = row_reduce(x, labels, *reductions, ref_emb=y, ref_labels=ref_labels, distance=distance, impl="screened")
    truth = row_reduce(x, labels, *reductions, ref_emb=y, ref_labels=ref_labels, distance=distance, impl="reference")
    for f, t in zip(found, truth, strict=True):
        assert_same(f.detach(), t.detach())
    found, truth = (tuple(torch.where(r.isfinite(), r, 0.0) for r in rows) for rows in (found, truth))
    for f, t in zip(gradients(found, inputs), gradients(truth, inputs), strict=True):
        assert_same(f, t)
    return seen


@pytest.mark.parametrize("distance", ["dot", "euclidean"])
@pytest.mark.parametrize("references", [False, True], ids=["square", "references"])
@pytest.mark.parametrize("side", ["negatives", "all"])
@pytest.mark.parametrize("window", ["lower", "upper", "both"])
@pytest.mark.parametrize(("op", "transform"), FORMS, ids=lambda word: word)
def test_equals_the_reference(op, transform, window, side, references, distance):
    generator = torch.Generator().manual_seed(FORMS.index((op, transform)))
    x, labels = batch(300, 5, 4, torch.float64)
    y, ref_labels = batch(410, 5, 3, torch.float64, seed=1) if references else (None, None)
    for sign in (1, -1) if transform == "hinge" else (1,):
        r, learn = _reduction(op, transform, side, window, _similarities(x, y, distance), sign, generator)
        seen = _compare(x, labels, y, ref_labels, [r], learn, distance)
        assert seen.candidates > 0


@pytest.mark.parametrize("distance", ["dot", "euclidean"])
@pytest.mark.parametrize("sign", [1, -1])
def test_hinges_and_extremes_without_a_window(sign, distance):
    generator = torch.Generator().manual_seed(0)
    x, labels = batch(700, 5, 4, torch.float64)
    y, ref_labels = batch(900, 5, 3, torch.float64, seed=1)
    for more in ((None, None), (y, ref_labels)):
        z = _similarities(x, more[0], distance)
        hinge, learn = _reduction("sum", "hinge", "negatives", "", z, sign, generator)
        assert _compare(x, labels, *more, [hinge], learn, distance).candidates > 0
        extreme = Reduction("max" if sign > 0 else "min", "negatives")
        seen = _compare(x, labels, *more, [extreme], [], distance)
        assert seen.whole < seen.tiles, "later tiles have few pairs that reach the extreme of the earlier ones"


@pytest.mark.parametrize("transform", ["hinge", "squared_hinge"])
@pytest.mark.parametrize("sign", [1, -1])
def test_hinges_of_squared_distances(sign, transform):
    generator = torch.Generator().manual_seed(0)
    x, labels = batch(500, 5, 4, torch.float64)
    y, ref_labels = batch(600, 5, 3, torch.float64, seed=1)
    for more in ((None, None), (y, ref_labels)):
        z = _similarities(x, more[0], "squared_euclidean")
        hinge, learn = _reduction("sum", transform, "negatives", "", z, sign, generator)
        seen = _compare(x, labels, *more, [hinge], learn, "squared_euclidean")
        assert 0 < seen.live < seen.pairs


def test_several_reductions_share_one_list():
    generator = torch.Generator().manual_seed(0)
    x, labels = batch(500, 5, 4, torch.float64)
    forms = [
        ("sum", "hinge", ""),
        ("logsumexp", "identity", "lower"),
        ("sum", "softplus", "lower"),
        ("max", "identity", ""),
    ]
    z = _similarities(x, None, "dot")
    made = [_reduction(op, transform, "negatives", w, z, 1, generator) for op, transform, w in forms]
    seen = _compare(x, labels, None, None, [r for r, _ in made], [t for _, learn in made for t in learn], "dot")
    assert 0 < seen.live <= seen.candidates <= seen.pairs and 0 < seen.live_share < 0.1


@pytest.mark.parametrize("per_row", [1, 20, 512])
def test_tiles_that_are_listed_and_tiles_that_are_not(per_row, monkeypatch):
    """A list that is too small: such a tile is computed whole, forward and backward, beside others."""
    monkeypatch.setattr(tiled, "SCREENED_PAIRS_PER_ROW", per_row)
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(200, 5, generator=generator, dtype=torch.float64)
    labels = torch.arange(900) // 4
    x = centres[labels % 200] * (labels[:, None] < 60) + 0.5 * torch.randn(900, 5, generator=generator).double()
    lower = torch.tensor(1.5, dtype=torch.float64)
    reductions = [Reduction("logsumexp", "negatives", lower=lower), Reduction("max", "negatives", lower=lower)]
    seen = _compare(x, labels, None, None, reductions, [], "dot")
    assert 0 < seen.whole < seen.tiles


def test_it_stops_where_too_many_pairs_live():
    x, labels = batch(2400, 8, 4, torch.float32)
    sparse, dense = torch.tensor(9.0), torch.tensor(0.0)
    for lower, screens in ((sparse, True), (dense, False)):
        with flashpair.screening() as seen:
            row_reduce(x, labels, Reduction("sum", "negatives", lower=lower), impl="screened")
        assert (seen.tiles > 0) == screens


@pytest.mark.parametrize("name", MINED)
@pytest.mark.parametrize("n", [0, 1, 2, 127, 128, 129, 255, 257, 700])
def test_tile_edges_of_the_batch(name, n):
    x, labels = batch(n, 24, 4, torch.float64, seed=n)
    y, ref_labels = batch(2 * n + 3, 24, 4, torch.float64, seed=1)
    for more in ({}, {"ref_emb": y, "ref_labels": ref_labels}):
        rows = []
        for impl in ("screened", "reference"):
            a = x.clone().requires_grad_()
            loss = CRITERIA[name](impl=impl, reduction="none")(a, labels, **more)
            upstream = torch.randn(n, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
            rows.append((loss.detach(), *torch.autograd.grad(loss, a, upstream)))
        for found, truth in zip(*rows, strict=True):
            assert_same(found, truth)


@pytest.mark.parametrize("d", [1, 2, 3, 4, 5, 15, 16, 17, 63, 65, 257])
def test_edges_of_the_width(d):
    generator = torch.Generator().manual_seed(d)
    x, labels = batch(300, d, 4, torch.float64)
    lower = (x @ x.T).quantile(0.97, dim=1).detach() + 1e-3 * torch.rand(300, generator=generator, dtype=torch.float64)
    _compare(x, labels, None, None, [Reduction("logsumexp", "negatives", lower=lower)], [], "dot")


@pytest.mark.parametrize("per_class", [1, 5, 100, 600])
def test_classes_from_single_samples_to_one_class(per_class):
    x, labels = batch(600, 16, per_class, torch.float64)
    for name in MINED:
        truth = value_and_gradient(CRITERIA[name](impl="reference"), x, labels)
        for f, t in zip(value_and_gradient(CRITERIA[name](impl="screened"), x, labels), truth, strict=True):
            assert_same(f, t)


@pytest.mark.parametrize("end", [0, 5, 128, 200, 300])
def test_references_past_the_end_take_no_part(end):
    x, labels = batch(150, 8, 4, torch.float64)
    y, ref_labels = batch(300, 8, 4, torch.float64, seed=1)
    pairs = make_pairs(x, labels, ref_emb=y, ref_labels=ref_labels, impl="screened")
    pairs.label_order = pairs.label_order._replace(end=torch.tensor(end))
    r = Reduction("sum", "all", lower=torch.tensor(1.0, dtype=torch.float64))
    (found,), (truth,) = pairs.reduce(r), pairs.dense().reduce(r)
    assert_same(found, truth)


@pytest.mark.parametrize("name", MINED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_as_accurate_as_dense_code_of_the_same_precision(name, dtype):
    centres = torch.randn(175, 64, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(700) // 4
    x = (centres[labels] + torch.randn(700, 64, generator=torch.Generator().manual_seed(1))).to(dtype)
    truth = value_and_gradient(CRITERIA[name](impl="reference"), x.double(), labels)
    eager = value_and_gradient(CRITERIA[name](impl="reference"), x, labels)
    for f, e, t in zip(value_and_gradient(CRITERIA[name](impl="screened"), x, labels), eager, truth, strict=True):
        assert_as_good_as(f, e, t)


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512", "avx512vnni"])
@pytest.mark.parametrize("d", [20, 129])
def test_every_instruction_set(isa, d, monkeypatch):
    if isa not in extension.require().instruction_sets():
        pytest.skip(f"this processor or build has no {isa}")
    monkeypatch.setattr(extension, "instruction_set", lambda: isa)
    x, labels = batch(500, d, 4, torch.float64)
    for sign, distance in itertools.product((1, -1), ("dot", "euclidean")):
        z = torch.cdist(x, x) if distance == "euclidean" else x @ x.T
        lower = z.detach().quantile(0.98 if sign > 0 else 0.02, dim=1)
        r = Reduction("logsumexp", "negatives", **{"lower" if sign > 0 else "upper": lower + sign * 1e-6})
        assert _compare(x, labels, None, None, [r], [], distance).candidates > 0


@pytest.mark.parametrize("references", [False, True], ids=["square", "references"])
def test_same_bits_whatever_the_threads_and_every_time(references, monkeypatch):
    monkeypatch.setattr(tiled, "INLINE_WORK", 0)
    x, labels = batch(900, 32, 4, torch.float32)
    y, ref_labels = batch(2100, 32, 8, torch.float32, seed=1)
    more = {"ref_emb": y.requires_grad_(), "ref_labels": ref_labels} if references else {}
    x.requires_grad_()

    def step():
        x.grad = y.grad = None
        (hardest,) = row_reduce(x, labels, Reduction("max", "negatives"), impl="screened", **more)
        loss = MultiSimilarityLoss(impl="screened", epsilon=0.0)(x, labels, **more) + hardest.sum()
        loss.backward()
        return [loss.detach(), x.grad, *([y.grad] if references else [])]

    assert_same_bits(step, [1, 2, 3, 7] + [2] * 10)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_reaches_every_row(value):
    x, labels = batch(300, 8, 4, torch.float32)
    x[7, 3] = value
    for impl in ("screened", "reference"):
        rows = row_reduce(x, labels, Reduction("max", "negatives"), Reduction("sum", "negatives", "hinge"), impl=impl)
        assert all(row.isnan().all() for row in rows)
        loss, gradient = value_and_gradient(MultiSimilarityLoss(impl=impl), x, labels)
        assert loss.isnan() and gradient.isnan().any()


def test_equal_extremes_send_their_gradient_to_the_lowest_index():
    x, labels = batch(400, 8, 1, torch.float32)
    x[350:] = x[100:150]  # in other tiles than their twins
    order = torch.randperm(400, generator=torch.Generator().manual_seed(0))
    x, found = x[order], []
    for impl in ("screened", "reference"):
        a = x.clone().requires_grad_()
        (rows,) = row_reduce(a, labels, Reduction("max", "negatives"), impl=impl)
        found.append(torch.autograd.grad(rows[37], a)[0])
    assert torch.allclose(*found, atol=1e-6)


def test_gradcheck():
    x, labels = batch(9, 3, 2, torch.float64)
    offset = torch.full((9,), -0.1, dtype=torch.float64, requires_grad=True)
    scale = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)

    def rows(x, scale, offset):
        r = Reduction("sum", "negatives", "hinge", scale=scale, offset=offset)
        return row_reduce(x, labels, r, impl="screened")[0]

    assert torch.autograd.gradcheck(rows, (x.requires_grad_(), scale, offset))
    assert torch.autograd.gradgradcheck(rows, (x, scale, offset))


ORACLE = golden.load()


@pytest.mark.parametrize(
    "case",
    [c for c in ORACLE["cases"] if c["loss"] in ("ms", "lifted_star_m") and c["params"]["eps"] is not None],
    ids=lambda c: f"{c['loss']}-{c['batch']}",
)
def test_the_oracle(case):
    criterion = golden.criterion_for(case, ORACLE)
    criterion.impl = "screened"
    x, labels = golden.batch(case, ORACLE)
    loss = criterion(x.requires_grad_(), labels)
    loss.backward()
    assert abs(loss.item() - case["value"]) <= 1e-10
    assert (x.grad - golden.gradient(case)).abs().max().item() <= 1e-10


@pytest.mark.parametrize("impl", ["screened", "auto"])
def test_one_graph(impl, monkeypatch, recwarn):
    monkeypatch.setattr(screened, "WORTH_PAIRS", 1)
    x, labels = batch(300, 32, 4, torch.float32)
    criterion = MultiSimilarityLoss(impl=impl)
    truth = value_and_gradient(criterion, x, labels)
    compiled = torch.compile(criterion, fullgraph=True, dynamic=False)
    for f, t in zip(value_and_gradient(compiled, x, labels), truth, strict=True):
        assert torch.allclose(f, t, rtol=1e-5, atol=1e-8)
    assert not [w for w in recwarn if "Dynamo" in str(w.message)]


def test_opcheck():
    x, labels = batch(300, 32, 4, torch.float32)
    p = make_label_order(labels)
    call = compile_call(_mined(2.0, 50.0, 0.1), "dot", "screened")
    arguments = (x[p.order], None, p.lo, p.hi, None, p.ref_order, None, [], *encode(call), True)
    torch.library.opcheck(torch.ops.flashpair.row_reduce, arguments, test_utils=("test_schema", "test_faketensor"))


def test_screening_counts_in_every_open_block_and_live_pairs_with_gradients():
    x, labels = batch(600, 32, 4, torch.float32)
    criterion = MultiSimilarityLoss(impl="screened")
    with flashpair.screening() as outer, flashpair.screening() as inner:
        criterion(x, labels)
    assert outer.tiles == inner.tiles > 0 and math.isnan(outer.live_share)
    with flashpair.screening() as seen:
        criterion(x.requires_grad_(), labels)
    assert seen.pairs >= seen.candidates >= seen.live


@pytest.mark.parametrize(
    ("reductions", "words"),
    [
        ([Reduction("logsumexp", "negatives")], r"reductions\[0\] \(logsumexp\) has none"),
        ([Reduction("min", "positives")], "over the negatives or all pairs"),
        ([Reduction("min", "negatives"), Reduction("max", "negatives")], "minima or maxima, not both"),
        ([Reduction("max", "all"), Reduction("max", "negatives")], "not both in one call"),
        (
            [HIGHEST, Reduction("count", "negatives", lower=Bound(HIGHEST))],
            r"of the same pairs, as reductions\[1\] has",
        ),
    ],
)
def test_a_call_that_cannot_be_screened_is_refused_with_its_reasons(reductions, words):
    x, labels = batch(40, 4, 4, torch.float32)
    with pytest.raises(RuntimeError, match=f"impl='screened' cannot run: .*{words}"):
        row_reduce(x, labels, *reductions, impl="screened")
    row_reduce(x, labels, *reductions, impl="auto")


def test_auto_screens_what_it_can_and_a_named_schedule_is_not_replaced(monkeypatch):
    x, labels = batch(600, 32, 4, torch.float32)
    monkeypatch.setattr(screened, "WORTH_PAIRS", 1)
    for impl, epsilon, screens in (("auto", 0.1, True), ("tiled", 0.1, False), ("auto", None, False)):
        with flashpair.screening() as seen:
            MultiSimilarityLoss(impl=impl, epsilon=epsilon)(x, labels)
        assert (seen.tiles > 0) == screens
