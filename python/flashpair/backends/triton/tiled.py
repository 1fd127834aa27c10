"""`tiled` on the GPU, for wide embeddings: a vendor product, a fused Triton epilogue, and in backward a vendor product.

Where one kernel would run out of registers for the gradient (D of 512 and more), similarities of BLOCK x BLOCK pairs
are multiplied by cuBLAS into one buffer, folded into the rows' state by the same kernels as `fused`, and in backward
turned into weights that cuBLAS multiplies with the embeddings. Of a square problem only the blocks on and above the
diagonal are computed: each serves the rows of both of its ends. Positives are a band, and go through `fused`'s kernels.
Never materialises: more than one block of similarities and one of weights.
Keeps for backward: the row values, and the places of extremes.
Deterministic: blocks in a fixed order, no atomics.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ...core.problem import (
    NEGATIVES,
    POSITIVES,
    Gradients,
    Like,
    Operands,
    Problem,
    Terms,
    accumulator,
    num_rows,
    stages,
)
from ...core.similarity import nan_unless_finite
from .gradients import GradientCollector
from .launcher import Block, Work, groups, padded, splits, weighted
from .riders import riders

BLOCK = 4096  # rows and columns: 64 MB of float32 similarities; a multiple of every tile
STRIP = 512  # rows at a time of what is transposed


def kept_like(x: Tensor, y: Tensor | None, terms: Terms, keep: bool) -> list[Like]:
    """Places of extremes (K, N), 0 or NaN (), and twice nothing."""
    indexed = keep and any(t.indexed for t in terms)
    nothing: Like = ((0,), torch.int8)
    shape = (len(terms) if indexed else 0, x.shape[0])
    return [(shape, torch.int64), ((), accumulator(x.dtype)), nothing, nothing]


class _Place(NamedTuple):
    """Rows [i0, i1) of x against columns [j0, j1) of the references; `mirror`: it serves the columns' anchors too."""

    i0: int
    i1: int
    j0: int
    j1: int
    mirror: bool

    def block(self, s: Tensor) -> Block:
        return Block(self.i0, self.i1, self.j0, self.j1, s, (s.stride(0), 1))

    def transposed(self, s: Tensor) -> Block:
        return Block(self.j0, self.j1, self.i0, self.i1, s, (1, s.stride(0)))


def _places(n: int, m: int, square: bool) -> Iterator[_Place]:
    for i in range(0, n, BLOCK):
        for j in range(i if square else 0, m, BLOCK):
            yield _Place(i, min(i + BLOCK, n), j, min(j + BLOCK, m), square and j > i)


