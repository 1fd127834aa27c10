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
    assert_same,
    batch,
    forms,
    gradients,
)
from small_tiles import both, every_tile

import flashpair
from flashpair import MultiSimilarityLoss, Reduction, row_reduce
from flashpair.engine.dispatch import interpreted
from flashpair.tools.check import value_and_gradient

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(
    not interpreted(), reason="there is a GPU: tests/backends/triton/test_gpu.py runs the kernels"
)

if interpreted():
    from flashpair.backends.triton import launch, launcher, shared_top
    from flashpair.core.problem import Operands, Problem
    from flashpair.engine import row_reduce_op


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
