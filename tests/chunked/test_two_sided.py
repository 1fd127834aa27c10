"""Two groups of anchors whose pairs are those of one with the other: the CPU pass against the dense matrix of the two.

`make sanitize` runs this file too: a tile or a block of the band over the border of the groups reads outside of them.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conftest import needs_extension
from helpers import FORMS, assert_as_good_as, assert_same, assert_same_bits, forms, relative

from flashpair import Bound, Reduction, register_transform
from flashpair.backends.cpu import tiled
from flashpair.backends.reference import reduce_rows
from flashpair.core.call import compile_call
from flashpair.core.problem import Operands, Problem
from flashpair.core.reduction import bound_places, histogram
from flashpair.core.similarity import dense_pairs
from flashpair.engine import row_reduce_op
from flashpair.engine.dispatch import interpreted

pytestmark = needs_extension

# No row and one, the band's 16 rows and the 128-row tile, each less one, whole and plus one; several ragged tiles
SIZES = [(0, 5), (5, 0), (0, 0), (1, 1), (1, 300), (300, 1), (15, 16), (16, 17), (17, 15), (33, 31)]
SIZES += [(127, 128), (128, 129), (129, 127), (128, 128), (130, 400), (401, 129), (300, 290)]


class Groups:
    """Two groups in the caller's order: x (N, D), labels (N,), and which rows are of the first group (N,) bool."""

    def __init__(self, a, b, d, classes, seed=0, dtype=torch.float64, whole_numbers=False, shared_classes=True):
        generator = torch.Generator().manual_seed(seed)
        n = a + b
        x = torch.randn(n, d, generator=generator, dtype=torch.float64)
        self.x = (x.round().clamp(-1, 1) if whole_numbers else x).to(dtype)
        self.first = torch.zeros(n, dtype=torch.bool)
        self.first[torch.randperm(n, generator=generator)[:a]] = True
        self.labels = torch.randint(classes, (n,), generator=generator)
        if not shared_classes:
            self.labels = 2 * self.labels + self.first
        self.rows = [self.first.nonzero()[:, 0], (~self.first).nonzero()[:, 0]]

    def problem(self, distance="dot"):
        """The sorted problem, and the caller's index of each of its rows."""
        order = torch.cat([rows[torch.sort(self.labels[rows], stable=True).indices] for rows in self.rows])
        a, n = len(self.rows[0]), len(order)
        labels = self.labels[order]
        bounds = []
        for right in (False, True):
            of_first = a + torch.searchsorted(labels[a:].contiguous(), labels[:a].contiguous(), right=right)
            of_last = torch.searchsorted(labels[:a].contiguous(), labels[a:].contiguous(), right=right)
            bounds.append(torch.cat([of_first, of_last]))
        return Problem(self.x[order].contiguous(), None, *bounds, None, order, distance, split=a or n), order


def _inputs(reductions):
    """What is differentiated of reductions beside x: (reduction, name of the field)."""
    names = ("scale", "offset", "ref_offset")
    return [(k, name) for k, r in enumerate(reductions) for name in names if getattr(r, name) is not None
            and isinstance(getattr(r, name), torch.Tensor)]  # fmt: skip


def _tiled(groups, reductions, upstream, distance="dot", keep_of=None):
    """Values (K, N), dx (N, D) and the gradients of `_inputs` in the caller's order, as `pairs.py` would ask for them.

    upstream: a function of the values. keep_of: a list that takes what forward kept.
    """
    p, order = groups.problem(distance)
    n, dtype = len(order), p.x.dtype
    call = compile_call(reductions, distance, "tiled")
    vectors = []
    for k, role in call.vector_roles:
        r = reductions[k]
        vectors.append((r.offset, r.ref_offset, r.lower, r.upper)[role].detach().to(dtype)[order].contiguous())
    scale = torch.tensor([float(torch.as_tensor(r.scale).detach()) for r in reductions], dtype=dtype)
    terms, given = call.terms, Operands(scale, call.scales, vectors)
    values, kept = tiled.forward(p, terms, given, True)
    likes = tiled.kept_like(p.x, None, terms, True, split=p.split)
    assert [(tuple(t.shape), t.dtype) for t in kept] == [(tuple(shape), kind) for shape, kind in likes]
    if keep_of is not None:
        keep_of.append(kept)
    back = torch.empty_like(values[: len(terms)])
    back[:, order] = values[: len(terms)]
    grads = upstream(back)
    g = tiled.backward(p, terms, given, values, kept, [row[order].contiguous() for row in grads],
                       [True, False, True, True, True])  # fmt: skip
    of = {"offset": g.offset, "ref_offset": g.ref_offset}
    found = []
    for k, name in _inputs(reductions):
        if name == "scale":
            found.append(g.scale[k])
        else:
            found.append(torch.empty(n, dtype=dtype))
            found[-1][order] = of[name][k]
    dx = torch.empty_like(p.x)
    dx[order] = g.x
    return back, dx, *found


