"""Two-sided problems: two groups of anchors that are each other's references.

`Problem.split` says where the second group begins. `tiled` on the CPU takes a two-sided problem as it is, and computes
each similarity once for both ends of the pair. For other backends it becomes two problems with references of their own,
one for each direction, and each similarity is computed twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..backends.cpu import tiled
from ..core.call import REF_OFFSET
from ..core.problem import Gradients, Operands, Problem, Terms
from ..engine import row_reduce_op


def kept_of(module: Any, p: Problem, terms: Terms, places: Tensor | None) -> list[Tensor]:
    """The kept tensors of a forward pass that listed no live pairs.

    Args:
        module: the backend.
        p: the problem.
        terms: the K terms.
        places: (K, N) int64, the reference that attained each extreme, or -1; None: no extremes are kept.
    """
    likes = module.kept_like(p.x, p.y, terms, False)
    kept = [torch.zeros(shape, dtype=dtype, device=p.x.device) for shape, dtype in likes]
    return kept if places is None else [places, *kept[1:]]


def ranks(order: Tensor) -> Tensor:
    """The ranks 0 to M - 1 of some references, from their indices among more references. order: (M,) int64.

    Backends on a GPU use `Problem.order` as an index below M of 32 bits.
    """
    rank = torch.arange(order.shape[0], device=order.device)
    return torch.empty_like(order).index_copy(0, torch.argsort(order), rank)


def in_one_problem(backend: str, p: Problem) -> bool:
    """Whether the backend takes a two-sided problem as it is."""
    return backend in ("tiled", "screened") and p.x.device.type == "cpu"


def forward(backend: str, p: Problem, terms: Terms, operands: Operands, keep: bool) -> tuple[Tensor, Tensor]:
    """Forward of a two-sided problem of N rows.

    Args:
        backend: the name of the backend.
        p: the problem.
        terms: the K terms.
        operands: their operands.
        keep: the places of extremes are needed.

    Returns:
        The values (R, N), and the row that attained each extreme (K, N) int64; an empty tensor where it is not needed.
    """
    if in_one_problem(backend, p):
        values, kept = tiled.forward(p, terms, operands, keep)
        return values, kept.extreme
    module = row_reduce_op.backend_module(backend, p.x.device)
    sides = [
        module.forward(problem, terms, side_operands, keep) for problem, side_operands in _sides(p, terms, operands)
    ]
    places = [kept[0] for _, kept in sides]
    if places[0].numel() or places[1].numel():
        places[0] = torch.where(places[0] < 0, -1, places[0] + p.split)
    return torch.cat([values for values, _ in sides], 1), torch.cat(places, 1)


def backward(
    backend: str, p: Problem, terms: Terms, operands: Operands, values: Tensor, places: Tensor | None,
    grads: Sequence[Tensor], need: Sequence[bool],
) -> Gradients:  # fmt: skip
    """Backward of a two-sided problem of N rows.

    Args:
        backend: the name of the backend.
        p: the problem.
        terms: the K terms.
        operands: their operands.
        values: (R, N), from forward.
        places: (K, N) int64, from forward, or None.
        grads: K tensors (N,), the gradients of the values.
        need: whether gradients of x, y, scale, offset and ref_offset are needed.

    Returns:
        Gradients of x (N, D), scale (K,), offset (K, N) and ref_offset (K, N).
    """
    module = row_reduce_op.backend_module(backend, p.x.device)
    if in_one_problem(backend, p):
        return tiled.backward(p, terms, operands, values, kept_of(module, p, terms, places), grads, need)
    groups = (slice(0, p.split), slice(p.split, None))
    sides = []
    for k, (problem, side_operands) in enumerate(_sides(p, terms, operands)):
        side_places = None
        if places is not None:
            side_places = places[:, groups[k]].contiguous()
            side_places = torch.where(side_places < 0, -1, side_places - p.split) if k == 0 else side_places
        kept = kept_of(module, problem, terms, side_places)
        side_grads = [g[groups[k]].contiguous() for g in grads]
        side_values = values[:, groups[k]].contiguous()
        side_need = [need[0], need[0], *need[2:]]
        sides.append(module.backward(problem, terms, side_operands, side_values, kept, side_grads, side_need))

    def concatenated(a: Tensor | None, b: Tensor | None, dim: int) -> Tensor | None:
        return None if a is None or b is None else torch.cat([a, b], dim)

    first, second = sides
    as_anchors, as_refs = concatenated(first.x, second.x, 0), concatenated(second.y, first.y, 0)
    scale = None if first.scale is None or second.scale is None else first.scale + second.scale
    return Gradients(
        None if as_anchors is None or as_refs is None else as_anchors + as_refs, None, scale,
        concatenated(first.offset, second.offset, 1), concatenated(second.ref_offset, first.ref_offset, 1),
    )  # fmt: skip


def _sides(p: Problem, terms: Terms, operands: Operands) -> list[tuple[Problem, Operands]]:
    """The two directions as problems with references: the first group against the second, and the reverse."""
    first, second = slice(0, p.split), slice(p.split, None)
    sides = []
    for anchors, refs, shift in ((first, second, p.split), (second, first, 0)):
        problem = Problem(
            p.x[anchors], p.x[refs], p.lo[anchors] - shift, p.hi[anchors] - shift, None, ranks(p.order[refs]),
            p.distance,
        )  # fmt: skip
        sides.append((problem, _side_operands(terms, operands, anchors, refs)))
    return sides


def _side_operands(terms: Terms, operands: Operands, anchors: slice, refs: slice) -> Operands:
    """The operands of some rows as anchors and other rows as references, from vectors (N,) of all rows."""
    ref_offsets = {t.slots[REF_OFFSET] for t in terms}
    vectors = [v[refs if k in ref_offsets else anchors].contiguous() for k, v in enumerate(operands.vectors)]
    return Operands(operands.scale, operands.scales, vectors)
