"""The reference: every reduction over the dense similarity matrix, in plain differentiable PyTorch.

It is written to be short and readable. It takes any dtype and any device, compares labels directly (no sorting) and can
be differentiated twice. Every other implementation is tested against it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..core.class_pairs import ClassPairs, pick_class_pairs
from ..core.pairs import DensePairs, class_partners
from ..core.problem import plain
from ..core.reduction import BUILT_IN, Reduction, bound_places, check_call
from ..core.similarity import (
    alike,
    copies,
    dense_pairs,
    l2_normalize,
    logaddexp,
    masked_logsumexp,
    nan_unless_finite,
    softplus,
)
from ..core.transforms import custom


def _column(value: Any, dtype: torch.dtype) -> Any:
    """A tensor in that dtype, () as it is and (N,) as a column (N, 1); a number as it is."""
    if not isinstance(value, Tensor):
        return value
    return value.to(dtype)[:, None] if value.dim() == 1 else value.to(dtype)


def _row(value: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor () or (M,) in that dtype, the latter as a row."""
    return value.to(dtype)[None, :] if value.dim() == 1 else value.to(dtype)


def reduce_rows(z: Tensor, mask: Tensor, r: Reduction, order: Tensor | None = None) -> Tensor:
    """The values (N,) of one reduction.

    Args:
        z: (N, M), the similarities or distances.
        mask: (N, M) bool, the pairs of the reduction's side.
        r: the reduction, whose bounds are numbers or tensors.
        order: (M,) int64, the caller's index of each column; of equal extremes the one of the lowest index gets the
            gradient. None: the order of the columns.
    """
    if r.lower is not None:
        mask = mask & (z > _column(r.lower, z.dtype))
    if r.upper is not None:
        mask = mask & (z < _column(r.upper, z.dtype))
    if r.op == "count":
        return mask.sum(1).to(z.dtype)
    if r.op in ("min", "max"):
        none = torch.inf if r.op == "min" else -torch.inf
        if z.shape[1] == 0:
            return z.sum(1) + none
        kept = torch.where(mask, z, none)
        if order is not None:
            extreme = kept.detach().amin(1) if r.op == "min" else kept.detach().amax(1)
            first = torch.where(kept == extreme[:, None], order, order.shape[0]).argmin(1)
            return kept.gather(1, first[:, None])[:, 0]
        return (kept.min(1) if r.op == "min" else kept.max(1)).values
    if r.transform == "lifted":
        assert isinstance(r.offset, Tensor) and r.ref_offset is not None
        offsets = logaddexp(*torch.broadcast_tensors(_column(r.offset, z.dtype), _row(r.ref_offset, z.dtype)))
        t = torch.where(mask, z * r.scale + offsets, 0.0).relu().square()
    else:
        offset = 0.0 if r.offset is None or r.offset_outside else _column(r.offset, z.dtype)
        s = torch.where(mask, z * r.scale, 0.0) if r.transform != "identity" else z * r.scale
        t = custom(r.transform).of_pairs(s, offset) if r.transform not in BUILT_IN else _phi(s + offset, r.transform)
    if r.op == "logsumexp":
        value = masked_logsumexp(t, mask)
        outside = r.offset if r.offset_outside and r.offset is not None else None
        return value if outside is None else value + (outside.to(z.dtype) if isinstance(outside, Tensor) else outside)
    return torch.where(mask, t, 0.0).sum(1)


def _phi(t: Tensor, transform: str) -> Tensor:
    """A built-in transform of t (N, M)."""
    if transform == "softplus":
        return softplus(t)
    if transform == "hinge":
        return t.relu()
    if transform == "squared_hinge":
        return t.relu().square()
    return (1 - t.abs()).relu() if transform == "triangle" else t


