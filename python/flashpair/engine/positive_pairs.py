"""Similarities of given pairs as tensors (N, K), on which a loss can use ordinary PyTorch, and dense similarities."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..backends import extension
from ..backends.cpu import tiled
from ..core.problem import plain
from ..core.similarity import dense_pairs, listed_pairs, taken


def listed_similarities(x: Tensor, y: Tensor, refs: Tensor, distance: str) -> Tensor:
    """The similarity of each row with each of its K references, (N, K).

    On the CPU they have the bits of `tiled`. So a negative that is an exact copy of a positive is exactly as near.

    Args:
        x: (N, D), the rows.
        y: (M, D), the references.
        refs: (N, K) int64, the references of each row.
        distance: ``"dot"``, ``"euclidean"`` or ``"squared_euclidean"``.
    """
    if x.device.type == "cpu" and plain(x) and plain(y) and not isinstance(extension.load(), str):
        rows = torch.arange(x.shape[0], device=x.device)[:, None].expand_as(refs)
        return tiled.pair_similarities(x, y, rows, refs, distance)
    return torch.stack([listed_pairs(x, y.index_select(0, j), distance) for j in refs.unbind(1)], 1)


def dense_similarities(x: Tensor, y: Tensor, distance: str) -> Tensor:
    """The similarities (N, M) of all rows of x (N, D) with all rows of y (M, D). Differentiable.

    On the CPU they have the bits of `tiled`. So windows, hinges and extremes select the same pairs as `tiled` does.
    """
    z = dense_pairs(x, y, distance)
    if x.device.type != "cpu" or not (plain(x) and plain(y)) or isinstance(extension.load(), str):
        return z
    return taken(z, tiled.all_similarities(x.detach(), y.detach(), distance))


def pair_gradients(x: Tensor, other: Tensor, g: Tensor, distance: str) -> tuple[Tensor, Tensor]:
    """The gradients of x (N, D) and of `other` (N, D), from those of the similarities of row k with row k.

    Differentiable.

    Args:
        x: (N, D).
        other: (N, D).
        g: (N,), the gradients of the similarities.
        distance: ``"dot"``, ``"euclidean"`` or ``"squared_euclidean"``.
    """
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
    """`listed_similarities` with gradients. Backward gathers one reference of each row at a time. y None: y is x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor | None, refs: Tensor, distance: str) -> Tensor:
        ctx.save_for_backward(x, y, refs)
        ctx.distance = distance
        return listed_similarities(x, x if y is None else y, refs, distance)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, y, refs = ctx.saved_tensors
        ref_rows = x if y is None else y
        dx, dy = torch.zeros_like(x), torch.zeros_like(ref_rows)
        for j, dz in zip(refs.unbind(1), g.unbind(1), strict=True):
            to_x, to_ref = pair_gradients(x, ref_rows.index_select(0, j), dz, ctx.distance)
            dx = dx + to_x
            if y is None or ctx.needs_input_grad[1]:
                dy = dy.index_add(0, j, to_ref)
        return (dx + dy, None, None, None) if y is None else (dx, dy, None, None)


def positive_pairs(x: Tensor, y: Tensor, refs: Tensor, distance: str) -> Tensor:
    """The similarities of `listed_similarities`, (N, K), differentiable twice.

    Args:
        x: (N, D), the rows.
        y: (M, D), the references; the same object as `x` if these are the rows.
        refs: (N, K) int64, the references of each row.
        distance: ``"dot"``, ``"euclidean"`` or ``"squared_euclidean"``.
    """
    if y.shape[0] == 0:
        return x.new_zeros(refs.shape) + x.sum(1, keepdim=True) * 0
    z: Tensor = _PositivePairs.apply(x, None if y is x else y, refs, distance)
    return z
