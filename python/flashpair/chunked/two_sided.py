"""Two groups of anchors that are each other's references: one tile of similarities serves both ends of its pairs.

A problem with `split` holds both in one array of rows, each group sorted by label by itself. The CPU's `tiled` computes
it so; elsewhere it is two rectangular problems, with every similarity computed twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..backends.cpu import tiled
from ..core.problem import Gradients, Operands, Problem, Terms
from ..engine import row_reduce_op


def kept_of(module: Any, p: Problem, terms: Terms, places: Tensor | None) -> list[Tensor]:
    """What the schedule `module` keeps of a call that keeps nothing but the places of extremes (K, N), if any."""
    likes = module.kept_like(p.x, p.y, terms, False)
    kept = [torch.zeros(shape, dtype=dtype, device=p.x.device) for shape, dtype in likes]
    return kept if places is None else [places, *kept[1:]]


def ranks(order: Tensor) -> Tensor:
    """0 to M - 1 in the order of places (M,), which may be of more references than these. Schedules on a GPU take the
    first for an index, and for 32 bits."""
    rank = torch.arange(order.shape[0], device=order.device)
    return torch.empty_like(order).index_copy(0, torch.argsort(order), rank)


def joined(impl: str, problem: Problem) -> bool:
    return impl in ("tiled", "screened") and problem.x.device.type == "cpu"


def forward(impl: str, p: Problem, terms: Terms, operands: Operands, keep: bool) -> tuple[Tensor, Tensor]:
    """Values (K, N) of a problem with `split`, and the rows of extremes (K, N), of no elements where none are kept."""
    if joined(impl, p):
        values, kept = tiled.forward(p, terms, operands, keep)
        return values, kept.extreme
    sides = [row_reduce_op.schedule_of(impl, p.x.device).forward(*side, keep) for side in _sides(p, terms, operands)]
    places = [kept[0] for _, kept in sides]
    if places[0].numel() or places[1].numel():
        places[0] = torch.where(places[0] < 0, -1, places[0] + p.split)
    return torch.cat([values for values, _ in sides], 1), torch.cat(places, 1)


def backward(
    impl: str, p: Problem, terms: Terms, operands: Operands, values: Tensor, places: Tensor | None,
    grads: Sequence[Tensor], need: Sequence[bool],
) -> Gradients:  # fmt: skip
    """Gradients of x (N, D), scale (K,), offset and ref_offset (K, N)."""
    module = row_reduce_op.schedule_of(impl, p.x.device)
    if joined(impl, p):
        return tiled.backward(p, terms, operands, values, kept_of(module, p, terms, places), grads, need)
    rows = (slice(0, p.split), slice(p.split, None))
    parts = []
    for k, (problem, own, theirs) in enumerate(_sides(p, terms, operands)):
        at = None
        if places is not None:
            at = places[:, rows[k]].contiguous()
            at = torch.where(at < 0, -1, at - p.split) if k == 0 else at
        kept = kept_of(module, problem, own, at)
        mine = [g[rows[k]].contiguous() for g in grads]
        wants = [need[0], need[0], *need[2:]]
        parts.append(module.backward(problem, own, theirs, values[:, rows[k]].contiguous(), kept, mine, wants))

    def both(one: Tensor | None, other: Tensor | None, dim: int) -> Tensor | None:
        return None if one is None or other is None else torch.cat([one, other], dim)

    a, b = parts
    dx, crossed = both(a.x, b.x, 0), both(b.y, a.y, 0)
    scale = None if a.scale is None or b.scale is None else a.scale + b.scale
    return Gradients(
        None if dx is None or crossed is None else dx + crossed, None, scale,
        both(a.offset, b.offset, 1), both(b.ref_offset, a.ref_offset, 1),
    )  # fmt: skip


def _sides(p: Problem, terms: Terms, operands: Operands) -> list[tuple[Problem, Terms, Operands]]:
    """The rectangular problems: the first group against the second, and the other way round."""
    one, other = slice(0, p.split), slice(p.split, None)
    sides: list[Any] = []
    for own, refs, shift in ((one, other, p.split), (other, one, 0)):
        problem = Problem(
            p.x[own], p.x[refs], p.lo[own] - shift, p.hi[own] - shift, None, ranks(p.order[refs]), p.distance
        )
        sides.append((problem, terms, sliced(terms, operands, own, refs)))
    return sides


def sliced(terms: Terms, operands: Operands, own: slice, refs: slice) -> Operands:
    """The operands of anchors `own` against references `refs` of a problem whose references are its anchors."""
    of_refs = {t.slots[1] for t in terms}
    vectors = [v[refs if k in of_refs else own].contiguous() for k, v in enumerate(operands.vectors)]
    return Operands(operands.scale, operands.scales, vectors)
