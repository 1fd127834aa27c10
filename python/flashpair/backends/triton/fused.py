"""`fused`: similarity, mask, window, reduction, and in backward weight and second product, in one Triton kernel.

Computes: the row reductions of an N x M problem, and their gradients; kernels/reduce.py and kernels/gradient.py.
Never materialises: similarities, weights, masks. Beside inputs and outputs: a few numbers a row and split, and where a
window bounds all pairs off the band, one byte for each tile of pairs.
Keeps for backward: the row values, the places of extremes, those bytes (dead tiles are not visited again).
Deterministic: a program owns its rows; no atomics.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...core.problem import Gradients, Like, Operands, Problem, Terms, accumulator, num_rows, stages
from ...core.similarity import nan_unless_finite
from .gradients import GradientCollector
from .kernels import configs
from .launcher import Side, Work, groups, padded, splits, weighted, windowed
from .riders import riders


def _live_shape(n: int, m: int, d: int, dtype: torch.dtype, device: torch.device, terms: Terms) -> tuple[int, int, int]:
    planes = len(windowed(terms))
    if not planes:
        return 0, 0, 0
    c = configs.choose(configs.family(device), dtype, d)
    return planes, -(-n // c.rows), padded(-(-m // c.cols))


def kept_like(x: Tensor, y: Tensor | None, terms: Terms, keep: bool) -> list[Like]:
    """Places of extremes (K, N), bytes of live tiles (planes, row blocks, padded tiles), 0 or NaN (), and nothing."""
    (n, d), m = x.shape, (x if y is None else y).shape[0]
    indexed = keep and any(t.indexed for t in terms)
    live = _live_shape(n, m, d, x.dtype, x.device, terms) if keep else (0, 0, 0)
    return [
        ((len(terms) if indexed else 0, n), torch.int64),
        (live, torch.int8),
        ((), accumulator(x.dtype)),
        ((0,), torch.int8),
    ]


def forward(p: Problem, terms: Terms, operands: Operands, keep: bool) -> tuple[Tensor, tuple[Tensor, ...]]:
    work = Work(p, terms, operands)
    (index_shape, _), (live_shape, _), *_ = kept_like(p.x, p.y, terms, keep)
    values = torch.empty(num_rows(terms), work.n, dtype=work.dtype, device=work.device)
    ranks = torch.full(index_shape, -1, dtype=torch.int64, device=work.device)
    live = torch.zeros(live_shape, dtype=torch.int8, device=work.device)
    planes = {k: live[place] for place, k in enumerate(windowed(terms) if live_shape[0] else [])}
    spoiled = nan_unless_finite(p.x, p.y).to(work.dtype)
    count = splits(work.blocks(work.n), work.tiles(work.m), work.device)
    index = {k: ranks[k] if ranks.numel() and t.indexed else None for k, t in enumerate(terms)}
    for stage in stages(terms):
        riding = riders(terms, operands, stage)
        for group in groups(terms, [k for k in stage if k not in riding]):
            work.reduce_all(group, count, spoiled, values, index, planes, riding)
    places = work.places(ranks) if ranks.numel() else ranks
    return values, (places, live, spoiled, torch.empty(0, dtype=torch.int8, device=work.device))


def backward(
    p: Problem, terms: Terms, operands: Operands, values: Tensor, kept: Sequence[Tensor],
    grads: Sequence[Tensor | None], need: Sequence[bool],
) -> Gradients:  # fmt: skip
    """Gradients from dL/dr, K tensors (N,) or None; `need`: of x, y, scale, offset, ref_offset."""
    places, live, spoiled, _ = kept
    work = Work(p, terms, operands)
    found = GradientCollector(work, values, grads, need, spoiled)
    active = weighted(terms, grads)
    extremes = [k for k, t in enumerate(terms) if t.indexed and grads[k] is not None]

    def rows(side: Side, want: bool) -> Tensor | None:
        lists = {work.config.cols: work.list_live(live, side)} if live.numel() and active else None
        return found.rows(side, active, want, exact=bool(extremes), lists=lists)

    dx = dy = None
    if need[0] or found.of_anchors:
        dx = rows(work.anchors(), need[0])
    if not work.square and (need[1] or found.ref_offset is not None):
        dy = rows(work.references(), need[1])
    for k in extremes:
        found.add_extreme(k, places[k], dx, dx if work.square else dy)
    return found.gradients(dx, dy)
