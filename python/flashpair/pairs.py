"""The engine: pairs of anchors and references, whose row reductions are fused and never stored.

    criterion -> Pairs.reduce -> one registered op -> the implementation that `dispatch` chose

A `Pairs` sorts once by label; its rows stand in the order of its `labels` until `restore` puts them back.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import checks
from .dispatch import choose
from .ops import RowReduce, encode
from .plan import Plan, make_plan, one_to_one
from .reduction import DISTANCES, Bound, Reduction
from .reference import ReferencePairs
from .rows import sorted_rows
from .similarity import poison, upcast


class Pairs:
    """N anchors against M references in label order. See `make_pairs`; `ReferencePairs` is the dense twin.

    Attributes:
        x: (N, D) sorted anchors, float32 or float64; `y`: (M, D) sorted references, None if they are the anchors.
        labels: (N,) int64 in the order of the rows; `ref_labels`: (M,).
    """

    def __init__(self, x: Tensor, y: Tensor | None, plan: Plan, distance: str, poison: Tensor | None = None) -> None:
        self.x, self.y, self.plan, self.distance, self.poison = x, y, plan, distance, poison
        self.labels, self.ref_labels, self.square = plan.labels, plan.ref_labels, plan.square

    @classmethod
    def from_embeddings(
        cls, x: Tensor, labels: Tensor, y: Tensor | None, ref_labels: Tensor | None, distance: str, unit: bool
    ) -> Pairs:
        plan = make_plan(labels, ref_labels)
        y = None if y is None else sorted_rows(y, plan.ref_order, unit=unit)
        return cls(sorted_rows(x, plan.order, unit=unit), y, plan, distance)

    def reduce(self, *reductions: Reduction) -> tuple[Tensor, ...]:
        """One tensor (N,) for each reduction; reductions of one call share their passes over the pairs."""
        n, like = self.x.shape[0], self.x

        def tensor(value: float | Tensor) -> Tensor:
            return torch.as_tensor(value, dtype=like.dtype, device=like.device)

        slots: list[int] = []
        vectors: list[Tensor] = []
        for k, r in enumerate(reductions):
            outside = r.op == "logsumexp"  # whose offset is added to the row's value
            own = (None if outside else r.offset, r.ref_offset, r.lower, r.upper)
            for slot, value in enumerate(own):
                if value is None or isinstance(value, Bound):
                    continue
                size = self.ref_labels.shape[0] if slot == 1 else n
                vector = tensor(value).expand(size).contiguous()
                slots.append(4 * k + slot)
                vectors.append(vector.detach() if slot > 1 else vector)
        scale = None
        if any(isinstance(r.scale, Tensor) for r in reductions):
            scale = torch.stack([tensor(r.scale) for r in reductions])
        p = self.plan
        spec = encode(reductions, tuple(slots), self.distance)
        rows = RowReduce.apply(spec, p.lo, p.hi, p.end, p.ref_order, self.x, self.y, scale, *vectors)
        found = []
        for row, r in zip(rows, reductions, strict=True):
            if r.op == "logsumexp" and r.offset is not None:
                row = row + (tensor(r.offset) if isinstance(r.offset, Tensor) else r.offset)
            row = row if self.poison is None else row + self.poison
            found.append(row.detach() if r.detach else row)
        return tuple(found)

    def num_positives(self) -> Tensor:  # (N,) int64
        return self.plan.hi - self.plan.lo - int(self.square)

    def num_negatives(self) -> Tensor:  # (N,) int64
        end = self.ref_labels.shape[0] if self.plan.end is None else self.plan.end
        return end - (self.plan.hi - self.plan.lo)

    def paired(self) -> Tensor:  # (N,)
        """z_kk of a rectangular problem whose rows and references belong together one by one; dot products alone."""
        return (self.x * self.refs).sum(1)

    @property
    def refs(self) -> Tensor:
        return self.x if self.y is None else self.y

    def select(self, rows: Tensor, refs: Tensor, labels: Tensor, count: Tensor) -> Pairs:
        """Row rows[k] against reference refs[k] as its one positive, k < count (); labels (K,) are 0, 1, ..."""
        plan = one_to_one(labels, count)
        bad = poison(self.x, self.y)  # of the samples left out, too
        return Pairs(self.x.index_select(0, rows), self.refs.index_select(0, refs), plan, self.distance, bad)

    def restore(self, values: Tensor) -> Tensor:
        """Row values (N,) in the caller's order."""
        return torch.empty_like(values).index_copy(0, self.plan.order, values)


def make_pairs(
    embeddings: Tensor,
    labels: Tensor,
    *,
    ref_emb: Tensor | None = None,
    ref_labels: Tensor | None = None,
    distance: str = "dot",
    normalize: bool = False,
    impl: str = "auto",
) -> Pairs | ReferencePairs:
    """The pairs of embeddings (N, D) with labels (N,), or of embeddings with `ref_emb` (M, D) and `ref_labels` (M,).

    Args:
        distance: ``"dot"`` or ``"euclidean"``. `normalize`: L2-normalise rows first.
        impl: as `Criterion` takes it.

    Raises:
        TypeError, ValueError: bad arguments, named. RuntimeError: an `impl` that cannot run here, with every reason.
    """
    checks.word(distance, DISTANCES, "distance")
    return checked_pairs(*checks.batch(embeddings, labels, ref_emb, ref_labels), distance, normalize, impl)


def checked_pairs(
    x: Tensor, labels: Tensor, y: Tensor | None, ref_labels: Tensor | None, distance: str, normalize: bool, impl: str
) -> Pairs | ReferencePairs:
    """`make_pairs` of arguments that `checks.batch` has returned."""
    x, y = upcast(x, y)
    kind = ReferencePairs if choose(impl, x, y) == "reference" else Pairs
    return kind.from_embeddings(x, labels, y, ref_labels, distance, normalize)