def _dense(groups, reductions, upstream, distance="dot", dtype=torch.float64):
    """The same by the reference: x_A x_B^T for the rows of A, its transpose for those of B.

    The gradient of a scale, one sum over all pairs, comes with the sum of its terms' sizes: no order of a sum can do
    better than roundings of that.
    """
    x = groups.x.detach().to(dtype).requires_grad_()
    inputs, learned = [x], []
    for r in reductions:
        own = {}
        for name in ("scale", "offset", "ref_offset"):
            value = getattr(r, name)
            if isinstance(value, torch.Tensor):
                own[name] = value.detach().to(dtype).requires_grad_()
                inputs.append(own[name])
        learned.append(replace(r, **own))
    first, last = groups.rows
    z = dense_pairs(x[first], x[last], distance)
    same = groups.labels[first][:, None] == groups.labels[last]
    values = []
    for r, places in zip(learned, bound_places(tuple(reductions)), strict=True):
        window = {
            name: values[place].detach() + getattr(r, name).shift if place >= 0 else getattr(r, name)
            for name, place in zip(("lower", "upper"), places, strict=True)
        }
        row = torch.zeros(len(x), dtype=dtype)
        for own, other, pairs, mask in ((first, last, z, same), (last, first, z.T, same.T)):
            of = {name: v[own] if isinstance(v, torch.Tensor) else v for name, v in window.items()}
            if isinstance(r.offset, torch.Tensor):
                of["offset"] = r.offset[own]
            if r.ref_offset is not None:
                of["ref_offset"] = r.ref_offset[other]
            side = {"positives": mask, "negatives": ~mask, "all": torch.ones_like(mask)}[r.side]
            row = row.index_copy(0, own, reduce_rows(pairs, side, replace(r, **of)))
        values.append(row.detach() if r.detach else row)
    values = torch.stack(values)
    grads = upstream(values.detach())
    kept = torch.where(values.isfinite(), values, 0.0)  # a row without pairs has no gradient

    def gradients(row, to, upstream):
        if not row.requires_grad:  # counts
            return [torch.zeros_like(t) for t in to]
        found = torch.autograd.grad(row, to, upstream, allow_unused=True, retain_graph=True)
        return [torch.zeros_like(t) if g is None else g for g, t in zip(found, to, strict=True)]

    found = gradients(kept, inputs, grads)
    for place, (k, name) in enumerate(_inputs(reductions), 1):
        if name == "scale":
            terms = gradients(kept[k], [z], grads[k])[0] * z.detach() / learned[k].scale.detach()
            found[place] = torch.stack([found[place], terms.abs().sum()])
    return values.detach(), *found


def _with_sizes(found, truth):
    """What was found, the gradients of scales with the sizes that `_dense` gives."""
    return [torch.stack([f, t[1].to(f.dtype)]) if f.dim() == 0 else f for f, t in zip(found, truth, strict=True)]


