"""The few pairs that are positive, as numbers (N, K) for a loss to do with in PyTorch what it likes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .similarity import of_dots


class _PositivePairs(torch.autograd.Function):
    """Products <x_i, y_at(i,k)> (N, K), without x's and y's rows for each of them; y None: they are x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor | None, at: Tensor) -> Tensor:
        ctx.save_for_backward(x, y, at)
        refs = x if y is None else y
        return torch.stack([(x * refs.index_select(0, j)).sum(1) for j in at.unbind(1)], 1)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, y, at = ctx.saved_tensors
        refs = x if y is None else y
        dx, dy = torch.zeros_like(x), torch.zeros_like(refs)
        for j, w in zip(at.unbind(1), g.unbind(1), strict=True):
            if ctx.needs_input_grad[0]:
                dx = dx + w[:, None] * refs.index_select(0, j)
            if y is None or ctx.needs_input_grad[1]:
                dy = dy.index_add(0, j, w[:, None] * x)
        return (dx + dy, None, None) if y is None else (dx, dy, None)


def positive_pairs(x: Tensor, y: Tensor, at: Tensor, distance: str) -> Tensor:
    """z (N, K) of rows x_i (N, D) and y_j (M, D), j = at[i, k] (N, K) int64. Differentiable twice.

    Squares of distances are added up from differences' products, as everywhere: |x|^2 + |y|^2 - 2 x.y.
    """
    if y.shape[0] == 0:
        return x.new_zeros(at.shape) + x.sum(1, keepdim=True) * 0
    s: Tensor = _PositivePairs.apply(x, None if y is x else y, at)
    if distance == "dot":
        return s
    return of_dots(s, (x * x).sum(1)[:, None] + (y * y).sum(1)[at], distance)