def _product(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """a b into `out` (float32 or float64), 16-bit factors with float32 sums."""
    if a.dtype == out.dtype:
        return torch.mm(a, b, out=out)
    if a.device.type == "cuda":
        return torch.mm(a, b, out_dtype=out.dtype, out=out)
    return torch.mm(a.to(out.dtype), b.to(out.dtype), out=out)


def _mirror(s: Tensor) -> None:
    """s (n, n), its upper triangle over the lower: both ends of a pair see the same bits, whatever the product's do."""
    for k in range(0, s.shape[0], STRIP):
        corner = s[k : k + STRIP, k : k + STRIP]
        corner.copy_(torch.where(torch.ones_like(corner, dtype=torch.bool).triu(), corner, corner.T))
        s[k + STRIP :, k : k + STRIP] = s[k : k + STRIP, k + STRIP :].T


class _Buffers:
    """One block of similarities, one of weights in the embeddings' dtype, and one of gradients."""

    def __init__(self, work: Work, backward: bool) -> None:
        rows, cols = min(BLOCK, work.n), min(BLOCK, work.m)
        self.s = torch.empty(rows, padded(cols), dtype=work.dtype, device=work.device)
        # float16 cannot hold small weights
        self.narrow = work.p.x.dtype if work.p.x.dtype != torch.float16 else work.dtype
        if backward:
            self.w = torch.empty(rows, padded(cols), dtype=self.narrow, device=work.device)
            self.g = torch.empty(max(rows, cols), work.d, dtype=work.dtype, device=work.device)

    def similarities(self, work: Work, at: _Place) -> Tensor:
        x, y = work.p.x[at.i0 : at.i1], work.p.refs[at.j0 : at.j1]
        s = _product(x, y.T, self.s[: at.i1 - at.i0, : at.j1 - at.j0])
        if work.square and at.i0 == at.j0:
            _mirror(s)
        return s

    def add(self, weights: Tensor, of: Tensor, to: Tensor | None) -> None:
        """to += weights of."""
        if to is None:
            return
        if weights.dtype == to.dtype:
            to.addmm_(weights, of.to(weights.dtype))
        else:
            to += _product(weights, of, self.g[: to.shape[0]])


def _compared(terms: Terms) -> bool:
    """Whether a window sets positives against an extreme of the same pairs, or of pairs that may be equal: then all
    similarities come from one kind of product, because two may differ in the last bit."""
    for t in terms:
        for of, shift in ((t.lower_of, t.lower_shift), (t.upper_of, t.upper_shift)):
            sides = {t.side, terms[of].side} if of >= 0 else set()
            if len(sides) == 2 and POSITIVES in sides and (NEGATIVES not in sides or shift == 0):
                return True
    return False


def _split(work: Work, chosen: Sequence[int]) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    """Launches of terms over all pairs, and over the band of positives."""
    together = _compared(work.terms)
    band = [k for k in chosen if work.terms[k].side == POSITIVES and not together]
    rest = [k for k in chosen if k not in band]
    return groups(work.terms, rest), groups(work.terms, band)


def forward(p: Problem, terms: Terms, operands: Operands, keep: bool) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Values (K, N), sorted, without logsumexp's offset; `keep`: for backward too."""
    work = Work(p, terms, operands)
    (shape, _), *_ = kept_like(p.x, p.y, terms, keep)
    values = torch.empty(num_rows(terms), work.n, dtype=work.dtype, device=work.device)
    ranks = torch.full(shape, -1, dtype=torch.int64, device=work.device)
    spoiled = nan_unless_finite(p.x, p.y).to(work.dtype)
    index = {k: ranks[k] if ranks.numel() and t.indexed else None for k, t in enumerate(terms)}
    count = splits(work.blocks(work.n), work.tiles(work.m), work.device)
    anchors = work.anchors()
    buffers = None
    for stage in stages(terms):
        riding = riders(terms, operands, stage)
        rest, band = _split(work, [k for k in stage if k not in riding])
        for group in band:
            work.reduce_all(group, count, spoiled, values, index, {}, riding)
        launches = [(group, [work.state(k, 1, index[k] is not None, values) for k in group]) for group in rest]
        for state in (state for _, states in launches for state in states):
            work.clear(state)
        if not launches:
            continue
        buffers = buffers or _Buffers(work, False)
        for at in _places(work.n, work.m, work.square):
            s = buffers.similarities(work, at)
            for group, states in launches:
                work.reduce(group, states, anchors, at.block(s), 1, carry=True)
                if at.mirror:
                    work.reduce(group, states, anchors, at.transposed(s), 1, carry=True)
        for group, states in launches:
            work.finish_all(group, states, spoiled, values, index, riding)
    places = work.places(ranks) if ranks.numel() else ranks
    nothing = torch.empty(0, dtype=torch.int8, device=work.device)
    return values, (places, spoiled, nothing, nothing.clone())


def backward(
    p: Problem, terms: Terms, operands: Operands, values: Tensor, kept: Sequence[Tensor],
    grads: Sequence[Tensor | None], need: Sequence[bool],
) -> Gradients:  # fmt: skip
    """Gradients from dL/dr, K tensors (N,) or None; `need`: of x, y, scale, offset, ref_offset."""
    places, spoiled, *_ = kept
    work = Work(p, terms, operands)
    found = GradientCollector(work, values, grads, need, spoiled)
    rest, band = _split(work, weighted(terms, grads))
    in_band = [k for group in band for k in group]
    anchors = work.anchors()
    references = anchors if work.square else work.references()
    dx = dy = None
    if need[0] or found.of_anchors:
        dx = found.rows(anchors, in_band, need[0], exact=True, lists=None)
    if not work.square and (need[1] or found.ref_offset is not None):
        dy = found.rows(references, in_band, need[1], exact=True, lists=None)
    to_refs = dx if work.square else dy
    pull = _pull(work, work.n)
    ref_pull = pull if work.square else _pull(work, work.m)
    buffers = _Buffers(work, True) if rest else None
    for group in rest:
        assert buffers is not None
        slots = found.slots(group, anchors, 1)
        ref_slots = slots if work.square else found.slots(group, references, 1)
        sums = pull is not None or any(s.d_scale is not None or s.d_offset is not None for s in slots)
        ref_sums = ref_pull is not None or any(s.d_ref_offset is not None for s in ref_slots)
        for at in _places(work.n, work.m, work.square):
            s = buffers.similarities(work, at)
            w = buffers.w[: s.shape[0], : s.shape[1]]
            if p.end is not None or all(terms[k].side == POSITIVES for k in group):
                w.zero_()  # columns past the end, or off the band, are not visited
            work.weigh(
                group, slots, anchors, at.block(s), spoiled, carry=True, pull=pull, weights=w,
                weight_strides=(w.stride(0), 1), close_dx=None if pull is None else dx,
            )  # fmt: skip
            if (at.mirror and (sums or ref_sums)) or (not work.square and ref_sums):
                work.weigh(
                    group, ref_slots, references, at.transposed(s), spoiled, carry=True, pull=ref_pull,
                    close_dx=None if ref_pull is None else to_refs,
                )  # fmt: skip
            buffers.add(w, p.refs[at.j0 : at.j1], None if dx is None else dx[at.i0 : at.i1])
            if to_refs is not None and (at.mirror or not work.square):
                buffers.add(w.T, p.x[at.i0 : at.i1], to_refs[at.j0 : at.j1])
        found.settle()
    for to, x, by in ((dx, p.x, pull), (dy, p.y, ref_pull)):
        if to is not None and x is not None:
            if by is not None:
                to.addcmul_(by[:, None], x.to(work.dtype))
            to += spoiled
    for k, t in enumerate(terms):
        if t.indexed:
            found.add_extreme(k, places[k], dx, to_refs)
    return found.gradients(dx, dy)


def _pull(work: Work, rows: int) -> Tensor | None:
    """What Euclidean distances pull along the rows' own vectors."""
    return None if work.p.distance == "dot" else torch.zeros(rows, dtype=work.dtype, device=work.device)
