"""Similarities, norms and log-sum-exps in PyTorch, shared by the reference, the double backward and the tests."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

KEYED = 2**20  # how many entries `copies` hashes at a time


def autocasts(kind: str) -> bool:
    """Whether autocast is on for a type of device; False for a type that autocast does not know, such as meta."""
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


def no_autocast(kind: str) -> AbstractContextManager[Any]:
    """A context without autocast for a type of device, which may be one that autocast does not know.

    It switches autocast off even where it is off already: a compiled backward pass may be traced without autocast and
    run with it.
    """
    return torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()


def upcast(x: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """x (N, D) and y (M, D), both in float64 if either is float64, else both in float32."""
    wide = x.dtype == torch.float64 or (y is not None and y.dtype == torch.float64)
    dtype = torch.float64 if wide else torch.float32
    return x.to(dtype), None if y is None else y.to(dtype)


def inverse_norm(x: Tensor) -> Tensor:  # (N, D) -> (N, 1)
    """1 / |x| of each row; 0 where the square of the norm underflows, NaN where it overflows."""
    norm, limits = torch.linalg.vector_norm(x, dim=1, keepdim=True), torch.finfo(x.dtype)
    overflows = norm >= limits.max**0.5  # with D = 1 torch's norm is |x| itself and never computes the square
    return norm.masked_fill(overflows, torch.nan).reciprocal().masked_fill(norm <= limits.tiny**0.5, 0.0)


def through_normalize(g: Tensor, y: Tensor, inverse: Tensor) -> Tensor:  # (N, D), (N, D), (N, 1) -> (N, D)
    """The gradient of x, from the gradient g of y = x / |x| and from inverse = 1 / |x|."""
    return torch.addcmul(g, y, (y * g).sum(1, keepdim=True), value=-1) * inverse


class _Normalize(torch.autograd.Function):
    """x / |x| with the gradient (g - y <y, g>) / |x|. What autograd would derive takes ten times as long."""

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


def l2_normalize(x: Tensor) -> Tensor:  # (N, D) -> (N, D)
    """The rows divided by their L2 norms.

    A row whose squared norm underflows (a norm of 1e-19 in float32) becomes zero, with gradient 0. A row whose squared
    norm overflows (a norm of 1e19) becomes NaN; division by an infinite norm would make it zero.
    """
    return _Normalize.apply(x)


def nan_unless_finite(x: Tensor, y: Tensor | None) -> Tensor:
    """A tensor () that is 0 if all entries of x (N, D) and y (M, D) are finite, and NaN otherwise.

    It is added to results, because a comparison of mining may drop a pair that is NaN. Entries so large that their sum
    overflows count as not finite; their dot products overflow, too.
    """
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    total = x.detach().sum(dtype=wide)
    return (total if y is None else total + y.detach().sum(dtype=wide)) * 0


class _Taken(torch.autograd.Function):
    """The numbers `bits`, with the gradient of `z`, from which they differ by rounding."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, bits: Tensor) -> Tensor:
        return bits.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return g, None


def taken(z: Tensor, bits: Tensor) -> Tensor:
    """The similarities `bits` (N, M) with the gradient of `z` (N, M), which differs from them by rounding.

    The last bit may decide which pair is in a window or is an extreme, so two backends must see the same bits.
    """
    return _Taken.apply(z, bits)


