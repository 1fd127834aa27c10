"""How large the terms are that a result is the sum of: one rounding of them is what a sum that cancels may be off by.

To first order a loss is what its pairs' weights W_ij = dL/dz_ij make of the similarities z_ij, and its gradient the sum
of W_ij dz_ij/dx_i. The dense reference's own z, seen on its way, has both.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

import flashpair.backends.reference
from flashpair import Reduction, SoftTripleLoss
from flashpair.core.similarity import inverse_norm, l2_normalize
from flashpair.losses.soft_triple import unit


class Seen(NamedTuple):
    x: Tensor
    y: Tensor
    z: Tensor
    distance: str
    each: list[Tensor]  # the same once more for each reduction, whose weights may cancel


@contextlib.contextmanager
def watched() -> Iterator[list[Seen]]:
    """Keeps what the reference makes its similarities of, with their gradient."""
    seen: list[Seen] = []
    plain, reduce_rows = flashpair.backends.reference.dense_pairs, flashpair.backends.reference.reduce_rows
    of_centres = SoftTripleLoss.pairs_of

    def dense_pairs(x: Tensor, y: Tensor, distance: str) -> Tensor:
        z = plain(x, y, distance)
        seen.append(Seen(x.detach(), y.detach(), z, distance, []))
        return z

    def of_rows(z: Tensor, mask: Tensor, r: Reduction, order: Tensor | None = None) -> Tensor:
        if not z.requires_grad or not seen or z.shape != seen[0].z.shape:
            return reduce_rows(z, mask, r, order)
        seen[0].each.append(z * 1)
        return reduce_rows(seen[0].each[-1], mask, r, order)

    def with_centres(made: SoftTripleLoss, x: Tensor, *more: Any) -> Any:
        pairs = of_centres(made, x, *more)
        x = (l2_normalize(x) if made.normalize else x).detach()
        seen.append(Seen(x, unit(made.weight).detach().flatten(0, 1), pairs.z, "dot", []))
        return pairs

    flashpair.backends.reference.dense_pairs, flashpair.backends.reference.reduce_rows = dense_pairs, of_rows  # type: ignore[assignment]
    SoftTripleLoss.pairs_of = with_centres  # type: ignore[method-assign]
    try:
        yield seen
    finally:
        flashpair.backends.reference.dense_pairs, flashpair.backends.reference.reduce_rows = plain, reduce_rows
        SoftTripleLoss.pairs_of = of_centres  # type: ignore[method-assign]


NEAR, NEAR_GRADIENT = 1 / 16, 1 / 256  # csrc/cpu/tile/euclidean.h: of |x|^2 + |y|^2, under which D^2 is summed anew


@contextlib.contextmanager
def by_products() -> Iterator[None]:
    """Euclidean distances of the reference as the implementations have them, |x|^2 + |y|^2 - 2 x.y where that keeps its
    digits: the same in another order, whose roundings are those of its terms.
    """
    plain = flashpair.backends.reference.dense_pairs

    def dense_pairs(x: Tensor, y: Tensor, distance: str) -> Tensor:
        if distance == "dot" or x.numel() == 0 or y.numel() == 0:
            return plain(x, y, distance)
        squares = (x * x).sum(1)[:, None] + (y * y).sum(1)[None, :]
        product, apart = squares - 2 * (x @ y.T), plain(x, y, "squared_euclidean")
        value = torch.where(product > NEAR * squares, product, apart).detach()
        by_product = (apart > NEAR_GRADIENT * squares) & (product.isfinite())
        d2 = value + torch.where(by_product, product - product.detach(), apart - apart.detach())
        if distance == "squared_euclidean":
            return d2
        return torch.where(d2 > 0, torch.where(d2 > 0, d2, 1.0).sqrt(), 0.0)

    flashpair.backends.reference.dense_pairs = dense_pairs
    try:
        yield
    finally:
        flashpair.backends.reference.dense_pairs = plain


def weights(seen: list[Seen], loss: Tensor, upstream: Tensor) -> Tensor | None:
    """(n, m): what the pairs' weights of all reductions come to, before they cancel; None where no z was seen."""
    if len(seen) != 1 or not seen[0].z.requires_grad:
        return None
    of = [seen[0].z, *seen[0].each]
    grads = torch.autograd.grad(loss, of, upstream.to(loss.dtype), allow_unused=True, retain_graph=True)
    return torch.stack([torch.zeros_like(of[0]) if g is None else g.abs() for g in grads]).sum(0)


def _of_distances(x: Tensor, y: Tensor, z: Tensor, w: Tensor, root: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The terms of z, which are |x|^2 and |y|^2 where it is computed by a product (`by_products`), and of the gradient:
    2 w x and 2 w y there, 2 w (x - y) of near pairs."""
    d2 = z * z if root else z
    squares = (x * x).sum(1)[:, None] + (y * y).sum(1)[None, :]
    terms = torch.where(d2 > NEAR * squares, squares, d2)
    ends = torch.where(d2 > NEAR_GRADIENT * squares, squares, d2).sqrt()
    if not root:
        return terms, 2 * w * ends, 2 * w * ends
    d = z.clamp_min(1e-300)
    of = torch.where(z > 0, w * ends / d, w)
    return torch.where(z > 0, torch.maximum(terms / (2 * d), z), z), of, of


def scales(
    seen: Seen, w: Tensor, raw: dict[str, Tensor], unit: bool, square: bool, upstream: Tensor
) -> dict[str, Tensor]:
    """Of "loss", "dx" and "dy", "d" (parameters): one number a row. raw: the rows before they were normalised."""
    x, y, z, distance, _ = seen
    z = z.detach().abs()
    size, ref_size = x.abs().amax(1), y.abs().amax(1)
    if distance == "dot":
        own = size[:, None] if unit else torch.zeros_like(size)[:, None]
        of_x, of_y = w * (ref_size[None, :] + own), w * (size[:, None] + (ref_size[None, :] if unit else 0.0))
        z = torch.linalg.vector_norm(x, dim=1)[:, None] * torch.linalg.vector_norm(y, dim=1)[None, :]
    else:
        z, of_x, of_y = _of_distances(x, y, z, w, distance == "euclidean")
    found = {"dx": of_x.sum(1), "dy": of_y.sum(0), "d": (w * z.clamp_min(1)).sum()[None]}
    if square:
        found["dx"] = found["dx"] + found.pop("dy")
    for name in ("dx", "dy"):
        if unit and name in found and name in raw:
            found[name] = found[name] * inverse_norm(raw[name].double())[:, 0]
    rows = (w * z).sum(1)
    found["loss"] = rows / upstream.abs() if upstream.dim() else rows.sum()[None] / upstream.abs()
    return found
