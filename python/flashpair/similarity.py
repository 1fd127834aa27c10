"""Shared maths of pairs, written once for the reference, the double backward and the tests."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def upcast(x: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Both in float64 if either is float64, else in float32: nothing is accumulated in less."""
    wide = x.dtype == torch.float64 or (y is not None and y.dtype == torch.float64)
    dtype = torch.float64 if wide else torch.float32
    return x.to(dtype), None if y is None else y.to(dtype)


def zero_distance(dtype: torch.dtype) -> float:
    """Under this share of ``|x|^2 + |y|^2``, ``|x|^2 + |y|^2 - 2 x.y`` is rounding noise: the distance is 0."""
    return 8.0 * torch.finfo(dtype).eps


def inverse_norm(x: Tensor) -> Tensor:  # (N, D) -> (N, 1)
    """1 / |x|, 0 of a row whose square underflows and NaN of one whose square overflows."""
    norm = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    zero = norm <= torch.finfo(x.dtype).tiny ** 0.5
    return norm.nan_to_num(nan=torch.nan, posinf=torch.nan).reciprocal().masked_fill(zero, 0.0)


def through_normalize(g: Tensor, y: Tensor, inverse: Tensor) -> Tensor:  # (N, D), (N, D), (N, 1) -> (N, D)
    """The gradient in x from that in y = x / |x|."""
    return torch.addcmul(g, y, (y * g).sum(1, keepdim=True), value=-1) * inverse


class _Normalize(torch.autograd.Function):
    """x / |x| with the short form of its gradient, (g - y <y, g>) / |x|: autograd's own takes ten times as long."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        inverse = inverse_norm(x)
        y = x * inverse
        ctx.save_for_backward(x, y, inverse)
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        x, y, inverse = ctx.saved_tensors
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # to be differentiated again
            inverse = inverse_norm(x)
            y = x * inverse
        return through_normalize(g, y, inverse)


def normalize(x: Tensor) -> Tensor:  # (N, D) -> (N, D)
    """Rows of unit L2 norm. A row whose square underflows (a norm of 1e-19 in float32) is a zero row, which stays zero
    and has gradient 0; one whose square overflows (1e19) is NaN, not the zero row that dividing by inf would make."""
    return _Normalize.apply(x)


def poison(x: Tensor, y: Tensor | None) -> Tensor:
    """0 when every entry is finite, NaN otherwise: added to results, so that no mining comparison can swallow a NaN.

    A sum that overflows counts as not finite; dot products of such entries overflow too.
    """
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    total = x.detach().sum(dtype=wide)
    return (total if y is None else total + y.detach().sum(dtype=wide)) * 0


def dense_pairs(x: Tensor, y: Tensor, distance: str) -> Tensor:  # (N, D), (M, D) -> (N, M)
    """All similarities (``"dot"``), Euclidean distances, whose gradient at distance 0 is 0, or their squares; autocast
    or not."""
    if torch.is_autocast_enabled(x.device.type):
        with torch.autocast(x.device.type, enabled=False):
            return dense_pairs(x, y, distance)
    s = x @ y.T
    return s if distance == "dot" else of_dots(s, (x * x).sum(1)[:, None] + (y * y).sum(1)[None, :], distance)


def of_dots(s: Tensor, squares: Tensor, distance: str) -> Tensor:
    """z of pairs from their dot products and the sums |x|^2 + |y|^2 of their squared norms."""
    if distance == "dot":
        return s
    d2 = squares - 2 * s
    if distance == "squared_euclidean":
        return d2.relu()
    apart = d2 > zero_distance(d2.dtype) * squares
    return torch.where(apart, torch.where(apart, d2, 1.0).sqrt(), 0.0)


def logaddexp(a: Tensor, b: Tensor) -> Tensor:
    """``torch.logaddexp`` whose gradient is 0, not NaN, where both are -inf."""
    empty = torch.maximum(a, b) == -torch.inf
    return torch.where(empty, -torch.inf, torch.logaddexp(a.masked_fill(empty, 0.0), b.masked_fill(empty, 0.0)))


def softplus(t: Tensor) -> Tensor:
    """log(1 + e^t), exact in float64 (torch's default is linear from 20, an error of 2e-9); 0, gradient 0, at -inf."""
    return torch.nn.functional.softplus(t, threshold=40.0)


def masked_logsumexp(t: Tensor, mask: Tensor) -> Tensor:  # (N, M), (N, M) -> (N,)
    """logsumexp of a row's entries under the mask, -inf with gradient 0 where there are none."""
    empty = ~mask.any(1)
    kept = t.masked_fill(~mask, -torch.inf).masked_fill(
        empty[:, None], 0.0
    )  # where of two numbers has the default dtype
    return torch.logsumexp(kept, 1).masked_fill(empty, -torch.inf)