def _upstream(reductions, seed=1):
    """Random dL/dr, none of rows without pairs, nor of what has no gradient."""
    wanted = torch.tensor([r.op != "count" and not r.detach for r in reductions])[:, None]

    def make(values):
        g = torch.randn(values.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        return torch.where(values.isfinite() & wanted, g.to(values.dtype), 0.0)

    return make


def _inside(reductions):
    """Without the offsets that stand outside of a log-sum-exp, which are not the schedule's."""
    return [replace(r, offset=None) if r.offset_outside else r for r in reductions]


def _compare(groups, reductions, distance="dot", keep_of=None):
    reductions = _inside(reductions)
    upstream = _upstream(reductions)
    found = _tiled(groups, reductions, upstream, distance, keep_of)
    truth = _dense(groups, reductions, upstream, distance)
    for f, t in zip(_with_sizes(found, truth), truth, strict=True):
        assert_same(f, t)
    return found


def _every_form(groups, distance="dot"):
    """All reductions in one call, three times, so that each meets every side and most windows."""
    n = len(groups.x)
    for seed in range(3):
        _compare(groups, forms(n, n, seed)[0], distance)


def _mined(epsilon=0.1):
    """Multi-Similarity's: positives, all negatives, positives."""
    low = Reduction("min", "positives", detach=True)
    high = Reduction("max", "negatives", lower=Bound(low, -epsilon), detach=True)
    negatives = Reduction("logsumexp", "negatives", scale=5.0, lower=Bound(low, -epsilon))
    return [low, negatives, high, Reduction("logsumexp", "positives", scale=-2.0, upper=Bound(high, epsilon))]


@pytest.mark.parametrize(("a", "b"), SIZES)
def test_tile_edges_of_both_groups(a, b):
    groups = Groups(a, b, 6, max(1, (a + b) // 8), seed=a + b)
    _every_form(groups)
    _compare(groups, _mined())


@pytest.mark.parametrize("distance", ["euclidean", "squared_euclidean"])
@pytest.mark.parametrize(("a", "b"), [(17, 15), (129, 140), (5, 0)])
def test_distances(a, b, distance):
    _every_form(Groups(a, b, 6, 20), distance)


@pytest.mark.parametrize("classes", [1, 2, 3, 5, 1000])
def test_from_one_class_to_hardly_a_positive(classes):
    """The positives' band is all pairs, where it goes over the grid, down to nothing."""
    groups = Groups(150, 140, 6, classes)
    _every_form(groups)
    _compare(groups, _mined())


def test_where_a_wide_band_begins():
    """Of 4 classes 1 pair in 4 is positive, of the pairs of one group with the other; of all N^2 it would be 1 in 9."""
    for classes in (3, 4, 5):
        groups = Groups(200, 100, 5, classes)
        groups.labels = torch.arange(300) % classes
        _every_form(groups)


def test_no_class_in_common():
    groups = Groups(140, 150, 6, 20, shared_classes=False)
    _every_form(groups)
    values, *_ = _compare(groups, [Reduction("count", "positives"), Reduction("count", "negatives")])
    assert not values[0].any()
    assert torch.equal(values[1], torch.where(groups.first, 150.0, 140.0).double())


@pytest.mark.parametrize("size", [256, 512])
def test_larger_tiles(size, monkeypatch):
    """256 is what so many pairs get; 512 is given, as it takes 268 million of them."""
    if size == 512:
        grid = tiled.grid

        def large(n, m, square, live_per_row=tiled.LIVE_PAIRS_PER_ROW, split=0):
            slots = -(-split // 512) * -(-(n - split) // 512)
            return grid(n, m, square, live_per_row, split)._replace(size=512, slots=slots)

        monkeypatch.setattr(tiled, "grid", large)
    for a, b in ((size + 1, 1030), (1030, size - 1)) if size == 512 else ((770, 700),):
        assert tiled.grid(a + b, a + b, True, split=a).size == size
        groups = Groups(a, b, 4, 100)
        _compare(groups, forms(a + b, a + b, 0)[0])
        _compare(groups, _mined())


@pytest.mark.parametrize("op", ["min", "max"])
@pytest.mark.parametrize("side", ["positives", "negatives", "all"])
def test_equal_extremes_go_to_the_lowest_index_of_the_caller(op, side):
    """Products of small whole numbers, so that most rows attain their extreme many times."""
    groups = Groups(140, 150, 4, 4, whole_numbers=True)
    _compare(groups, [Reduction(op, side)])
    _compare(groups, [Reduction(op, side, lower=torch.full((290,), -1.5), upper=torch.full((290,), 1.5))])


@pytest.mark.parametrize("nodes", [3, 5, 40])
@pytest.mark.parametrize("side", ["positives", "negatives", "all"])
def test_histograms(nodes, side):
    groups = Groups(140, 150, 6, 20)
    groups.x = torch.nn.functional.normalize(groups.x)
    values, *_ = _compare(groups, list(histogram(side, nodes, -1.0, 2 / (nodes - 1))))
    assert_same(values.sum(0), _compare(groups, [Reduction("count", side)])[0][0])


def test_transforms_in_steps():
    register_transform("two_groups_cosh", lambda t: (t * t + 1).log() + torch.tanh(t))
    groups = Groups(140, 150, 6, 20)
    vector = torch.randn(290, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    scale = torch.tensor(0.7, dtype=torch.float64)
    for side in ("positives", "negatives", "all"):
        _compare(groups, [Reduction("sum", side, "two_groups_cosh", scale=scale, offset=vector, lower=vector - 1),
                          Reduction("logsumexp", side, "two_groups_cosh", scale=0.5, offset=0.2)])  # fmt: skip


@pytest.mark.parametrize("noise", [1.0, 0.4, 0.1])
def test_mining_that_leaves_many_and_few_pairs(noise):
    """Tiles that are listed, and tiles that are not, of the rectangle alone; windows, offsets and scales learned."""
    groups, kept = Groups(400, 350, 16, 190), []
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(190, 16, dtype=torch.float64, generator=generator)
    groups.x = centres[groups.labels] + noise * torch.randn(750, 16, dtype=torch.float64, generator=generator)
    _compare(groups, _mined(), keep_of=kept)
    low = Reduction("min", "positives", detach=True)
    vector = torch.randn(2, 750, generator=generator, dtype=torch.float64)
    for transform in ("lifted", "softplus"):
        lifted = {"ref_offset": vector[0]} if transform == "lifted" else {}
        hinge = Reduction("sum", "negatives", transform, scale=torch.tensor(0.3), offset=vector[1],
                          lower=Bound(low, -0.1), **lifted)  # fmt: skip
        for distance in ("dot", "squared_euclidean"):
            _compare(groups, [low, hinge], distance, kept)
    assert all(k.live_count.shape == (4 * 3,) for k in kept)
    if noise == 1.0:
        assert (kept[0].live_count == -1).any()
    else:
        assert (kept[0].live_count >= 0).all() and kept[0].live_count.sum() > 0


@pytest.mark.parametrize(("a", "b"), [(900, 300), (300, 900), (700, 650)])
def test_same_bits_whatever_the_threads_and_every_time(a, b, monkeypatch):
    monkeypatch.setattr(tiled, "INLINE_WORK", 0)
    groups = Groups(a, b, 16, 100, dtype=torch.float32)
    reductions = _inside(forms(a + b, a + b, 1)[0]) + _mined()
    assert_same_bits(lambda: _tiled(groups, reductions, _upstream(reductions)), [1, 2, 3, 7] + [2] * 10)


def test_same_bits_of_a_band_that_threads_share():
    """Work of the band is shared from 2^27 multiply-adds on."""
    groups = Groups(3001, 2999, 128, 16, dtype=torch.float32)
    p, _ = groups.problem()
    assert (p.hi - p.lo).sum() * 128 >= 2**27
    reductions = [Reduction("logsumexp", "positives"), Reduction("sum", "positives", "softplus")]
    assert_same_bits(lambda: _tiled(groups, reductions, _upstream(reductions)), [1, 2, 3])


@pytest.mark.parametrize("distance", ["dot", "euclidean"])
@pytest.mark.parametrize("form", range(len(FORMS)), ids=[" ".join(form) for form in FORMS])
def test_float32_is_as_good_as_dense_code(form, distance):
    groups = Groups(300, 270, 32, 60, dtype=torch.float32)
    groups.x = torch.nn.functional.normalize(groups.x)
    for seed in range(3):
        reductions = _inside([forms(570, 570, seed)[0][form]])
        upstream = _upstream(reductions)
        found = _tiled(groups, reductions, upstream, distance)
        eager = _dense(groups, reductions, upstream, distance, torch.float32)
        truth = _dense(groups, reductions, upstream, distance)
        offsets = [place for place, (_, name) in enumerate(_inputs(reductions), 2) if name != "scale"]
        for place, (f, e, t) in enumerate(zip(_with_sizes(found, truth), eager, truth, strict=True)):
            assert torch.equal(f.isfinite(), t.isfinite())
            f, e, t = (torch.where(t.isfinite(), value, 0.0) for value in (f, e, t))
            if place in offsets:  # whose terms, often equal, a tile adds one by one: so many roundings at most
                assert relative(f, t) <= 2 * relative(e, t) + 128 * torch.finfo(torch.float32).eps
            else:
                assert_as_good_as(f, e, t)


@pytest.mark.parametrize("row", [0, 150])
def test_an_entry_that_is_not_finite_is_never_swallowed(row):
    groups = Groups(100, 100, 5, 20)
    groups.x[row % 200, 2] = torch.nan
    reductions = _inside(forms(200, 200, 0)[0])
    values, dx, *_ = _tiled(groups, reductions, lambda values: torch.ones_like(values))
    assert values.isnan().all() and dx.isnan().all()


def test_a_group_without_anything_to_pair_with():
    for a, b in ((0, 40), (40, 0)):
        groups = Groups(a, b, 5, 6)
        values, dx, *_ = _compare(groups, [Reduction("max", "all"), Reduction("count", "all"), Reduction("sum", "all")])
        assert (values[0] == -torch.inf).all() and not values[1:].any() and not dx.any()


def test_what_takes_no_groups_says_so():
    p, _ = Groups(20, 30, 5, 6).problem()
    call = compile_call([Reduction("logsumexp", "negatives", lower=torch.zeros(()))], "dot", "tiled")
    terms, given = call.terms, Operands(None, call.scales, [p.x.new_zeros(p.x.shape[0])])
    from flashpair.backends.cpu import screened

    with pytest.raises(NotImplementedError, match=r"screened takes no two-sided problem, got split=20"):
        screened.forward(p, terms, given, True)
    if interpreted():
        for module in map(row_reduce_op.triton_backend, ("fused", "tiled", "screened")):
            with pytest.raises(NotImplementedError, match="GPU take no two-sided problem, got split=20"):
                module.forward(p, terms, given, True)
    for wrong in (p._replace(split=51), p._replace(split=-1), p._replace(y=p.x), p._replace(end=torch.tensor(4))):
        with pytest.raises(ValueError, match="a two-sided problem takes no y and no end, and split from 1 to N = 50"):
            tiled.forward(wrong, terms, given, True)
