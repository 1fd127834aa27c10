"""Pairs of samples with class weights where processes share the batch, or the classes."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.pairs import PairAccess, PairReducer
from ..core.reduction import Bound, Reduction
from .collectives import AllReduceSum, Ranks, all_logsumexp


class LocalPairs(PairReducer):
    """This process's pairs, whose own rows answer for themselves. Subclasses answer what several processes know.

    Args:
        pairs: this process's pairs.
        ranks: the processes.
    """

    def __init__(self, pairs: PairAccess, ranks: Ranks) -> None:
        self.pairs, self.ranks = pairs, ranks
        self.labels, self.square, self.distance = pairs.labels, pairs.square, pairs.distance

    @property
    def count(self) -> int:
        return self.pairs.count

    @property
    def dtype(self) -> torch.dtype:
        return self.pairs.dtype

    @property
    def x(self) -> Tensor:
        """The anchors' embeddings (N, D), sorted."""
        return self.pairs.x

    def squared_norms(self) -> Tensor:
        return self.pairs.squared_norms()

    def restore(self, values: Tensor) -> Tensor:
        return self.pairs.restore(values)

    def arrange(self, values: Tensor) -> Tensor:
        return self.pairs.arrange(values)


class SampleRows(LocalPairs):
    """Pairs of this process's samples with all class weights. Sums over the batch are over all processes' samples.

    Args:
        pairs: this process's samples against all classes.
        ranks: the processes.
    """

    limit = "sees one process's samples only, and is not available where processes share the batch"

    @property
    def ref_labels(self) -> Tensor:
        return self.pairs.ref_labels

    def reduce(self, *reductions: Reduction) -> tuple[Tensor, ...]:
        return self.pairs.reduce(*reductions)

    def num_positives(self) -> Tensor:
        return self.pairs.num_positives()

    def num_negatives(self) -> Tensor:
        return self.pairs.num_negatives()

    def arrange_refs(self, values: Tensor) -> Tensor:
        return self.pairs.arrange_refs(values)

    def positives(self, most: int | None = None, block: range | None = None) -> tuple[Tensor, Tensor]:
        """As `PairAccess.positives`, with the same number of places on every process."""
        return self.pairs.positives(self.most_positives(most), block)

    def positive_blocks(self, most: int) -> list[range]:
        """As `PairAccess.positive_blocks`."""
        return self.pairs.positive_blocks(most)

    def most_positives(self, most: int | None = None) -> int:
        """The largest number of positives that a row of any process has, at least 1; `most` if it is given."""
        return self.ranks.most_of_all(self.num_positives()) if most is None else most

    def batch_sum(self, values: Tensor) -> Tensor:
        total: Tensor = AllReduceSum.apply(self.ranks, self.pairs.batch_sum(values))
        return total

    def batch_logsumexp(self, values: Tensor) -> Tensor:
        return all_logsumexp(self.ranks, self.pairs.batch_logsumexp(values)[None])[0]

    def dense(self) -> SampleRows:
        """The same pairs over the dense matrix."""
        return SampleRows(self.pairs.dense(), self.ranks) if hasattr(self.pairs, "dense") else self


class MergedPairs(LocalPairs):
    """Pairs of all rows with this process's classes. Their row values are merged over the classes of all processes.

    Args:
        pairs: all rows against this process's classes [first, ...).
        ranks: the processes.
        first: the first of this process's classes.
        num_classes: the number of classes of all processes.
    """

    limit = "is not available where classes are split over processes"

    def __init__(self, pairs: PairAccess, ranks: Ranks, first: int, num_classes: int) -> None:
        super().__init__(pairs, ranks)
        self.labels, self.num_classes = pairs.labels + first, num_classes

    @property
    def ref_labels(self) -> Tensor:
        """(C,) int64, all classes."""
        return torch.arange(self.num_classes, device=self.labels.device)

    def num_positives(self) -> Tensor:
        return torch.ones_like(self.labels)

    def num_negatives(self) -> Tensor:
        return torch.full_like(self.labels, self.num_classes - 1)

    def reduce(self, *reductions: Reduction) -> tuple[Tensor, ...]:
        for r in reductions:
            if r.op not in ("sum", "logsumexp"):
                raise ValueError(
                    f"op must be 'sum' or 'logsumexp' where classes are split over processes, got {r.op!r}"
                )
            if isinstance(r.lower, Bound) or isinstance(r.upper, Bound):
                raise ValueError("lower and upper must not be a Bound where classes are split over processes")
            if isinstance(r.ref_offset, Tensor) and r.ref_offset.dim():
                raise ValueError("ref_offset must not be a vector where classes are split over processes")
        rows = []
        for row, r in zip(self.pairs.reduce(*reductions), reductions, strict=True):
            row = AllReduceSum.apply(self.ranks, row) if r.op == "sum" else all_logsumexp(self.ranks, row)
            rows.append(row.detach() if r.detach else row)
        return tuple(rows)
