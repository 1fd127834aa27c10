"""The specification: every reduction over the dense similarity matrix, in plain differentiable PyTorch.

Short and readable comes first. It takes any dtype and any device, compares labels directly (no sorting) and can be
differentiated twice; every other implementation is tested against it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..core.class_pairs import ClassPairs, draw
from ..core.positives import STEPS, cut
from ..core.problem import plain
from ..core.reduction import BUILT_IN, Reduction, bound_places, check_call
from ..core.similarity import alike, copies, dense_pairs, logaddexp, masked_logsumexp, normalize, poison, softplus
from ..core.transforms import custom


def _column(value: Any, dtype: torch.dtype) -> Any:
    """A number as it is; a tensor () or (N,) in that dtype, the latter as a column."""
    if not isinstance(value, Tensor):
        return value
    return value.to(dtype)[:, None] if value.dim() == 1 else value.to(dtype)


def reduce_rows(z: Tensor, mask: Tensor, r: Reduction, order: Tensor | None = None) -> Tensor:
    """One reduction (N,) of the pairs `z` (N, M) where `mask` (N, M) (the reduction's side, no self pairs).

    order: (M,) int64, the caller's place of each column: of equal extremes the lowest has the gradient; None: as they
    stand.
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
            found = kept.detach().amin(1) if r.op == "min" else kept.detach().amax(1)
            first = torch.where(kept == found[:, None], order, order.shape[0]).argmin(1)
            return kept.gather(1, first[:, None])[:, 0]
        return (kept.min(1) if r.op == "min" else kept.max(1)).values
    if r.transform == "lifted":
        assert isinstance(r.offset, Tensor) and r.ref_offset is not None
        reach = logaddexp(*torch.broadcast_tensors(_column(r.offset, z.dtype), r.ref_offset.to(z.dtype)[None, :]))
        t = torch.where(mask, z * r.scale + reach, 0.0).relu().square()
    else:
        own = 0.0 if r.offset is None or r.offset_outside else _column(r.offset, z.dtype)
        s = torch.where(mask, z * r.scale, 0.0) if r.transform != "identity" else z * r.scale
        t = custom(r.transform).of_pairs(s, own) if r.transform not in BUILT_IN else _phi(s + own, r.transform)
    if r.op == "logsumexp":
        value = masked_logsumexp(t, mask)
        outside = r.offset if r.offset_outside and r.offset is not None else None
        return value if outside is None else value + (outside.to(z.dtype) if isinstance(outside, Tensor) else outside)
    return torch.where(mask, t, 0.0).sum(1)


def _phi(t: Tensor, transform: str) -> Tensor:
    if transform == "softplus":
        return softplus(t)
    if transform == "hinge":
        return t.relu()
    if transform == "squared_hinge":
        return t.relu().square()
    return (1 - t.abs()).relu() if transform == "triangle" else t


class ReferencePairs:
    """The same as `Pairs` over a dense matrix: rows are anchors, columns references, both in the caller's order.

    Args:
        z: (N, M) similarities or distances; gradients flow into it.
        labels: (N,) int64.
        ref_labels: (M,) int64.
        square: row i and column i are the same sample, which is no pair.
        ref_valid: None, or (M,) bool: references that take part.
        poison: a tensor () added to every row value: 0, or NaN when an embedding is not finite.
        order: None, or (M,) int64: the caller's place of each reference, where columns stand in another order.
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
        order: Tensor | None = None,
    ) -> None:
        self.order = order
        self.z, self.labels, self.ref_labels, self.square = z, labels, ref_labels, square
        self.poison = z.new_zeros(()) if poison is None else poison
        self.x: Tensor | None = None
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
        refs = x if y is None else y
        z = dense_pairs(x, refs, distance)
        if distance == "dot" and x.device.type == "cpu" and plain(x) and plain(refs):
            z = alike(z, copies(refs))
        pairs = cls(z, labels, labels if ref_labels is None else ref_labels, square=y is None, poison=poison(x, y))
        pairs.x = x
        return pairs

    @property
    def count(self) -> int:
        """How many rows there are."""
        return self.z.shape[0]

    def reduce(self, *reductions: Reduction) -> tuple[Tensor, ...]:
        check_call(reductions, self.z, *self.z.shape)
        rows: list[Tensor] = []
        for r, places in zip(reductions, bound_places(reductions), strict=True):
            bounds = {
                name: getattr(r, name) if place < 0 else rows[place].detach() + getattr(r, name).shift
                for name, place in zip(("lower", "upper"), places, strict=True)
            }
            row = reduce_rows(self.z, self.masks[r.side], replace(r, **bounds), self.order) + self.poison
            rows.append(row.detach() if r.detach else row)
        return tuple(rows)

    def num_positives(self) -> Tensor:  # (N,) int64
        return self.masks["positives"].sum(1)

    def num_negatives(self) -> Tensor:  # (N,) int64
        return self.masks["negatives"].sum(1)

    def paired(self) -> Tensor:  # (N,)
        """z_kk of a rectangular problem whose rows and references belong together one by one."""
        return self.z.diagonal() + self.poison

    def positive_blocks(self, most: int) -> list[range]:
        """All K = `most` places at once."""
        return [range(most)]

    def positives(self, most: int | None = None, block: range | None = None) -> tuple[Tensor, Tensor]:
        """z of each row's positives (N, K), 0 where a row has fewer, and where there are any (N, K) bool.

        most: K; by default the most that a row has, at least 1. A row with more of them is NaN.
        block: these of the K places only.
        """
        mask, most = self.masks["positives"], self.most_positives(most)
        block = range(most) if block is None else block
        order = torch.sort(mask.to(torch.uint8), dim=1, descending=True, stable=True).indices[
            :, block.start : block.stop
        ]
        order = torch.nn.functional.pad(order, (0, len(block) - order.shape[1]))
        z = torch.nn.functional.pad(self.z, (0, 1)) if self.z.shape[1] == 0 else self.z
        return pad_positives(z.gather(1, order), self.num_positives(), self.poison, most, block.start)

    def most_positives(self, most: int | None = None) -> int:
        if most is not None:
            return most
        if self.z.device.type == "meta":
            raise RuntimeError(
                "max_positives must be given for meta tensors, whose positives cannot be counted, got None"
            )
        return max(1, int(self.masks["positives"].sum(1).amax())) if self.labels.shape[0] else 1

    def sum_blocks(self, most: int) -> list[range]:
        """The steps of `sums` that visit every pair of rows that have up to `most` positives, a few at a time."""
        return cut(range(1, (most + 1) // 2 + 1), STEPS)

    def at_both_ends(self, values: Tensor, other: Tensor, first: Tensor) -> Tensor:
        """Values (N,) of the unordered pairs of `sums`, where `first`, at the pair's other end, row `other`, too."""
        values = torch.where(first, values, 0.0)
        return values + torch.empty_like(values).index_copy(0, other, values)

    def sums(self, step: int) -> tuple[ReferencePairs, Tensor, Tensor, Tensor]:
        """Of a square problem: rows x_i + x_p, where p follows i by `step` places around its class; z_ip (N,); p (N,),
        and where i and p are two and i comes first (N,) bool. Steps 1 to (K + 1) // 2 visit every unordered pair once.
        """
        ordered, order = torch.sort(self.labels, stable=True)
        lo, hi = torch.searchsorted(ordered, ordered), torch.searchsorted(ordered, ordered, right=True)
        at, partner, first = partners(lo, hi, step)
        place = torch.empty_like(order).index_copy(0, order, at)
        p, first = order[partner[place]], first[place]
        z = self.z + self.z[p]
        sums = ReferencePairs(z, self.labels, self.labels, square=True, poison=self.poison)
        return sums, self.z.gather(1, p[:, None])[:, 0], p, first

    @property
    def dtype(self) -> torch.dtype:
        """Of row values."""
        return self.z.dtype

    def squares(self) -> Tensor:  # (N,)
        """Squared norms of the rows."""
        assert self.x is not None
        return (self.x * self.x).sum(1)

    def draw(self) -> ClassPairs:
        """One anchor and one positive of each class, as `select` takes them."""
        return draw(self.labels, None if self.square else self.ref_labels)

    def select(self, rows: Tensor, refs: Tensor, labels: Tensor, count: Tensor) -> ReferencePairs:
        """Row rows[k] against reference refs[k] as its one positive, k < count (); labels (K,) are 0, 1, ..."""
        z = self.z[rows][:, refs]
        return ReferencePairs(z, labels, labels, square=False, ref_valid=labels < count, poison=self.poison)

    def total(self, values: Tensor) -> Tensor:
        """The sum over all rows of values (..., N); where a batch is shared by processes, over those of all."""
        return values.sum(-1)

    def total_logsumexp(self, values: Tensor) -> Tensor:
        """The logsumexp () of all rows' values (N,), -inf among them; over all processes' rows as `total`."""
        return masked_logsumexp(values[None], (values != -torch.inf)[None])[0]

    def restore(self, values: Tensor) -> Tensor:
        """Row values (N,) in the caller's order, which is this class's own."""
        return values


def pad_positives(z: Tensor, count: Tensor, poison: Tensor, most: int, first: int) -> tuple[Tensor, Tensor]:
    """`Pairs.positives` from z (N, K) of places `first` and on. A row has `count` (N,) of them, and may have `most`."""
    there = torch.arange(first, first + z.shape[1], device=z.device) < count[:, None]
    lost = torch.where(count > most, torch.nan, 0.0).to(z.dtype)
    return torch.where(there, z, 0.0) + lost[:, None] + poison, there


def partners(lo: Tensor, hi: Tensor, step: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of sorted rows with classes [lo, hi): the rows (N,), those `step` places further around their class, and whether
    the pair is one that no other row has: of a class of even size the pairs of opposite places come up twice."""
    i = torch.arange(lo.shape[0], device=lo.device)
    size = hi - lo
    partner = lo + (i - lo + step) % size
    return i, partner, (2 * step < size) | ((2 * step == size) & (i < partner))
