"""The Triton kernels through the interpreter: every edge of every tiled axis, windows, splits, live tiles, slabs.

`fused` and the GPU's `tiled` are held to the float64 reference; on a machine with a GPU test_gpu.py
runs the compiled kernels instead.
"""

from __future__ import annotations

import math

import pytest
import torch
from helpers import (
    CRITERIA,
    FORMULAS,
    MAPPED,
    REFERENCE_CRITERIA,
    WITH_GRADIENT,
    assert_as_good_as,
    assert_same,
    batch,
    forms,
    gradients,
)

import flashpair
from flashpair import Bound, MultiSimilarityLoss, Reduction, row_reduce
from flashpair.engine.dispatch import interpreted
from flashpair.tools.check import value_and_gradient

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(
    not interpreted(), reason="there is a GPU: tests/backends/triton/test_gpu.py runs the kernels"
)

if interpreted():
    from flashpair.backends.triton.kernels import configs

    from flashpair.backends.triton import launch, launcher, shared_top, tiled
    from flashpair.core.problem import Operands, Problem
    from flashpair.engine import row_reduce_op

    TILES = {
        "one chunk": configs.Config(32, 16, 64, 64, (4, 1), (4, 1)),
        "square tiles, many chunks": configs.Config(16, 16, 16, 16, (4, 1), (4, 1)),
        "chunks, one slab": configs.Config(32, 32, 16, 64, (4, 1), (4, 1)),
    }
else:
    TILES = {}


@pytest.fixture
def tiles(request, monkeypatch):
    """Runs the engine with one of TILES."""
    config = TILES[getattr(request, "param", "one chunk")]

    def choose(family, dtype, d):
        widest = configs.power_of_two(d)
        return config._replace(depth=min(config.depth, widest), slab=min(config.slab, widest))

    monkeypatch.setattr(configs, "choose", choose)
    return config


@pytest.fixture
def schedule(request, monkeypatch):
    """`fused`, or `tiled` in its place with blocks of two tiles."""
    if request.param == "tiled":
        monkeypatch.setattr(row_reduce_op, "schedule_of", lambda impl, device: tiled)
        monkeypatch.setattr(tiled, "BLOCK", 64)
    return request.param


every_tile = pytest.mark.parametrize("tiles", TILES, indirect=True)
both = pytest.mark.parametrize("schedule", ["fused", "tiled"], indirect=True)


def _compare(make, x, labels, y=None, ref_labels=None):
    """A criterion's rows and gradients under a random upstream gradient, fused against the reference."""
    results = []
    for impl in ("fused", "reference"):
        inputs = [t.detach().clone().requires_grad_() for t in (x, y) if t is not None]
        more = {"ref_emb": inputs[1], "ref_labels": ref_labels} if y is not None else {}
        rows = make(impl=impl, reduction="none")(inputs[0], labels, **more)
        results.append([rows.detach(), *gradients((rows,), inputs)])
    for found, truth in zip(*results, strict=True):
        assert_same(found, truth)


@both
@every_tile
@pytest.mark.parametrize("n", [0, 1, 16, 17, 31, 33, 50])
def test_tile_edges_of_the_batch(n, tiles, schedule):
    x, labels = batch(n, 5, 4, torch.float64, seed=n)
    for name in ("MultiSimilarityLoss", "GeneralizedLiftedStructureLoss(distance='euclidean')"):
        _compare(CRITERIA[name], x, labels)


@both
@every_tile
@pytest.mark.parametrize(("n", "m"), [(1, 0), (1, 50), (33, 1), (16, 17), (31, 64)])
def test_tile_edges_of_references(n, m, tiles, schedule):
    x, labels = batch(n, 5, 4, torch.float64)
    y, ref_labels = batch(m, 5, 3, torch.float64, seed=1)
    for name in ("MultiSimilarityLoss", "NPairsLoss"):
        _compare(CRITERIA[name], x, labels, y, ref_labels)


@every_tile
@pytest.mark.parametrize("d", [1, 16, 17, 33, 65])
def test_edges_of_the_width(d, tiles):
    """One chunk and slab, several, the last one whole and cut."""
    x, labels = batch(20, d, 4, torch.float64)
    y, ref_labels = batch(35, d, 3, torch.float64, seed=1)
    make = CRITERIA["GeneralizedLiftedStructureLoss(distance='euclidean')"]
    if d > 1:  # normalised numbers are +-1 and have no gradient but rounding
        _compare(make, x, labels)
        _compare(make, x, labels, y, ref_labels)
    (found,) = row_reduce(x, labels, Reduction("logsumexp", "all"), impl="fused")
    (truth,) = row_reduce(x, labels, Reduction("logsumexp", "all"), impl="reference")
    assert_same(found, truth)


