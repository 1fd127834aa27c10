"""Pairs of a batch that processes share: each process has the rows of its own anchors, against all references."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..chunked.pairs import ChunkedPairs, FetchedRows
from ..core.chunks import NO_REFERENCE, places_of
from ..core.class_pairs import ClassPairs, pick_class_pairs
from ..core.pairs import PairAccess
from ..core.positives import PLACES, STEPS, cut
from ..core.reduction import Reduction
from ..core.similarity import l2_normalize, nan_unless_finite, upcast
from ..engine.dispatch import Route, route_chunks
from ..engine.sorted_rows import sorted_rows
from ..losses.base import Criterion
from .collectives import AllReduceSum, Ranks, all_logsumexp
from .schedules import SOURCES, RankSource


class SharedPairs(ChunkedPairs):
    """This process's anchors (n, D) against the references of all processes.

    `row_losses` of a criterion computes the losses of this process's rows from them. Sums over the batch (`batch_sum`)
    are over all processes, so every process must call them.

    Args:
        x: (n, D), this process's anchors, sorted by label.
        order: (n,) int64, the caller's index of each anchor.
        ref_source: the references of all processes.
        square: the anchors are the references.
        distance: ``"dot"``, ``"euclidean"`` or ``"squared_euclidean"``.
        route: the backend that runs, and its dtype.
        y: (m, D), this process's references, sorted; None if they are the anchors.
        sizes: the number of anchors of each process.
        nonfinite: () 0, or NaN if an embedding of any process is not finite.
    """

    ref_source: RankSource

    def __init__(
        self, x: Tensor, order: Tensor, ref_source: RankSource, square: bool, distance: str, route: Route,
        y: Tensor | None, sizes: list[int], nonfinite: Tensor,
    ) -> None:  # fmt: skip
        super().__init__(x, order, ref_source, square, distance, route, y, nonfinite)
        self.sizes = sizes
        self.chosen: ClassPairs | None = None  # the last result of `class_pairs`, for a penalty on the chosen samples

    @property
    def ranks(self) -> Ranks:
        return self.ref_source.ranks

    def batch_sum(self, values: Tensor) -> Tensor:
        total: Tensor = AllReduceSum.apply(self.ranks, values.sum(-1))
        return total

    def batch_logsumexp(self, values: Tensor) -> Tensor:
        return all_logsumexp(self.ranks, super().batch_logsumexp(values)[None])[0]

    def most_positives(self, most: int | None = None) -> int:
        return self.ranks.most_of_all(self.num_positives()) if most is None else most

    def positive_blocks(self, most: int) -> list[range]:
        """Larger blocks than elsewhere, because each block gets all references of the other processes again."""
        return cut(range(most), 2 * PLACES)

    def pair_sum_blocks(self, most: int) -> list[range]:
        """The steps that visit every ordered pair. So both samples of a pair get its value on their own process."""
        return cut(range(1, most + 1), STEPS)

    def pair_sums(self, step: int) -> tuple[SharedPairs, Tensor, Tensor, Tensor]:
        (labels, order), (same, _) = self.ref_source.labels_and_order(), self.counts()
        lo = torch.searchsorted(labels, self.labels)
        partner = lo + (self.own_places() - lo + step) % same
        x, ref_source = self.x.to(self.dtype), self.ref_source.one_way()
        other = FetchedRows.apply(ref_source, x, x, order[partner])
        order = self.label_order.order
        sums = SharedPairs(
            x + other, order, ref_source, False, self.distance, self.route, x, self.sizes, self.nonfinite
        )
        return sums, (x * other).sum(1), partner, step < same

    def class_pairs(self) -> ClassPairs:
        """One anchor and one positive of each class, from all processes' samples.

        The result holds the pairs whose anchor is on this process. Its `positives` are numbers of pairs among the pairs
        of all processes, which its `source` holds.
        """
        if self.square:
            every = pick_class_pairs(torch.cat(list(self.ref_source.ref_labels)), None, padded=False)
        else:
            anchor_labels = torch.cat(self.ranks.gather(self.restore(self.labels), self.sizes))
            every = pick_class_pairs(anchor_labels, torch.cat(list(self.ref_source.ref_labels)), padded=False)
        row = places_of(every.anchors[None], self.ref_source.order)[0]
        (number,) = torch.nonzero(row >= 0, as_tuple=True)
        place = torch.arange(number.shape[0], device=number.device)
        self.chosen = ClassPairs(row[number], number, place, number.new_full((), number.shape[0]), every)
        return self.chosen

    def chosen_here(self) -> ClassPairs | None:
        """The samples of this process in the last result of `class_pairs`, in the caller's order; None: there is none.

        `anchors` are its chosen anchors, and `positives` its chosen references. The two do not belong together.
        """
        if self.chosen is None:
            return None
        every, number = self.chosen.source, self.chosen.positives
        ref_source, rank = self.ref_source, self.ranks.rank
        anchors = every.anchors[number] - sum(self.sizes[:rank])
        first, last = ref_source.first[rank], ref_source.first[rank] + ref_source.sizes[rank]
        here = (every.positives >= first) & (every.positives < last)
        return ClassPairs(anchors, every.positives[here] - first, anchors[:0], anchors.new_full((), NO_REFERENCE))

    def take_pairs(self, chosen: ClassPairs) -> SharedPairs:
        """The chosen pairs. Anchors and positives stay on their processes.

        Raises:
            ValueError: `chosen` is no result of `class_pairs` of these pairs.
        """
        if not isinstance(chosen.source, ClassPairs):
            raise ValueError("chosen must be a result of class_pairs where processes share the batch")
        ref_source, every, number = self.ref_source, chosen.source, chosen.positives
        owner = torch.bucketize(every.positives, torch.tensor(ref_source.first[1:], device=number.device), right=True)
        of_rank = [torch.nonzero(owner == r, as_tuple=True)[0] for r in range(self.ranks.world)]
        row = places_of(every.positives[of_rank[self.ranks.rank]][None], ref_source.sorted_of(self.ranks.rank)[1])[0]
        y = self.shared_refs()
        assert y is not None
        taken = type(ref_source)(self.ranks, number, number, of_rank, False)
        x = self.x.to(self.dtype).index_select(0, chosen.anchors)
        sizes = [int(t) for t in torch.bincount(self._owners(every.anchors), minlength=self.ranks.world)]
        y = y.index_select(0, row)
        return SharedPairs(x, chosen.place, taken, False, self.distance, self.route, y, sizes, self.nonfinite)

    def select(self, rows: Tensor, refs: Tensor, labels: Tensor, count: Tensor, source: Any = None) -> PairAccess:
        """The old form of `take_pairs`, deprecated: of the last result of `class_pairs`."""
        if source is None and self.chosen is not None:
            source = self.chosen.source
        return super().select(rows, refs, labels, count, source)

    def _owners(self, anchors: Tensor) -> Tensor:
        """The process of each of some anchors (K,), which go by their index among all anchors."""
        ends = torch.tensor(self.sizes, device=anchors.device).cumsum(0)
        return torch.bucketize(anchors, ends, right=True)

    def matched_similarities(self) -> Tensor:
        """The similarity of each row with its one positive, (N,), for pairs that `take_pairs` returned."""
        (row,) = self.reduce(Reduction("sum", "positives"))
        return row

    def symmetrize(self, values: Tensor, other: Tensor, first: Tensor) -> Tensor:
        return torch.where(first, values, 0.0)


def of_batch(
    ranks: Ranks, schedule: str, impl: str, distance: str, normalize: bool, x: Tensor, labels: Tensor, sizes: list[int]
) -> SharedPairs:
    """The pairs of a batch whose anchors are its references.

    Args:
        ranks: the processes.
        schedule: see `gather`.
        impl: as `Criterion` takes it.
        distance: ``"dot"``, ``"euclidean"`` or ``"squared_euclidean"``.
        normalize: L2-normalise the rows first.
        x: (n, D), this process's embeddings.
        labels: (n,) int64.
        sizes: n of every process.
    """
    route = route_chunks(impl, x)
    every = ranks.gather(labels, sizes)
    ordered, order = torch.sort(labels, stable=True)
    ref_source = SOURCES[schedule](ranks, ordered, order + sum(sizes[: ranks.rank]), every, True)
    rows = sorted_rows(x.to(route.dtype), order, normalize=normalize, impl=route.backend)
    return SharedPairs(
        rows, order, ref_source, True, distance, route, None, sizes, ranks.sum(nan_unless_finite(rows, None))
    )


def of_references(
    ranks: Ranks, schedule: str, impl: str, distance: str, normalize: bool, x: Tensor, labels: Tensor, y: Tensor,
    ref_labels: Tensor, sizes: list[int], ref_sizes: list[int],
) -> SharedPairs:  # fmt: skip
    """The pairs of a batch with references of its own.

    Args:
        ranks: the processes.
        schedule: see `gather`.
        impl: as `Criterion` takes it.
        distance: ``"dot"``, ``"euclidean"`` or ``"squared_euclidean"``.
        normalize: L2-normalise the rows first.
        x: (n, D), this process's embeddings.
        labels: (n,) int64.
        y: (m, D), this process's references.
        ref_labels: (m,) int64.
        sizes: n of every process.
        ref_sizes: m of every process.
    """
    route = route_chunks(impl, x)
    every = ranks.gather(ref_labels, ref_sizes)
    ordered, order = torch.sort(labels, stable=True)
    ref_source = SOURCES[schedule](ranks, ordered, order + sum(sizes[: ranks.rank]), every, False)
    wide = torch.promote_types(route.dtype, y.dtype)
    rows = sorted_rows(x.to(wide), order, normalize=normalize, impl=route.backend)
    refs = sorted_rows(y.to(wide), torch.sort(ref_labels, stable=True).indices, normalize=normalize, impl=route.backend)
    return SharedPairs(
        rows, order, ref_source, False, distance, route, refs, sizes, ranks.sum(nan_unless_finite(rows, refs))
    )


def of_proxies(
    criterion: Criterion, weight: Tensor, how: tuple[Ranks, str, str], x: Tensor, labels: Tensor, sizes: list[int]
) -> SharedPairs:
    """The pairs of proxies, as anchors, with the embeddings of all processes.

    Args:
        criterion: the criterion that has the proxies.
        weight: (c, D), this process's proxies.
        how: the processes, the schedule and the implementation.
        x: (n, D), this process's embeddings.
        labels: (n,) int64.
        sizes: n of every process.
    """
    ranks = how[0]
    counts = [count for (count,) in ranks.all_gather_ints([weight.shape[0]], x.device)]
    first = sum(counts[: ranks.rank])
    x, wide = upcast(x, weight)
    assert wide is not None
    x = l2_normalize(x) if criterion.normalize else x
    classes = torch.arange(first, first + weight.shape[0], device=x.device)
    return of_references(*how, "dot", False, l2_normalize(wide), classes, x, labels, counts, sizes)
