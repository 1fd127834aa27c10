"""`fused`: similarity, mask, window, reduction, and in backward weight and second product, in one Triton kernel.

Computes: the row reductions of an N x M problem, and their gradients; kernels/reduce.py and kernels/backward.py.
Never materialises: similarities, weights, masks. Beside inputs and outputs: a few numbers a row and split, and where a
window bounds all terms of negatives, one byte for each tile of pairs.
Keeps for backward: the row values, the places of extremes, those bytes (a tile of which no pair counts is not visited).
Deterministic: a program owns its rows; no atomics.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...core.problem import Gradients, Like, Operands, Problem, Terms, accumulator
from .forward_pass import ForwardPass, places_shape
from .gradients import GradientCollector
from .kernels import configs
from .launch import padded
from .launcher import Role
from .term_groups import launch_groups, windowed_terms


def _live_shape(x: Tensor, m: int, terms: Terms, keep: bool) -> tuple[int, int, int]:
    """Of the bytes of live tiles: (terms with a window, row blocks, padded tiles)."""
    planes, (n, d) = len(windowed_terms(terms)) if keep else 0, x.shape
    if not planes:
        return 0, 0, 0
    c = configs.choose(configs.family(x.device), x.dtype, d)
    return planes, -(-n // c.rows), padded(-(-m // c.cols))


def kept_like(x: Tensor, y: Tensor | None, terms: Terms, keep: bool) -> list[Like]:
    """Places of extremes (K, N), bytes of live tiles, 0 or NaN (), and nothing."""
    n, m = x.shape[0], (x if y is None else y).shape[0]
    return [
        (places_shape(n, terms, keep), torch.int64),
        (_live_shape(x, m, terms, keep), torch.int8),
        ((), accumulator(x.dtype)),
        ((0,), torch.int8),
    ]


def forward(p: Problem, terms: Terms, operands: Operands, keep: bool) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Values (K, N), sorted; `keep`: and what backward needs."""
    f = ForwardPass(p, terms, operands, keep)
    live = torch.zeros(_live_shape(p.x, f.launcher.m, terms, keep), dtype=torch.int8, device=p.x.device)
    planes = dict(zip(windowed_terms(terms), live, strict=False))
    for stage in f.stages():
        for group in launch_groups(terms, stage):
            f.reduce_all_pairs(group, planes)
    nothing = torch.empty(0, dtype=torch.int8, device=p.x.device)
    return f.values, (f.places(), live, f.nonfinite, nothing)


def backward(
    p: Problem, terms: Terms, operands: Operands, values: Tensor, kept: Sequence[Tensor],
    grads: Sequence[Tensor | None], need: Sequence[bool],
) -> Gradients:  # fmt: skip
    """Gradients from dL/dr, K tensors (N,) or None; `need`: of x, y, scale, offset, ref_offset."""
    places, live, nonfinite, _ = kept
    g = GradientCollector(p, terms, operands, values, grads, need, nonfinite)

    def row_grads(role: Role, want: bool) -> Tensor | None:
        listed = None
        if live.numel() and g.weighted:
            listed = {g.launcher.config.cols: g.launcher.list_tiles(live, role)}
        return g.row_grads(role, g.weighted, want, added_to=bool(g.extremes), listed=listed)

    return g.finish(*g.each_side(row_grads), places)
