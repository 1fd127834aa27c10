"""Embeddings in label order, and normalised if a criterion asks for it, by one pass over them in each direction."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..backends import extension
from ..core.problem import accumulator, address, plain, solid
from ..core.similarity import l2_normalize

INLINE_NUMBERS = 2**18  # with fewer numbers than these, to wake threads takes longer than the work


def _threads(x: Tensor) -> int:
    return 1 if x.numel() < INLINE_NUMBERS else torch.get_num_threads()


class _SortedRows(torch.autograd.Function):
    """`sorted_rows` by the C++ kernels."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, normalize: bool) -> Tensor:
        module = extension.require()
        (n, d), y = x.shape, torch.empty_like(x)
        inverse = x.new_empty(n if normalize else 0)
        module.sorted_rows(
            x.dtype == torch.float64,
            address(x),
            address(order),
            n,
            d,
            address(y),
            address(inverse) if normalize else 0,
            _threads(x),
        )
        ctx.normalize = normalize
        ctx.save_for_backward(x, order, y, inverse)
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        x, order, y, inverse = ctx.saved_tensors
        if torch.is_grad_enabled():  # to be differentiated again
            (dx,) = torch.autograd.grad(_composed(x, order, ctx.normalize), x, g, create_graph=True)
            return dx, None, None
        g, (n, d) = solid(g), x.shape
        dx = torch.empty_like(x)
        extension.require().sorted_rows_backward(
            x.dtype == torch.float64, address(g), address(y), address(inverse) if ctx.normalize else 0,
            address(order), n, d, address(dx), _threads(x),
        )  # fmt: skip
        return dx, None, None


class _KernelRows(torch.autograd.Function):
    """`sorted_rows` by Triton kernels, in the dtype of `x`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, normalize: bool) -> Tensor:
        from ..backends.triton import rows

        y, inverse = rows.gather_rows(x, order, normalize)
        ctx.normalize = normalize
        ctx.save_for_backward(x, order, inverse)
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        from ..backends.triton import rows

        x, order, inverse = ctx.saved_tensors
        if torch.is_grad_enabled():  # to be differentiated again
            (dx,) = torch.autograd.grad(_composed(x, order, ctx.normalize), x, g, create_graph=True)
            return dx, None, None
        return rows.scatter_rows(solid(g), x, order, inverse, ctx.normalize), None, None


def _composed(x: Tensor, order: Tensor, normalize: bool) -> Tensor:
    """`sorted_rows` in PyTorch."""
    y = l2_normalize(x.to(accumulator(x.dtype))).to(x.dtype) if normalize else x
    return y.index_select(0, order)


def sorted_rows(x: Tensor, order: Tensor, *, normalize: bool, impl: str) -> Tensor:
    """The rows x[order] (N, D).

    Args:
        x: (N, D), the embeddings.
        order: (N,) int64.
        normalize: L2-normalise the rows (see `l2_normalize`).
        impl: the backend that will read them.
    """
    if not plain(x.detach()):
        return _composed(x, order, normalize)
    if impl in ("tiled", "screened") and x.device.type == "cpu":
        return _SortedRows.apply(solid(x), order, normalize)
    return _KernelRows.apply(solid(x), order, normalize)
