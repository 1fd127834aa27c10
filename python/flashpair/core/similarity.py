"""Shared maths of pairs, written once for the reference, the double backward and the tests."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

KEYED = 2**20  # numbers of rows that are looked at at a time for equal ones


def autocasts(kind: str) -> bool:
    """Whether autocast is on for a type of device, of which it does not know all (meta, say)."""
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


def no_autocast(kind: str) -> AbstractContextManager[Any]:
    """Autocast off for a type of device, of which it does not know all. Also where it is off already: a compiled
    backward pass, which is traced so, may run where it is on."""
    return torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()


def upcast(x: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Both in float64 if either is float64, else in float32: nothing is accumulated in less."""
    wide = x.dtype == torch.float64 or (y is not None and y.dtype == torch.float64)
    dtype = torch.float64 if wide else torch.float32
    return x.to(dtype), None if y is None else y.to(dtype)


def inverse_norm(x: Tensor) -> Tensor:  # (N, D) -> (N, 1)
    """1 / |x|, 0 of a row whose square underflows and NaN of one whose square overflows."""
    norm, limits = torch.linalg.vector_norm(x, dim=1, keepdim=True), torch.finfo(x.dtype)
    beyond = norm >= limits.max**0.5  # of one column a vector's norm is its entry, whose square nobody has seen
    return norm.masked_fill(beyond, torch.nan).reciprocal().masked_fill(norm <= limits.tiny**0.5, 0.0)


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


def l2_normalize(x: Tensor) -> Tensor:  # (N, D) -> (N, D)
    """Rows of unit L2 norm. A row whose square underflows (a norm of 1e-19 in float32) is a zero row, which stays zero
    and has gradient 0; one whose square overflows (1e19) is NaN, not the zero row that dividing by inf would make."""
    return _Normalize.apply(x)


def nan_unless_finite(x: Tensor, y: Tensor | None) -> Tensor:
    """0 when every entry is finite, NaN otherwise: added to results, so that no mining comparison can swallow a NaN.

    A sum that overflows counts as not finite; dot products of such entries overflow too.
    """
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    total = x.detach().sum(dtype=wide)
    return (total if y is None else total + y.detach().sum(dtype=wide)) * 0


class _Taken(torch.autograd.Function):
    """Numbers `of`, the same as `z` but for rounding, with z's gradient."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, of: Tensor) -> Tensor:
        return of.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return g, None


def taken(z: Tensor, of: Tensor) -> Tensor:
    """The same similarities `z` with the bits `of`, which decide who is in a window and which pair is an extreme."""
    return _Taken.apply(z, of)


@torch.no_grad()
def copies(rows: Tensor) -> Tensor | None:
    """(M,) int64: the first row that is equal to each one; None where none are equal."""
    odd = torch.arange(1, 2 * rows.shape[1], 2, device=rows.device)
    keys = torch.cat([(_bits(part) * odd).sum(1) for part in rows.split(max(1, KEYED // rows.shape[1]))])
    _, group, count = keys.unique(return_inverse=True, return_counts=True)
    if count.shape[0] == keys.shape[0]:
        return None
    (at,) = (count[group] > 1).nonzero(as_tuple=True)  # rows of one key, among them all that are equal
    _, group = _bits(rows[at]).unique(dim=0, return_inverse=True)
    lowest = torch.full_like(at, rows.shape[0]).scatter_reduce(0, group, at, "amin")
    return torch.arange(rows.shape[0], device=rows.device).index_copy(0, at, lowest[group])


def _bits(rows: Tensor) -> Tensor:
    whole = {2: torch.int16, 4: torch.int32, 8: torch.int64}[rows.element_size()]
    return (rows.contiguous() + 0.0).view(whole).to(torch.int64)  # of one zero


def alike(z: Tensor, first: Tensor | None) -> Tensor:  # (N, M), (M,) -> (N, M)
    """z whose columns are equal where the references are, as `copies` says: a vendor's product may round a column by
    where it stands."""
    if first is None:
        return z
    of = z.detach().index_select(1, first)
    return taken(z, of) if z.requires_grad else of


def _towards(u: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:  # (N, M), (N, D), (M, D)
    """The sums of u_ij (x_i - y_j) over j, and of u_ij (y_j - x_i) over i. Differentiable."""
    middle = x.detach().mean(0)
    a, b = x - middle, y - middle
    return u.sum(1)[:, None] * a - u @ b, u.sum(0)[:, None] * b - u.T @ a


def _along(g: Tensor, x: Tensor, y: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """What dL/dz = g (N, M) of distances z gives to x and y; rows that are equal have no direction between them."""
    z, g, x, y = torch.where(z > 0, z, torch.inf), g.contiguous(), x.contiguous(), y.contiguous()
    dx = torch.ops.aten._cdist_backward(g, x, y, 2.0, z)
    return dx, torch.ops.aten._cdist_backward(g.T.contiguous(), y, x, 2.0, z.T.contiguous())


class _Distances(torch.autograd.Function):
    """Euclidean distances (N, M) as the norms of differences: |x|^2 + |y|^2 - 2 x.y loses them to cancellation."""

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
            return _towards(torch.where(z > 0, g / torch.where(z > 0, z, 1.0), 0.0), x, y)
        return _along(g, x, y, z)


class _SquaredDistances(torch.autograd.Function):
    """Their squares (N, M), which unlike the distances have second derivatives between equal rows, too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        z = torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")
        ctx.save_for_backward(x, y, z)
        return z * z

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
        x, y, z = ctx.saved_tensors
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # to be differentiated again
            return _towards(2 * g, x, y)
        return _along(2 * g * z, x, y, z)


def dense_pairs(x: Tensor, y: Tensor, distance: str) -> Tensor:  # (N, D), (M, D) -> (N, M)
    """All similarities (``"dot"``), Euclidean distances, whose gradient at distance 0 is 0, or their squares; autocast
    or not."""
    if autocasts(x.device.type):
        with no_autocast(x.device.type):
            return dense_pairs(x, y, distance)
    if distance == "dot":
        return x @ y.T
    return (_Distances if distance == "euclidean" else _SquaredDistances).apply(x, y)


def listed_pairs(x: Tensor, y: Tensor, distance: str) -> Tensor:  # (N, D), (N, D) -> (N,)
    """z of row k of x with row k of y, as `dense_pairs`."""
    if distance == "dot":
        return (x * y).sum(1)
    apart = x - y
    d2 = (apart * apart).sum(1)
    return d2 if distance == "squared_euclidean" else torch.where(d2 > 0, torch.where(d2 > 0, d2, 1.0).sqrt(), 0.0)


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
    if t.shape[1] == 0:
        return t.sum(1) - torch.inf
    # masked_fill, as where of two numbers has the default dtype
    kept = t.masked_fill(~mask, -torch.inf).masked_fill(empty[:, None], 0.0)
    # Relative to the largest term in backward, too: at 1e20 logsumexp's own value has no digits left for a tie's log 2.
    top = kept.detach().amax(1)
    top = torch.where(top.isfinite(), top, torch.zeros_like(top))
    return (top + (kept - top[:, None]).exp().sum(1).log()).masked_fill(empty, -torch.inf)
