"""Embeddings in label order, normalised if the criterion asks for it: one pass over them in each direction."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import extension
from .similarity import normalize


def plain(x: Tensor) -> bool:
    """Whether `x` may be handed to C++ by its address: an ordinary CPU tensor, and nobody is tracing."""
    ordinary = type(x) is Tensor and x.device.type == "cpu"
    return ordinary and not torch.compiler.is_compiling() and torch._C._len_torch_dispatch_stack() == 0


class _SortedRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, unit: bool) -> Tensor:
        module = extension.require()
        (n, d), y = x.shape, torch.empty_like(x)
        inverse = x.new_empty(n if unit else 0)
        module.sorted_rows(
            x.dtype == torch.float64,
            x.data_ptr(),
            order.data_ptr(),
            n,
            d,
            y.data_ptr(),
            inverse.data_ptr() if unit else 0,
        )
        ctx.unit = unit
        ctx.save_for_backward(x, order, y, inverse)
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        x, order, y, inverse = ctx.saved_tensors
        if torch.is_grad_enabled():  # to be differentiated again
            (dx,) = torch.autograd.grad(_composed(x, order, ctx.unit), x, g, create_graph=True)
            return dx, None, None
        g, (n, d) = g.contiguous(), x.shape
        dx = torch.empty_like(x)
        extension.require().sorted_rows_backward(
            x.dtype == torch.float64, g.data_ptr(), y.data_ptr(), inverse.data_ptr() if ctx.unit else 0,
            order.data_ptr(), n, d, dx.data_ptr(),
        )  # fmt: skip
        return dx, None, None


def _composed(x: Tensor, order: Tensor, unit: bool) -> Tensor:
    return (normalize(x) if unit else x).index_select(0, order)


def sorted_rows(x: Tensor, order: Tensor, *, unit: bool) -> Tensor:
    """Rows x[order] (N, D) of x (N, D), float32 or float64, of unit norm if `unit` (see `normalize`)."""
    if plain(x.detach()) and not isinstance(extension.load(), str):
        return _SortedRows.apply(x.contiguous(), order, unit)
    return _composed(x, order, unit)
