"""`screened` on the GPU: pairs proved outside of every window in int8 are not computed; Triton.

Computes: as `fused`. Quantised rows bound all similarities in one int8 product (kernels/screen.py); the pairs that may
be inside of a window, the candidates, get an exact one, with their reductions, weights and gradients
(kernels/candidates.py). Blocks of pairs with more of them than a list is worth go through `fused`'s kernels; where all
do, this is `fused`.
Never materialises: similarities, estimates, masks. Beside inputs and outputs: the rows as int8, a byte a block of
pairs, and room for a bounded number of candidates a row.
Keeps for backward: the row values, the places of extremes, the candidates with their similarities, the bytes of blocks.
Deterministic: a program owns its rows; no atomics.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ...core.problem import POSITIVES, Gradients, Like, Operands, Problem, Terms, accumulator, stages
from .forward_pass import ForwardPass, places_shape
from .gradients import GradientCollector
from .launcher import Role
from .screened_tiles import Candidates, ScreenedTiles, screen_shape
from .term_groups import launch_groups

Group = tuple[int, ...]


def _screened(terms: Terms, group: Sequence[int]) -> Group:
    """The terms of a launch that are screened: all but those of positives, which are few."""
    return tuple(k for k in group if terms[k].side != POSITIVES)


def _kept_lists(terms: Terms) -> dict[Group, int]:
    """Where the candidates stand that backward needs, by the terms that they were found for."""
    groups = [_screened(terms, group) for stage in stages(terms) for group in launch_groups(terms, stage)]
    weighted = [group for group in groups if any(terms[k].weighted for k in group)]
    return {group: place for place, group in enumerate(weighted)}


def kept_like(x: Tensor, y: Tensor | None, terms: Terms, keep: bool) -> list[Like]:
    """Places of extremes (K, N), candidates' keys (lists, L), dense blocks (lists, row blocks, column blocks), and
    candidates' similarities (lists L + 1), the last of which is 0 or NaN."""
    (n, d), m = x.shape, (x if y is None else y).shape[0]
    lists = len(_kept_lists(terms)) if keep else 0
    shape = screen_shape(n, m, d, x.device)
    return [
        (places_shape(n, terms, keep), torch.int64),
        ((lists, shape.room), torch.int64),
        ((lists, shape.row_blocks, shape.col_blocks), torch.int8),
        ((lists * shape.room + 1,), accumulator(x.dtype)),
    ]


def forward(p: Problem, terms: Terms, operands: Operands, keep: bool) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Values (K, N), sorted; `keep`: and what backward needs."""
    f = ForwardPass(p, terms, operands, keep)
    launcher, tiles = f.launcher, ScreenedTiles(f.launcher)
    kept_lists = _kept_lists(terms) if keep else {}
    _, *kept = (torch.empty(s, dtype=dtype, device=p.x.device) for s, dtype in kept_like(p.x, p.y, terms, keep))
    keys, dense, z = kept
    z[-1] = f.nonfinite
    for stage in f.stages(share=False):
        for group in launch_groups(terms, stage):
            screened = _screened(terms, group)
            if not screened:
                f.reduce_all_pairs(group)
                continue
            found = tiles.find(screened, f.values)
            # Behind the states of the launch over dense blocks is one of the candidates.
            states = [f.state(k, f.splits + (k in screened)) for k in group]
            listed = tiles.dense_tiles(found.dense, f.anchors)
            launcher.reduce(group, states, f.anchors, f.all_pairs, f.splits, listed=listed)
            tiles.reduce(screened, [s for k, s in zip(group, states, strict=True) if k in screened], found, f.splits)
            f.merge(group, states)
            if screened in kept_lists:
                place = kept_lists[screened]
                keys[place], dense[place], tiles.list_of(z, place)[:] = found.keys, found.dense, found.z
    return f.values, (f.places(), keys, dense, z)


def backward(
    p: Problem, terms: Terms, operands: Operands, values: Tensor, kept: Sequence[Tensor],
    grads: Sequence[Tensor | None], need: Sequence[bool],
) -> Gradients:  # fmt: skip
    """Gradients from dL/dr, K tensors (N,) or None; `need`: of x, y, scale, offset, ref_offset."""
    places, keys, dense, z = kept
    g = GradientCollector(p, terms, operands, values, grads, need, z[-1])
    tiles = ScreenedTiles(g.launcher)
    positives = [k for k in g.weighted if terms[k].side == POSITIVES]

    def lists() -> Iterator[tuple[list[int], Candidates]]:
        """The weighted terms, and what was found for them."""
        for group, place in _kept_lists(terms).items():
            if chosen := [k for k in group if k in g.weighted]:
                starts = tiles.starts(keys[place], g.launcher.n)
                yield chosen, Candidates(keys[place], tiles.list_of(z, place), starts, dense[place])

    found = list(lists())

    def row_grads(role: Role, want: bool) -> Tensor | None:
        """Through the pairs of dense blocks, and of positives."""
        if not found:
            return g.row_grads(role, positives, want, added_to=True)
        total = None
        for place, (chosen, candidates) in enumerate(found):
            chosen = chosen if place else [*chosen, *positives]
            listed = tiles.dense_tiles(candidates.dense, role)
            part = g.row_grads(role, chosen, want, added_to=True, listed=listed)
            total = part if total is None or part is None else total.add_(part)
        return total

    dx, dy = g.each_side(row_grads)
    to_refs = dx if g.launcher.square else dy
    for chosen, candidates in found if g.wants_anchors or g.wants_references else ():
        weights, ref_shares = tiles.backward(chosen, candidates, g)
        if dx is not None:
            tiles.add_grads(candidates, weights, dx)
        if to_refs is None and g.ref_offset is None:
            continue
        mirror = tiles.mirrored(candidates.keys)
        if to_refs is not None:
            tiles.add_grads(candidates, weights, to_refs, mirror)
        for k, shares in zip(chosen, ref_shares, strict=True):
            if shares is not None and g.ref_offset is not None:
                g.ref_offset[k] += tiles.sum_columns(mirror, shares)
    return g.finish(dx, dy, places)