@torch.no_grad()
def copies(rows: Tensor) -> Tensor | None:
    """For each of the rows (M, D) the first row that is equal to it, (M,) int64; None if no two rows are equal."""
    odd = torch.arange(1, 2 * rows.shape[1], 2, device=rows.device)
    keys = torch.cat([(_bits(part) * odd).sum(1) for part in rows.split(max(1, KEYED // rows.shape[1]))])
    _, group, count = keys.unique(return_inverse=True, return_counts=True)
    if count.shape[0] == keys.shape[0]:
        return None
    (candidates,) = (count[group] > 1).nonzero(as_tuple=True)  # rows that share their key with another row
    _, group = _bits(rows[candidates]).unique(dim=0, return_inverse=True)
    lowest = torch.full_like(candidates, rows.shape[0]).scatter_reduce(0, group, candidates, "amin")
    return torch.arange(rows.shape[0], device=rows.device).index_copy(0, candidates, lowest[group])


def _bits(rows: Tensor) -> Tensor:
    """The bits of rows (M, D) as int64."""
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[rows.element_size()]
    return (rows.contiguous() + 0.0).view(integer).to(torch.int64)  # + 0.0 makes -0.0 the same as 0.0


def alike(z: Tensor, first: Tensor | None) -> Tensor:  # (N, M), (M,) -> (N, M)
    """z with equal columns for equal references. first: the result of `copies`.

    A matrix product may round equal columns differently, depending on where they stand.
    """
    if first is None:
        return z
    bits = z.detach().index_select(1, first)
    return taken(z, bits) if z.requires_grad else bits


def _weighted_differences(u: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:  # (N, M), (N, D), (M, D)
    """The sums of u_ij (x_i - y_j) over j (N, D), and of u_ij (y_j - x_i) over i (M, D). Differentiable."""
    middle = x.detach().mean(0)
    a, b = x - middle, y - middle
    return u.sum(1)[:, None] * a - u @ b, u.sum(0)[:, None] * b - u.T @ a


def _distance_gradients(g: Tensor, x: Tensor, y: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of x (N, D) and y (M, D), from the gradient g (N, M) of their distances z (N, M).

    A distance of 0 gives no gradient: equal rows have no direction between them.
    """
    z, g, x, y = torch.where(z > 0, z, torch.inf), g.contiguous(), x.contiguous(), y.contiguous()
    dx = torch.ops.aten._cdist_backward(g, x, y, 2.0, z)
    return dx, torch.ops.aten._cdist_backward(g.T.contiguous(), y, x, 2.0, z.T.contiguous())


class _Distances(torch.autograd.Function):
    """Euclidean distances (N, M) as norms of differences. In |x|^2 + |y|^2 - 2 x.y small distances cancel."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        z = torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")
        ctx.save_for_backward(x, y, z)
        return z

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
        x, y, z = ctx.saved_tensors
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # to be differentiated again
            z = _Distances.apply(x, y)
            return _weighted_differences(torch.where(z > 0, g / torch.where(z > 0, z, 1.0), 0.0), x, y)
        return _distance_gradients(g, x, y, z)


class _SquaredDistances(torch.autograd.Function):
    """Squared Euclidean distances (N, M). Unlike distances, they have second derivatives between equal rows, too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        z = torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")
        ctx.save_for_backward(x, y, z)
        return z * z

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
        x, y, z = ctx.saved_tensors
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # to be differentiated again
            return _weighted_differences(2 * g, x, y)
        return _distance_gradients(2 * g * z, x, y, z)


def dense_pairs(x: Tensor, y: Tensor, distance: str) -> Tensor:  # (N, D), (M, D) -> (N, M)
    """All dot products, Euclidean distances (with gradient 0 at distance 0) or squared distances, without autocast."""
    if autocasts(x.device.type):
        with no_autocast(x.device.type):
            return dense_pairs(x, y, distance)
    if distance == "dot":
        return x @ y.T
    return (_Distances if distance == "euclidean" else _SquaredDistances).apply(x, y)


def listed_pairs(x: Tensor, y: Tensor, distance: str) -> Tensor:  # (N, D), (N, D) -> (N,)
    """z of row k of x with row k of y, for each k; see `dense_pairs`."""
    if distance == "dot":
        return (x * y).sum(1)
    difference = x - y
    d2 = (difference * difference).sum(1)
    return d2 if distance == "squared_euclidean" else torch.where(d2 > 0, torch.where(d2 > 0, d2, 1.0).sqrt(), 0.0)


def logaddexp(a: Tensor, b: Tensor) -> Tensor:
    """``torch.logaddexp`` of two tensors of one shape. Its gradient is 0, not NaN, where both are -inf."""
    empty = torch.maximum(a, b) == -torch.inf
    return torch.where(empty, -torch.inf, torch.logaddexp(a.masked_fill(empty, 0.0), b.masked_fill(empty, 0.0)))


def softplus(t: Tensor) -> Tensor:
    """log(1 + e^t) of a tensor of any shape, exact in float64; 0 with gradient 0 at -inf.

    torch's default is linear from 20 on, an error of 2e-9.
    """
    return torch.nn.functional.softplus(t, threshold=40.0)


def masked_logsumexp(t: Tensor, mask: Tensor) -> Tensor:  # (N, M), (N, M) -> (N,)
    """The logsumexp of those entries of each row that the mask allows; -inf with gradient 0 for a row without any."""
    empty = ~mask.any(1)
    if t.shape[1] == 0:
        return t.sum(1) - torch.inf
    # masked_fill, because torch.where of two numbers would have torch's default dtype
    kept = t.masked_fill(~mask, -torch.inf).masked_fill(empty[:, None], 0.0)
    # Backward, too, is relative to the largest term: at 1e20, log 2 of a tie is lost in the value of the logsumexp.
    top = kept.detach().amax(1)
    top = torch.where(top.isfinite(), top, torch.zeros_like(top))
    return (top + (kept - top[:, None]).exp().sum(1).log()).masked_fill(empty, -torch.inf)