@both
@pytest.mark.parametrize("name", CRITERIA)
def test_every_criterion(name, schedule, tiles):
    if name == "SoftTripleLoss":
        pytest.skip("has no kernel of its own")
    if schedule == "tiled" and name not in OF_TILED:
        pytest.skip("its launches are those of others")
    x, labels = batch(24, 7, 4, torch.float64)
    _compare(CRITERIA[name], x, labels)
    if name in REFERENCE_CRITERIA and schedule == "fused":
        y, ref_labels = batch(35, 7, 5, torch.float64, seed=1)
        _compare(CRITERIA[name], x, labels, y, ref_labels)


# For time: the formulas, a squared hinge, a transform of its own, triplets.
OF_TILED = {*FORMULAS, "LiftedStructureLoss", "ContrastiveLoss(power=2)", "TupletMarginLoss", "TripletMarginLoss"}


@both
@pytest.mark.parametrize("per_class", [1, 20, 70])
def test_classes_from_single_samples_to_one_class(per_class, schedule, tiles):
    """The masked tiles grow from none to all."""
    x, labels = batch(70, 7, per_class, torch.float64)
    y, ref_labels = batch(50, 7, per_class, torch.float64, seed=1)
    for name in ("MultiSimilarityLoss", "GeneralizedLiftedStructureLoss"):
        _compare(CRITERIA[name], x, labels)
        _compare(CRITERIA[name], x, labels, y, ref_labels)


@both
@pytest.mark.parametrize("distance", ["dot", "euclidean", "squared_euclidean"])
@pytest.mark.parametrize("references", [False, True], ids=["square", "references"])
@pytest.mark.parametrize("seed", range(2))
def test_every_reduction_side_and_window(seed, references, distance, schedule, tiles):
    """All in one call, which is many launches of two, and apart: forms, sides and windows meet over the seeds."""
    x, labels = batch(40, 5, 4, torch.float64)
    y, ref_labels = batch(50, 5, 3, torch.float64, seed=1)
    more = {"ref_emb": y.requires_grad_(), "ref_labels": ref_labels} if references else {}
    reductions, learn = forms(40, 50 if references else 40, seed)
    inputs = [x.requires_grad_(), *([y] if references else []), *learn]
    results = []
    for impl in ("fused", "reference"):
        rows = row_reduce(x, labels, *reductions, distance=distance, impl=impl, **more)
        finite = tuple(torch.where(r.isfinite(), r, 0.0) for r in rows)
        results.append([*(r.detach() for r in rows), *gradients(finite, inputs)])
    for found, truth in zip(*results, strict=True):
        assert_same(found, truth)


@pytest.mark.parametrize(("op", "transform"), WITH_GRADIENT, ids=lambda word: word)
@pytest.mark.parametrize("references", [False, True], ids=["square", "references"])
def test_gradcheck(op, transform, references, tiles):
    """Against finite differences in every input at once; second derivatives, which are the dense path's, for one."""
    generator = torch.Generator().manual_seed(3)
    x, labels = batch(6, 2, 2, torch.float64)
    y, ref_labels = batch(5, 2, 2, torch.float64, seed=1)
    m = 5 if references else 6
    values = [torch.tensor(0.7, dtype=torch.float64)]
    values += [torch.randn(size, generator=generator, dtype=torch.float64) for size in (6, m)]

    def rows(x, y, scale, offset, ref_offset):
        lifted = {"ref_offset": ref_offset} if transform == "lifted" else {}
        if (op, transform) == MAPPED:
            scale, offset = 0.7, -0.2
        r = Reduction(op, "negatives", transform, scale=scale, offset=offset, **lifted)
        more = {"ref_emb": y, "ref_labels": ref_labels} if references else {}
        (row,) = row_reduce(x, labels, r, distance="euclidean", impl="fused", **more)
        return torch.where(row.isfinite(), row, 0.0)

    inputs = [t.clone().requires_grad_() for t in (x, y, *values)]
    assert torch.autograd.gradcheck(rows, inputs)
    if op == "logsumexp" and not references:
        assert torch.autograd.gradgradcheck(rows, inputs)


