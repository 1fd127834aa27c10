"""The Triton kernels through the interpreter against the float64 reference: every edge of every tiled axis.

`fused` and the GPU's `tiled` are both held to it; on a machine with a GPU test_gpu.py runs the compiled
kernels instead.
"""

from __future__ import annotations

import interpreted_kernels
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
from interpreted_kernels import both, compare, every_tile, interpreted_alone

import flashpair
from flashpair import Reduction, row_reduce
from flashpair.core.class_pairs import ClassPairs
from flashpair.engine.dispatch import interpreted

pytest.importorskip("triton")
pytestmark = interpreted_alone

if interpreted():
    pass

schedule = interpreted_kernels.schedule
tiles = interpreted_kernels.tiles


@both
@every_tile
@pytest.mark.parametrize("n", [0, 1, 16, 17, 31, 33, 50])
def test_tile_edges_of_the_batch(n, tiles, schedule):
    x, labels = batch(n, 5, 4, torch.float64, seed=n)
    for name in ("MultiSimilarityLoss", "GeneralizedLiftedStructureLoss(distance='euclidean')"):
        compare(CRITERIA[name], x, labels)


@both
@every_tile
@pytest.mark.parametrize(("n", "m"), [(1, 0), (1, 50), (33, 1), (16, 17), (31, 64)])
def test_tile_edges_of_references(n, m, tiles, schedule):
    x, labels = batch(n, 5, 4, torch.float64)
    y, ref_labels = batch(m, 5, 3, torch.float64, seed=1)
    for name in ("MultiSimilarityLoss", "NPairsLoss"):
        compare(CRITERIA[name], x, labels, y, ref_labels)


@every_tile
@pytest.mark.parametrize("d", [1, 16, 17, 33, 65])
def test_edges_of_the_width(d, tiles):
    """One chunk and slab, several, the last one whole and cut."""
    x, labels = batch(20, d, 4, torch.float64)
    y, ref_labels = batch(35, d, 3, torch.float64, seed=1)
    make = CRITERIA["GeneralizedLiftedStructureLoss(distance='euclidean')"]
    if d > 1:  # normalised numbers are +-1 and have no gradient but rounding
        compare(make, x, labels)
        compare(make, x, labels, y, ref_labels)
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
    compare(CRITERIA[name], x, labels)
    if name in REFERENCE_CRITERIA and schedule == "fused":
        y, ref_labels = batch(35, 7, 5, torch.float64, seed=1)
        compare(CRITERIA[name], x, labels, y, ref_labels)


# For time: the formulas, a squared hinge, a transform of its own, triplets.
OF_TILED = {*FORMULAS, "LiftedStructureLoss", "ContrastiveLoss(power=2)", "TupletMarginLoss", "TripletMarginLoss"}


@both
@pytest.mark.parametrize("per_class", [1, 20, 70])
def test_classes_from_single_samples_to_one_class(per_class, schedule, tiles):
    """The masked tiles grow from none to all."""
    x, labels = batch(70, 7, per_class, torch.float64)
    y, ref_labels = batch(50, 7, per_class, torch.float64, seed=1)
    for name in ("MultiSimilarityLoss", "GeneralizedLiftedStructureLoss"):
        compare(CRITERIA[name], x, labels)
        compare(CRITERIA[name], x, labels, y, ref_labels)


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
        chosen = pairs.take_pairs(ClassPairs(rows, rows.flip(0), k, torch.tensor(25)))
        (row,) = chosen.reduce(Reduction("logsumexp", "negatives"))
        results.append([row.detach()[:25], *torch.autograd.grad(row[:25].sum(), a)])
    for found, truth in zip(*results, strict=True):
        assert_same(found, truth)