class ReferencePairs(DensePairs):
    """The pairs of `Pairs` over a dense matrix. Rows are anchors and columns are references, in the caller's order.

    Args:
        z: (N, M), similarities or distances; gradients flow into it.
        labels: (N,) int64, of the anchors.
        ref_labels: (M,) int64, of the references.
        square: row i and column i are the same sample, and no pair.
        ref_valid: (M,) bool, which references take part; None: all.
        nonfinite: () 0, or NaN if an embedding is not finite; it is added to every row value.
        order: (M,) int64, the caller's index of each reference; None: columns are in the caller's order.
    """

    distance = "dot"
    limit = "needs the embeddings, and these pairs have similarities alone"

    def __init__(
        self,
        z: Tensor,
        labels: Tensor,
        ref_labels: Tensor,
        *,
        square: bool,
        ref_valid: Tensor | None = None,
        nonfinite: Tensor | None = None,
        order: Tensor | None = None,
    ) -> None:
        self.order = order
        self.z, self.labels, self._ref_labels, self.square = z, labels, ref_labels, square
        self.nonfinite = z.new_zeros(()) if nonfinite is None else nonfinite
        self.embeddings: Tensor | None = None
        same = labels[:, None] == ref_labels[None, :]
        pair = torch.ones_like(same) if ref_valid is None else ref_valid[None, :].expand_as(same)
        if square:
            pair = pair & ~torch.eye(z.shape[0], dtype=torch.bool, device=z.device)
        self.masks = {"positives": same & pair, "negatives": ~same & pair, "all": pair}

    @classmethod
    def from_embeddings(
        cls, x: Tensor, labels: Tensor, y: Tensor | None, ref_labels: Tensor | None, distance: str, normalize: bool
    ) -> ReferencePairs:
        """The pairs of embeddings.

        Args:
            x: (N, D), the anchors.
            labels: (N,) int64.
            y: (M, D), the references; None: x.
            ref_labels: (M,) int64, with `y`.
            distance: ``"dot"``, ``"euclidean"`` or ``"squared_euclidean"``.
            normalize: L2-normalise the rows first.
        """
        if normalize:
            x, y = l2_normalize(x), None if y is None else l2_normalize(y)
        refs = x if y is None else y
        z = dense_pairs(x, refs, distance)
        if distance == "dot" and x.device.type == "cpu" and plain(x) and plain(refs):
            z = alike(z, copies(refs))
        pairs = cls(
            z, labels, labels if ref_labels is None else ref_labels, square=y is None, nonfinite=nan_unless_finite(x, y)
        )
        pairs.embeddings, pairs.distance = x, distance
        return pairs

    @property
    def x(self) -> Tensor:
        """The embeddings of the rows (N, D)."""
        if self.embeddings is None:
            self._refuse("x")
        return self.embeddings

    @property
    def ref_labels(self) -> Tensor:
        return self._ref_labels

    @property
    def count(self) -> int:
        return self.z.shape[0]

    @property
    def dtype(self) -> torch.dtype:
        return self.z.dtype

    def reduce(self, *reductions: Reduction) -> tuple[Tensor, ...]:
        check_call(reductions, self.z, *self.z.shape)
        rows: list[Tensor] = []
        for r, places in zip(reductions, bound_places(reductions), strict=True):
            bounds = {
                name: getattr(r, name) if place < 0 else rows[place].detach() + getattr(r, name).shift
                for name, place in zip(("lower", "upper"), places, strict=True)
            }
            row = reduce_rows(self.z, self.masks[r.side], replace(r, **bounds), self.order) + self.nonfinite
            rows.append(row.detach() if r.detach else row)
        return tuple(rows)

    def num_positives(self) -> Tensor:
        return self.masks["positives"].sum(1)

    def num_negatives(self) -> Tensor:
        return self.masks["negatives"].sum(1)

    def squared_norms(self) -> Tensor:
        return (self.x * self.x).sum(1)

    def restore(self, values: Tensor) -> Tensor:
        return values

    def arrange(self, values: Tensor) -> Tensor:
        return values

    def arrange_refs(self, values: Tensor) -> Tensor:
        return values

    def positive_blocks(self, most: int) -> list[range]:
        return [range(most)]  # the matrix is there anyway

    def positive_places(self, places: range) -> Tensor:
        mask = self.masks["positives"].to(torch.uint8)
        columns = torch.sort(mask, dim=1, descending=True, stable=True).indices[:, places.start : places.stop]
        return torch.nn.functional.pad(columns, (0, len(places) - columns.shape[1]))

    def similarities_at(self, refs: Tensor) -> Tensor:
        z = torch.nn.functional.pad(self.z, (0, 1)) if self.z.shape[1] == 0 else self.z
        return z.gather(1, refs)

    def class_pairs(self) -> ClassPairs:
        return pick_class_pairs(self.labels, None if self.square else self.ref_labels)

    def take_pairs(self, chosen: ClassPairs) -> ReferencePairs:
        z, labels = self.z[chosen.anchors][:, chosen.positives], chosen.place
        valid = labels < chosen.taken
        return ReferencePairs(z, labels, labels, square=False, ref_valid=valid, nonfinite=self.nonfinite)

    def matched_similarities(self) -> Tensor:
        return self.z.diagonal() + self.nonfinite

    def pair_sums(self, step: int) -> tuple[ReferencePairs, Tensor, Tensor, Tensor]:
        if not self.square:
            raise RuntimeError("pairs.pair_sums is of a batch with itself, without references")
        ordered, order = torch.sort(self.labels, stable=True)
        lo, hi = torch.searchsorted(ordered, ordered), torch.searchsorted(ordered, ordered, right=True)
        sorted_rows, partner, first = class_partners(lo, hi, step)
        place = torch.empty_like(order).index_copy(0, order, sorted_rows)
        p, first = order[partner[place]], first[place]
        z = self.z + self.z[p]
        sums = ReferencePairs(z, self.labels, self.labels, square=True, nonfinite=self.nonfinite)
        return sums, self.z.gather(1, p[:, None])[:, 0], p, first
