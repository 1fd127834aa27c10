"""How large the terms are that a result is the sum of: one rounding of them is what a sum that cancels may be off by.

To first order a loss is what its pairs' weights W_ij = dL/dz_ij make of the similarities z_ij, and its gradient the sum
of W_ij dz_ij/dx_i. The dense reference's own z, seen on its way, has both.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

import flashpair.reference
from flashpair import Reduction
from flashpair.similarity import inverse_norm


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
    plain, reduce_rows = flashpair.reference.dense_pairs, flashpair.reference.reduce_rows

    def dense_pairs(x: Tensor, y: Tensor, distance: str) -> Tensor:
        z = plain(x, y, distance)
        seen.append(Seen(x.detach(), y.detach(), z, distance, []))
        return z

    def of_rows(z: Tensor, mask: Tensor, r: Reduction) -> Tensor:
        if not z.requires_grad or not seen or z.shape != seen[0].z.shape:
            return reduce_rows(z, mask, r)
        seen[0].each.append(z * 1)
        return reduce_rows(seen[0].each[-1], mask, r)

    flashpair.reference.dense_pairs, flashpair.reference.reduce_rows = dense_pairs, of_rows  # type: ignore[assignment]
    try:
        yield seen
    finally:
        flashpair.reference.dense_pairs, flashpair.reference.reduce_rows = plain, reduce_rows


def weights(seen: list[Seen], loss: Tensor, upstream: Tensor) -> Tensor | None:
    """(n, m): what the pairs' weights of all reductions come to, before they cancel; None where no z was seen."""
    if len(seen) != 1 or not seen[0].z.requires_grad:
        return None
    of = [seen[0].z, *seen[0].each]
    grads = torch.autograd.grad(loss, of, upstream.to(loss.dtype), allow_unused=True, retain_graph=True)
    return torch.stack([torch.zeros_like(of[0]) if g is None else g.abs() for g in grads]).sum(0)


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
        of_x = of_y = w if distance == "euclidean" else 2 * w * z.sqrt()
    found = {"dx": of_x.sum(1), "dy": of_y.sum(0), "d": (w * z.clamp_min(1)).sum()[None]}
    if square:
        found["dx"] = found["dx"] + found.pop("dy")
    for name in ("dx", "dy"):
        if unit and name in found and name in raw:
            found[name] = found[name] * inverse_norm(raw[name].double())[:, 0]
    rows = (w * z).sum(1)
    found["loss"] = rows / upstream.abs() if upstream.dim() else rows.sum()[None] / upstream.abs()
    return found
