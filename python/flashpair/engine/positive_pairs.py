"""The few pairs that are positive, as numbers (N, K) for a loss to do with in PyTorch what it likes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..backends import extension
from ..backends.cpu import tiled
from ..core.problem import plain
from ..core.similarity import dense_pairs, listed_pairs, taken


def listed_similarities(x: Tensor, y: Tensor, at: Tensor, distance: str) -> Tensor:
    """z (N, K) of rows x_i (N, D) and y_j (M, D), j = at[i, k] (N, K) int64. On the CPU the bits that `tiled` has for
    these pairs, so that a negative which is an exact copy of a positive is as near as it."""
    if x.device.type == "cpu" and plain(x) and plain(y) and not isinstance(extension.load(), str):
        rows = torch.arange(x.shape[0], device=x.device)[:, None].expand_as(at)
        return tiled.pair_similarities(x, y, rows, at, distance)
    return torch.stack([listed_pairs(x, y.index_select(0, j), distance) for j in at.unbind(1)], 1)


def dense_similarities(x: Tensor, y: Tensor, distance: str) -> Tensor:
    """z (N, M) of all pairs, differentiable; on the CPU the bits that `tiled` has: a window, a hinge and an extreme are
    then of the same pairs as there."""
    z = dense_pairs(x, y, distance)
    if x.device.type != "cpu" or not (plain(x) and plain(y)) or isinstance(extension.load(), str):
        return z
    return taken(z, tiled.all_similarities(x.detach(), y.detach(), distance))


def pair_gradients(x: Tensor, other: Tensor, g: Tensor, distance: str) -> tuple[Tensor, Tensor]:
    """What dL/dz = g (N,) of rows x (N, D) with rows `other` (N, D) gives to both. Differentiable."""
    if distance == "dot":
        return g[:, None] * other, g[:, None] * x
    if distance == "squared_euclidean":
        u = 2 * g
    else:
        z = listed_pairs(x, other, distance)
        u = torch.where(z > 0, g / torch.where(z > 0, z, 1.0), 0.0)
    to_x = u[:, None] * (x - other)
    return to_x, -to_x


class _PositivePairs(torch.autograd.Function):
    """z (N, K) of rows x_i and y_at(i,k), without x's and y's rows for each of them; y None: they are x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor | None, at: Tensor, distance: str) -> Tensor:
        ctx.save_for_backward(x, y, at)
        ctx.distance = distance
        return listed_similarities(x, x if y is None else y, at, distance)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, y, at = ctx.saved_tensors
        refs = x if y is None else y
        dx, dy = torch.zeros_like(x), torch.zeros_like(refs)
        for j, w in zip(at.unbind(1), g.unbind(1), strict=True):
            to_x, to_other = pair_gradients(x, refs.index_select(0, j), w, ctx.distance)
            dx = dx + to_x
            if y is None or ctx.needs_input_grad[1]:
                dy = dy.index_add(0, j, to_other)
        return (dx + dy, None, None, None) if y is None else (dx, dy, None, None)


def positive_pairs(x: Tensor, y: Tensor, at: Tensor, distance: str) -> Tensor:
    """z (N, K) of rows x_i (N, D) and y_j (M, D), j = at[i, k] (N, K) int64. Differentiable twice."""
    if y.shape[0] == 0:
        return x.new_zeros(at.shape) + x.sum(1, keepdim=True) * 0
    z: Tensor = _PositivePairs.apply(x, None if y is x else y, at, distance)
    return z
