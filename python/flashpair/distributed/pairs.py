"""`Pairs` of a batch that processes share: each has its own anchors' rows, against the references of all."""

from __future__ import annotations

import torch
from torch import Tensor

from ..chunked.pairs import ChunkedPairs, FetchedRows
from ..core.chunks import NO_REFERENCE, places_of
from ..core.class_pairs import ClassPairs, pick_class_pairs
from ..core.positives import PLACES, STEPS, cut
from ..core.reduction import Reduction
from ..core.similarity import l2_normalize, nan_unless_finite, upcast
from ..engine.dispatch import Route, route_chunks
from ..engine.sorted_rows import sorted_rows
from ..losses.base import Criterion
from .collectives import AllReduceSum, Ranks, all_logsumexp
from .schedules import SOURCES, RankSource


class SharedPairs(ChunkedPairs):
    """This process's anchors (n, D) against all references; `row_losses` of a criterion gives its rows' losses.

    What it asks of all rows (`batch_sum`) is of all processes, so that every process must ask for it.

    Args:
        sizes: how many anchors each process has.
        nonfinite: NaN where anybody's embeddings are not finite.
    """

    ref_source: RankSource

    def __init__(
        self, x: Tensor, order: Tensor, ref_source: RankSource, square: bool, distance: str, route: Route,
        y: Tensor | None, sizes: list[int], nonfinite: Tensor,
    ) -> None:  # fmt: skip
        super().__init__(x, order, ref_source, square, distance, route, y, nonfinite)
        self.sizes = sizes
        self.chosen: ClassPairs | None = None  # what `class_pairs` gave last, for a penalty on what takes part

    @property
    def ranks(self) -> Ranks:
        return self.ref_source.ranks

    def batch_sum(self, values: Tensor) -> Tensor:
        total: Tensor = AllReduceSum.apply(self.ranks, values.sum(-1))
        return total

    def batch_logsumexp(self, values: Tensor) -> Tensor:
        return all_logsumexp(self.ranks, super().batch_logsumexp(values)[None])[0]

    def most_positives(self, most: int | None = None) -> int:
        if most is not None:
            return most
        count = torch.cat([self.num_positives(), self.labels.new_ones(1)])
        return int(self.ranks.max(count.max()))

    def positive_blocks(self, most: int) -> list[range]:
        """More at a time: each block fetches all references of the other processes, as any pass does."""
        return cut(range(most), 2 * PLACES)

    def pair_sum_blocks(self, most: int) -> list[range]:
        """Every ordered pair is found from both of its ends, so that nothing has to go to the other's process."""
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
        """Of all processes' samples; of these, this process's anchors, and for positives the number of their class
        among those that have a pair. The choice knows all processes' pairs."""
        if self.square:
            every = pick_class_pairs(torch.cat(list(self.ref_source.ref_labels)), None, padded=False)
        else:
            own = self.restore(self.labels)
            anchors = torch.cat(self.ranks.gather(own, self.sizes))
            every = pick_class_pairs(anchors, torch.cat(list(self.ref_source.ref_labels)), padded=False)
        at = places_of(every.anchors[None], self.ref_source.order)[0]
        (number,) = torch.nonzero(at >= 0, as_tuple=True)
        place = torch.arange(number.shape[0], device=number.device)
        self.chosen = ClassPairs(at[number], number, place, number.new_full((), number.shape[0]), every)
        return self.chosen

    def chosen_here(self) -> ClassPairs | None:
        """Of the last choice: which of this process's own anchors, and which of its own references, in the caller's
        order, take part; None: nothing was chosen."""
        if self.chosen is None:
            return None
        every, number = self.chosen.source, self.chosen.positives
        ref_source, rank = self.ref_source, self.ranks.rank
        anchors = every.anchors[number] - sum(self.sizes[:rank])
        first, last = ref_source.first[rank], ref_source.first[rank] + ref_source.sizes[rank]
        mine = (every.positives >= first) & (every.positives < last)
        return ClassPairs(anchors, every.positives[mine] - first, anchors[:0], anchors.new_full((), NO_REFERENCE))

    def take_pairs(self, chosen: ClassPairs) -> SharedPairs:
        """Anchors and positives stay where they are.

        Raises:
            ValueError: a choice that `class_pairs` of these pairs did not give.
        """
        if not isinstance(chosen.source, ClassPairs):
            raise ValueError("take_pairs of a batch that processes share takes what its class_pairs gave")
        ref_source, every, number = self.ref_source, chosen.source, chosen.positives
        owner = torch.bucketize(every.positives, torch.tensor(ref_source.first[1:], device=number.device), right=True)
        of_rank = [torch.nonzero(owner == r, as_tuple=True)[0] for r in range(self.ranks.world)]
        at = places_of(every.positives[of_rank[self.ranks.rank]][None], ref_source.sorted_of(self.ranks.rank)[1])[0]
        y = self.shared_refs()
        assert y is not None
        taken = type(ref_source)(self.ranks, number, number, of_rank, False)
        x = self.x.to(self.dtype).index_select(0, chosen.anchors)
        sizes = [int(t) for t in torch.bincount(self._owners(every.anchors), minlength=self.ranks.world)]
        y = y.index_select(0, at)
        return SharedPairs(x, chosen.place, taken, False, self.distance, self.route, y, sizes, self.nonfinite)

    def _owners(self, anchors: Tensor) -> Tensor:
        ends = torch.tensor(self.sizes, device=anchors.device).cumsum(0)
        return torch.bucketize(anchors, ends, right=True)

    def matched_similarities(self) -> Tensor:
        """Of `take_pairs`: each anchor has one positive, wherever it is."""
        (row,) = self.reduce(Reduction("sum", "positives"))
        return row

    def symmetrize(self, values: Tensor, other: Tensor, first: Tensor) -> Tensor:
        return torch.where(first, values, 0.0)


def of_batch(
    ranks: Ranks, schedule: str, impl: str, distance: str, normalize: bool, x: Tensor, labels: Tensor, sizes: list[int]
) -> SharedPairs:
    """Of this process's embeddings (n, D) with labels (n,), all processes' having `sizes` rows."""
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
    """The same against all processes' references, of which this one has y (m, D) with ref_labels (m,)."""
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
    """Some of a criterion's proxies, this process's (c, D), as anchors against all processes' embeddings."""
    ranks = how[0]
    counts = [count for (count,) in ranks.all_gather_ints([weight.shape[0]], x.device)]
    first = sum(counts[: ranks.rank])
    x, wide = upcast(x, weight)
    assert wide is not None
    x = l2_normalize(x) if criterion.normalize else x
    classes = torch.arange(first, first + weight.shape[0], device=x.device)
    return of_references(*how, "dot", False, l2_normalize(wide), classes, x, labels, counts, sizes)
