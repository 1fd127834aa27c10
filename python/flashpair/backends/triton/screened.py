"""`screened` on the GPU: pairs proved outside of every window in int8 are not computed; Triton.

Computes: as `fused`. Quantised rows bound all similarities in one int8 product (kernels/screen.py); the pairs that may
be inside of a window get an exact one, with their reductions, weights and gradients (kernels/survivors.py). Blocks of
pairs with more of them than a list is worth go through `fused`'s kernels; where all do, this is `fused`.
Never materialises: similarities, estimates, masks. Beside inputs and outputs: the rows as int8, a byte a block of
pairs, and room for a bounded number of survivors a row.
Keeps for backward: the row values, the places of extremes, the survivors with their similarities, the bytes of blocks.
Deterministic: a program owns its rows; no atomics.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...core.problem import POSITIVES, Gradients, Like, Operands, Problem, Terms, accumulator, num_rows, stages
from ...core.similarity import nan_unless_finite
from .gradients import GradientCollector
from .launcher import Block, Side, Work, groups, splits, weighted
from .screened_tiles import Found, Sieve, plan


def _off_band(terms: Terms) -> list[tuple[int, ...]]:
    """The terms of pairs off the positives' band, one or two to a list of survivors, in the order of stages."""
    found = []
    for stage in stages(terms):
        for group in groups(terms, stage):
            if off := tuple(k for k in group if terms[k].side != POSITIVES):
                found.append(off)
    return found


def _kept(terms: Terms) -> dict[tuple[int, ...], int]:
    """Where the lists stand that backward needs."""
    found = [group for group in _off_band(terms) if any(terms[k].weighted for k in group)]
    return {group: place for place, group in enumerate(found)}


def kept_like(x: Tensor, y: Tensor | None, terms: Terms, keep: bool) -> list[Like]:
    """Places of extremes (K, N), survivors' keys (lists, L), dense blocks (lists, row blocks, column blocks), and
    survivors' similarities (lists L + 1), the last of which is 0 or NaN."""
    (n, d), m = x.shape, (x if y is None else y).shape[0]
    indexed = keep and any(t.indexed for t in terms)
    lists = len(_kept(terms)) if keep else 0
    _, blocks, room = plan(n, m, d, x.device)
    return [
        ((len(terms) if indexed else 0, n), torch.int64),
        ((lists, room), torch.int64),
        ((lists, *blocks), torch.int8),
        ((lists * room + 1,), accumulator(x.dtype)),
    ]


def forward(p: Problem, terms: Terms, operands: Operands, keep: bool) -> tuple[Tensor, tuple[Tensor, ...]]:
    work = Work(p, terms, operands)
    sieve = Sieve(work)
    (index_shape, _), (keys_shape, _), (dense_shape, _), (z_shape, _) = kept_like(p.x, p.y, terms, keep)
    values = torch.empty(num_rows(terms), work.n, dtype=work.dtype, device=work.device)
    ranks = torch.full(index_shape, -1, dtype=torch.int64, device=work.device)
    keys = torch.empty(keys_shape, dtype=torch.int64, device=work.device)
    dense = torch.empty(dense_shape, dtype=torch.int8, device=work.device)
    z = values.new_empty(z_shape)
    spoiled = nan_unless_finite(p.x, p.y).to(work.dtype)
    z[-1] = spoiled
    kept = _kept(terms) if keep else {}
    count = splits(work.blocks(work.n), work.tiles(work.m), work.device)
    index = {k: ranks[k] if ranks.numel() and t.indexed else None for k, t in enumerate(terms)}
    for stage in stages(terms):
        for group in groups(terms, stage):
            off = tuple(k for k in group if terms[k].side != POSITIVES)
            if not off:
                work.reduce_all(group, count, spoiled, values, index, {}, {})
                continue
            found = sieve.find(off, values)
            states = [work.state(k, count + (k in off), index[k] is not None, values) for k in group]
            lists = sieve.lists(found.dense, work.anchors())
            work.reduce(group, states, work.anchors(), Block(0, work.n, 0, work.m), count, lists=lists)
            sieve.fold(off, [s for k, s in zip(group, states, strict=True) if k in off], found)
            work.finish_all(group, states, spoiled, values, index, {})
            if off in kept:
                place = kept[off]
                keys[place], dense[place] = found.keys, found.dense
                z[place * sieve.room : (place + 1) * sieve.room] = found.z
    places = work.places(ranks) if ranks.numel() else ranks
    return values, (places, keys, dense, z)


def backward(
    p: Problem, terms: Terms, operands: Operands, values: Tensor, kept: Sequence[Tensor],
    grads: Sequence[Tensor | None], need: Sequence[bool],
) -> Gradients:  # fmt: skip
    """Gradients from dL/dr, K tensors (N,) or None; `need`: of x, y, scale, offset, ref_offset."""
    places, keys, dense, z = kept
    work = Work(p, terms, operands)
    sieve = Sieve(work)
    found = GradientCollector(work, values, grads, need, z[-1])
    active = weighted(terms, grads)
    extremes = [k for k, t in enumerate(terms) if t.indexed and grads[k] is not None]
    each = [
        (chosen, Found(keys[place], z[place * sieve.room : (place + 1) * sieve.room],
                       sieve.starts(keys[place], work.n), dense[place]))
        for group, place in _kept(terms).items()
        if (chosen := [k for k in group if k in active])
    ]  # fmt: skip
    in_band = [k for k in active if terms[k].side == POSITIVES]
    anchors = need[0] or found.of_anchors
    references = not work.square and (need[1] or found.ref_offset is not None)

    def rows(side: Side, want: bool) -> Tensor | None:
        total = None
        for place, (chosen, own) in enumerate(each):
            chosen = chosen if place else [*chosen, *in_band]
            part = found.rows(side, chosen, want, exact=True, lists=sieve.lists(own.dense, side))
            total = part if total is None or part is None else total.add_(part)
        return total if each else found.rows(side, in_band, want, exact=True, lists=None)

    dx = rows(work.anchors(), need[0]) if anchors else None
    dy = rows(work.references(), need[1]) if references else None
    for chosen, own in each if anchors or references else ():
        weights, shares = sieve.weigh(chosen, own, found)
        if dx is not None:
            sieve.spread(own, weights, dx)
        onto = dx if work.square else dy
        if onto is None and found.ref_offset is None:
            continue
        mirror = sieve.mirrored(own.keys)
        if onto is not None:
            sieve.spread(own, weights, onto, mirror)
        for k, share in zip(chosen, shares, strict=True):
            if share is not None and found.ref_offset is not None:
                found.ref_offset[k] += sieve.sum_columns(mirror, share)
    for k in extremes:
        found.add_extreme(k, places[k], dx, dx if work.square else dy)
    return found.gradients(dx, dy)