@pytest.mark.parametrize("count", [2, 9])
@pytest.mark.parametrize("per_class", [4, 90])
def test_columns_split_among_programs(count, per_class, monkeypatch, tiles):
    """More splits than the columns, or those with positives, have tiles, too."""
    monkeypatch.setattr(launch, "choose_splits", lambda *arguments: count)
    x, labels = batch(70, 7, per_class, torch.float64)
    y, ref_labels = batch(85, 7, per_class, torch.float64, seed=1)
    _compare(CRITERIA["LiftedStructureLoss"], x, labels)
    _compare(MultiSimilarityLoss, x, labels)
    _compare(CRITERIA["MultiSimilarityLoss"], x, labels, y, ref_labels)


def test_splits_fill_the_processors_and_leave_tiles_whole(monkeypatch):
    monkeypatch.setattr(launch, "processors", lambda device: 132)
    cpu = torch.device("cpu")
    assert launch.choose_splits(1024, 2048, cpu) == 1
    assert launch.choose_splits(8, 1024, cpu) > 10
    assert launch.choose_splits(8, 8, cpu) <= 2
    assert launch.choose_splits(8, 1024, cpu, most=3) <= 3
    assert launch.choose_splits(0, 0, cpu) == 1


@pytest.mark.parametrize("noise", [1.0, 0.4, 0.02])
@pytest.mark.parametrize("references", [False, True], ids=["square", "references"])
def test_mining_that_leaves_many_and_few_tiles(noise, references, monkeypatch, tiles):
    """Backward visits just the tiles that a window lets a pair through of, and the gradient is the same."""
    listed = []
    list_tiles = launcher.Launcher.list_tiles

    def spy(self, live, role):
        found = list_tiles(self, live, role)
        listed.append((found.counts.sum().item(), found.index.numel()))
        return found

    monkeypatch.setattr(launcher.Launcher, "list_tiles", spy)
    centres = torch.randn(64, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(256) // 4
    x = centres[labels] + noise * torch.randn(256, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    y = (x[:200] + 0.01, labels[:200]) if references else ()
    _compare(MultiSimilarityLoss, x, labels, *y)
    visited, tiles_in_all = map(sum, zip(*listed, strict=True))
    assert len(listed) == 1 + references
    assert visited < tiles_in_all * (1.0 if noise == 1 else 0.9 if noise > 0.1 else 0.3)


@pytest.mark.parametrize("spread", [0.0, math.inf])
def test_one_exponential_for_both_ends_and_one_for_each(spread, monkeypatch, tiles):
    """Which of the two kernels runs is decided on the device by how far the rows' logsumexps lie apart."""
    monkeypatch.setattr(shared_top, "SPREAD", dict.fromkeys(shared_top.SPREAD, spread))
    x, labels = batch(90, 7, 4, torch.float64)
    for name in ("MultiSimilarityLoss", "GeneralizedLiftedStructureLoss(distance='euclidean')"):
        _compare(CRITERIA[name], x, labels)


def test_logsumexps_too_far_apart_for_one_exponential(monkeypatch, tiles):
    x, labels = batch(90, 7, 4, torch.float64)
    monkeypatch.setattr(shared_top, "SPREAD", dict.fromkeys(shared_top.SPREAD, 100.0))
    x[::2] *= 8  # products of order 1 and of order 100
    results = []
    for impl in ("fused", "reference"):
        a = x.clone().requires_grad_()
        (rows,) = row_reduce(a, labels, Reduction("logsumexp", "negatives"), impl=impl)
        results.append([rows.detach(), *gradients((rows,), [a])])
    assert results[1][0].max() - results[1][0].min() > shared_top.SPREAD[torch.float64]
    for found, truth in zip(*results, strict=True):
        assert_same(found, truth)


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["MultiSimilarityLoss", "GeneralizedLiftedStructureLoss(distance='euclidean')"])
def test_as_accurate_as_dense_code_of_the_same_precision(name, dtype, schedule, tiles):
    """float16 stays float16 up to the products; the truth is of the rows that the kernels get, rounded once."""
    x, labels = batch(150, 24, 4, dtype)
    if dtype == torch.float16:
        x = torch.nn.functional.normalize(x.float()).half()
    options = {"normalize": dtype != torch.float16}
    truth = value_and_gradient(CRITERIA[name](impl="reference", **options), x.double(), labels)
    eager = value_and_gradient(CRITERIA[name](impl="reference", **options), x, labels)
    found = value_and_gradient(CRITERIA[name](impl="fused", **options), x, labels)
    assert found[0].dtype == torch.float32 and found[1].dtype == dtype
    for f, e, t in zip(found, eager, truth, strict=True):
        assert_as_good_as(f, e, t)


def _tf32(t):
    """As the tensor cores read float32: the last 13 bits are not there."""
    return (t.view(torch.int32) & -0x2000).view(torch.float32)


def _split_product(x, round_leading, cut):
    leading = round_leading(x)
    rest = cut(x - leading)
    a, b = leading.double(), rest.double()
    return a @ a.T + (a @ b.T + b @ a.T)


def test_three_tf32_products_are_float32_and_three_bfloat16_ones_are_not():
    """Why float32 is split in tf32: of two the cheaper one loses 7 bits."""
    x = torch.nn.functional.normalize(torch.randn(400, 128, generator=torch.Generator().manual_seed(0)))

    def leading_bits(t):  # kernels/tile.py's, in torch
        return ((t.view(torch.int32) + 0x1000) & -0x2000).view(torch.float32)

    def bfloat16(t):
        return t.bfloat16().float()

    truth = x.double() @ x.double().T
    single = ((x @ x.T).double() - truth).abs().max()
    assert torch.equal(_tf32(leading_bits(x)), leading_bits(x))
    assert (_split_product(x, leading_bits, _tf32) - truth).abs().max() <= 2 * single
    assert (_split_product(x, bfloat16, bfloat16) - truth).abs().max() > 10 * single


def test_float32_is_multiplied_as_torch_is_told_to():
    assert launch.precision(torch.float32) == "split"
    assert launch.precision(torch.float64) == launch.precision(torch.bfloat16) == "ieee"
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        assert launch.precision(torch.float32) == "tf32"
    finally:
        torch.set_float32_matmul_precision(before)
    assert launch.precision(torch.float32) == "split"
    try:
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        assert launch.precision(torch.float32) == "tf32"
    finally:
        torch.backends.cuda.matmul.fp32_precision = "ieee"


@both
def test_backward_sees_the_bits_that_forward_saw(schedule, tiles):
    """A window at exactly a similarity: its own pair stays outside in both passes, and a hair under it, inside.

    Of whole sixteenths, whose products are exact: the interpreter's are numpy's, whose bits hang on a block's shape and
    on the processor. tests/backends/triton/test_gpu.py has real ones.
    """
    x, labels = batch(90, 40, 4, torch.float32)
    x = (16 * x).round() / 16
    highest = Reduction("max", "negatives", detach=True)
    for shift, nothing in ((0.0, True), (-1e-3, False)):
        a = x.clone().requires_grad_()
        r = Reduction("sum", "negatives", scale=2.0, lower=Bound(highest, shift))
        rows = row_reduce(a, labels, highest, r, impl="fused")[1]
        (grad,) = torch.autograd.grad(rows.sum(), a)
        assert (rows == 0).all() == nothing
        assert (grad == 0).all() == nothing


@both
@pytest.mark.parametrize("op", ["min", "max"])
def test_equal_extremes_send_their_gradient_to_the_lowest_index(op, schedule, tiles):
    x = torch.tensor([[1.0, 0.0], [0.5, 0.5], [0.5, 0.5], [0.5, 0.5]], dtype=torch.float64)
    labels = torch.tensor([5, 9, 1, 3])
    (row,) = row_reduce(x.requires_grad_(), labels, Reduction(op, "negatives"), impl="fused")
    (grad,) = torch.autograd.grad(row[0], x)
    assert torch.equal(grad[1], torch.tensor([1.0, 0.0], dtype=torch.float64))
    assert not grad[2:].any()


@both
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_shows_everywhere(bad, schedule, tiles):
    x, labels = batch(70, 5, 4, torch.float64)
    x[3, 1] = bad
    for make in (MultiSimilarityLoss, CRITERIA["LiftedStructureLoss"]):
        loss, grad = value_and_gradient(make(impl="fused"), x, labels)
        assert loss.isnan() and grad.isnan().all()


@both
def test_same_bits_every_time(schedule, tiles):
    x, labels = batch(90, 7, 4, torch.float32)
    first = value_and_gradient(MultiSimilarityLoss(impl="fused"), x, labels)
    for _ in range(3):
        again = value_and_gradient(MultiSimilarityLoss(impl="fused"), x, labels)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("want", [(True, False), (False, True)], ids=str)
@both
def test_only_the_gradients_that_are_asked_for(want, schedule, tiles):
    x, labels = batch(40, 6, 4, torch.float64)
    y, ref_labels = batch(50, 6, 4, torch.float64, seed=1)
    grads = []
    for impl in ("fused", "reference"):
        a, b = x.clone().requires_grad_(want[0]), y.clone().requires_grad_(want[1])
        MultiSimilarityLoss(impl=impl)(a, labels, ref_emb=b, ref_labels=ref_labels).backward()
        assert (a.grad is not None, b.grad is not None) == want
        grads.append(a.grad if want[0] else b.grad)
    assert_same(*grads)


def test_rows_past_two_to_the_thirty_one_entries(tiles):
    """Offsets are 64 bits: the positives of the one anchor are the last rows of 4 GB of references."""
    m, d = 2**21 + 5, 1024
    y = torch.zeros(m, d, dtype=torch.float16)
    y[-4:] = torch.tensor([[0.5], [2.0], [1.0], [-1.0]], dtype=torch.float16)
    x = torch.ones(1, d, dtype=torch.float16)
    lo, hi = torch.tensor([m - 4]), torch.tensor([m])
    p = Problem(x, y, lo, hi, None, torch.arange(m), "dot")
    r = Reduction("max", "positives", detach=True)
    spec = row_reduce_op.encode((r,), (), "dot", "fused")
    terms = row_reduce_op.decode(spec.code, spec.shifts, spec.slots)
    one = launcher.Launcher(p, terms, Operands(None, spec.scales, []))
    state = one.forward_operands(0, 1, False, torch.empty(1, 1))
    one.reduce((0,), [state], one.anchors(), launcher.PairBlock(0, 1, 0, m), 1)
    assert state.row_max.item() == 2 * d


def test_fullgraph_compile_and_the_registered_ops(tiles):
    x, labels = batch(40, 6, 4, torch.float64)
    criterion = MultiSimilarityLoss(impl="fused")
    compiled = torch.compile(criterion, fullgraph=True, backend="aot_eager")
    found = value_and_gradient(compiled, x, labels)
    for f, t in zip(found, value_and_gradient(criterion, x, labels), strict=True):
        assert_same(f, t)


@both
def test_opcheck(schedule, tiles):
    plan = flashpair.core.label_order.make_label_order(torch.arange(40) // 4)
    x = torch.randn(40, 6, dtype=torch.float64)
    spec = row_reduce_op.encode(flashpair.losses.mining._mined(2.0, 50.0, 0.1), (), "dot", "fused")
    arguments = (x, None, plan.lo, plan.hi, None, plan.ref_order, None, [], *spec, True)
    torch.library.opcheck(torch.ops.flashpair.row_reduce, arguments, test_utils=("test_schema", "test_faketensor"))
    values, *kept = torch.ops.flashpair.row_reduce(*arguments)
    grads = [None, values[1].clone(), None, values[3].clone()]
    more = (*arguments[:-1], values, *kept, grads, [True, False, False, False, False])
    torch.library.opcheck(torch.ops.flashpair.row_reduce_backward, more, test_utils=("test_schema", "test_faketensor"))


@both
def test_references_past_the_end_have_no_gradient(schedule, tiles):
    """The first `count` of some pairs, of a plan of one's own: Euclidean distances pull on no other."""
    x, labels = batch(60, 5, 2, torch.float64)
    results = []
    for impl in ("fused", "reference"):
        a, k = x.clone().requires_grad_(), torch.arange(40)
        pairs = flashpair.make_pairs(a, labels, distance="euclidean", impl=impl)
        order = pairs.label_order.order if impl == "fused" else torch.sort(labels, stable=True).indices
        rows = k if impl == "fused" else order[k]
        chosen = pairs.select(rows, rows.flip(0), k, torch.tensor(25))
        (row,) = chosen.reduce(Reduction("logsumexp", "negatives"))
        results.append([row.detach()[:25], *torch.autograd.grad(row[:25].sum(), a)])
    for found, truth in zip(*results, strict=True):
        assert_same(found, truth)


def test_inputs_are_not_written_and_may_be_strided(tiles):
    wide, labels = batch(71, 20, 4, torch.float64)
    before = wide.clone()
    for view in (wide[:, ::2], wide[1:], wide.T.contiguous().T, wide[:, 3:17]):
        own = labels[-view.shape[0] :]
        found = value_and_gradient(MultiSimilarityLoss(impl="fused"), view, own)
        truth = value_and_gradient(MultiSimilarityLoss(impl="reference"), view.clone(), own)
        for f, t in zip(found, truth, strict=True):
            assert_same(f, t)
    assert torch.equal(wide, before)


def test_without_the_interpreter_cpu_tensors_are_refused(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET")
    x, labels = batch(8, 4, 2, torch.float32)
    with pytest.raises(RuntimeError, match=r"fused needs a CUDA device \(or TRITON_INTERPRET=1"):
        MultiSimilarityLoss(impl="fused")(x, labels)
