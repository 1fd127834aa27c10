"""The specification: every reduction over the dense similarity matrix, in plain differentiable PyTorch.

Short and readable comes first. It takes any dtype and any device, compares labels directly (no sorting) and can be
differentiated twice; every other implementation is tested against it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .reduction import Reduction, bound_places
from .similarity import dense_pairs, logaddexp, normalize, poison, softplus
from .transforms import custom


def _column(value: Any, dtype: torch.dtype) -> Any:
    """A number as it is; a tensor () or (N,) in that dtype, the latter as a column."""
    if not isinstance(value, Tensor):
        return value
    return value.to(dtype)[:, None] if value.dim() == 1 else value.to(dtype)


def reduce_rows(z: Tensor, mask: Tensor, r: Reduction) -> Tensor:  # (N, M), (N, M) -> (N,)
    """One reduction of the pairs `z` where `mask` (the reduction's side, no self pairs)."""
    if r.lower is not None:
        mask = mask & (z > _column(r.lower, z.dtype))
    if r.upper is not None:
        mask = mask & (z < _column(r.upper, z.dtype))
    if r.op == "count":
        return mask.sum(1).to(z.dtype)
    if r.op in ("min", "max"):
        none = torch.inf if r.op == "min" else -torch.inf
        if z.shape[1] == 0:
            return z.new_full(z.shape[:1], none)
        kept = torch.where(mask, z, none)
        return (kept.min(1) if r.op == "min" else kept.max(1)).values
    if r.transform == "lifted":
        assert isinstance(r.offset, Tensor) and r.ref_offset is not None
        t = z * r.scale + logaddexp(
            *torch.broadcast_tensors(_column(r.offset, z.dtype), r.ref_offset.to(z.dtype)[None, :])
        )
    else:
        t = z * r.scale if r.offset is None else z * r.scale + _column(r.offset, z.dtype)
    if r.op == "logsumexp":
        empty = ~mask.any(1)
        kept = torch.where(mask, t, torch.where(empty[:, None], 0.0, -torch.inf))
        return torch.logsumexp(kept, 1).masked_fill(empty, -torch.inf)
    return torch.where(mask, _phi(torch.where(mask, t, 0.0), r.transform), 0.0).sum(1)


def _phi(t: Tensor, transform: str) -> Tensor:
    if transform == "identity":
        return t
    if transform == "softplus":
        return softplus(t)
    if transform == "hinge":
        return t.relu()
    return t.relu().square() if transform == "lifted" else custom(transform).dense(t)


class ReferencePairs:
    """The engine's `Pairs` over a dense matrix: rows are anchors, columns references, both in the caller's order.

    Args:
        z: (N, M) similarities or distances; gradients flow into it.
        labels: (N,) and `ref_labels` (M,): int64.
        square: row i and column i are the same sample, and no pair.
        ref_valid: None, or (M,) bool: references that take part.
        poison: a tensor () added to every row value: 0, or NaN when an embedding is not finite.
    """

    def __init__(
        self,
        z: Tensor,
        labels: Tensor,
        ref_labels: Tensor,
        *,
        square: bool,
        ref_valid: Tensor | None = None,
        poison: Tensor | None = None,
    ) -> None:
        self.z, self.labels, self.ref_labels, self.square = z, labels, ref_labels, square
        self.poison = z.new_zeros(()) if poison is None else poison
        same = labels[:, None] == ref_labels[None, :]
        pair = torch.ones_like(same) if ref_valid is None else ref_valid[None, :].expand_as(same)
        if square:
            pair = pair & ~torch.eye(z.shape[0], dtype=torch.bool, device=z.device)
        self.masks = {"positives": same & pair, "negatives": ~same & pair, "all": pair}

    @classmethod
    def from_embeddings(
        cls, x: Tensor, labels: Tensor, y: Tensor | None, ref_labels: Tensor | None, distance: str, unit: bool
    ) -> ReferencePairs:
        """`x` (N, D) against `y` (M, D), or against itself."""
        if unit:
            x, y = normalize(x), None if y is None else normalize(y)
        z = dense_pairs(x, x if y is None else y, distance)
        return cls(z, labels, labels if ref_labels is None else ref_labels, square=y is None, poison=poison(x, y))

    def reduce(self, *reductions: Reduction) -> tuple[Tensor, ...]:
        rows: list[Tensor] = []
        for r, places in zip(reductions, bound_places(reductions), strict=True):
            bounds = {
                name: getattr(r, name) if place < 0 else rows[place].detach() + getattr(r, name).shift
                for name, place in zip(("lower", "upper"), places, strict=True)
            }
            row = reduce_rows(self.z, self.masks[r.side], replace(r, **bounds)) + self.poison
            rows.append(row.detach() if r.detach else row)
        return tuple(rows)

    def num_positives(self) -> Tensor:  # (N,) int64
        return self.masks["positives"].sum(1)

    def num_negatives(self) -> Tensor:  # (N,) int64
        return self.masks["negatives"].sum(1)

    def paired(self) -> Tensor:  # (N,)
        """z_kk of a rectangular problem whose rows and references belong together one by one."""
        return self.z.diagonal() + self.poison

    def select(self, rows: Tensor, refs: Tensor, labels: Tensor, count: Tensor) -> ReferencePairs:
        """Row rows[k] against reference refs[k] as its one positive, k < count (); labels (K,) are 0, 1, ..."""
        z = self.z[rows][:, refs]
        return ReferencePairs(z, labels, labels, square=False, ref_valid=labels < count, poison=self.poison)

    def restore(self, values: Tensor) -> Tensor:
        """Row values (N,) in the caller's order, which is this class's own."""
        return values
