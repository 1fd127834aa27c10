"""`Pairs` of a batch that processes share: each has its own anchors' rows, against the references of all."""

from __future__ import annotations

import torch
from torch import Tensor

from ..chunked.pairs import ChunkedPairs, FetchedRows, chunked_backend
from ..core.chunks import NO_REFERENCE, places_of
from ..core.class_pairs import ClassPairs, draw
from ..core.positives import PLACES, STEPS, cut
from ..core.problem import accumulator
from ..core.reduction import Reduction
from ..core.similarity import normalize, poison, upcast
from ..engine.sorted_rows import sorted_rows
from ..losses.base import Criterion
from .collectives import AllReduceSum, Ranks, merged
from .schedules import SOURCES, RankSource


class SharedPairs(ChunkedPairs):
    """This process's anchors (n, D) against all references; `row_losses` of a criterion gives its rows' losses.

    What it asks of all rows (`total`) is of all processes, so that every process must ask for it.
    """

    ref_source: RankSource
    poison: Tensor

    def __init__(
        self, x: Tensor, order: Tensor, ref_source: RankSource, square: bool, distance: str, impl: str,
        y: Tensor | None, sizes: list[int], bad: Tensor,
    ) -> None:  # fmt: skip
        super().__init__(x, order, ref_source, square, distance, impl, y)
        self.sizes = sizes  # of every process's anchors
        self.poison = bad  # NaN where anybody's embeddings are not finite
        self._drawn: tuple[ClassPairs, Tensor] | None = None

    @property
    def ranks(self) -> Ranks:
        return self.ref_source.ranks

    def total(self, values: Tensor) -> Tensor:
        total: Tensor = AllReduceSum.apply(self.ranks, values.sum(-1))
        return total

    def total_logsumexp(self, values: Tensor) -> Tensor:
        return merged(self.ranks, super().total_logsumexp(values)[None])[0]

    def most_positives(self, most: int | None = None) -> int:
        if most is not None:
            return most
        count = torch.cat([self.num_positives(), self.labels.new_ones(1)])
        return int(self.ranks.max(count.max()))

    def positive_blocks(self, most: int) -> list[range]:
        """More at a time: each block fetches all references of the other processes, as any pass does."""
        return cut(range(most), 2 * PLACES)

    def sum_blocks(self, most: int) -> list[range]:
        """Every ordered pair is found from both of its ends, so that nothing has to go to the other's process."""
        return cut(range(1, most + 1), STEPS)

    def sums(self, step: int) -> tuple[SharedPairs, Tensor, Tensor, Tensor]:
        (labels, order), (same, _) = self.ref_source.known(), self.counts()
        lo = torch.searchsorted(labels, self.labels)
        partner = lo + (self.own_places() - lo + step) % same
        x, ref_source = self.x.to(self.dtype), self.ref_source.singly()
        other = FetchedRows.apply(ref_source, x, x, order[partner])
        order, sizes, bad = self.label_order.order, self.sizes, self.poison
        sums = SharedPairs(x + other, order, ref_source, False, self.distance, self.impl, x, sizes, bad)
        return sums, (x * other).sum(1), partner, step < same

    def draw(self) -> ClassPairs:
        """Of all processes' samples; of these, this process's anchors, and for positives the number of their class
        among those that have a pair."""
        if self.square:
            found = draw(torch.cat(list(self.ref_source.ref_labels)), None, padded=False)
        else:
            own = torch.empty_like(self.labels).index_copy(0, self.label_order.order, self.labels)
            every = self.ranks.gather(own, self.sizes)
            found = draw(torch.cat(every), torch.cat(list(self.ref_source.ref_labels)), padded=False)
        at = places_of(found.anchors[None], self.ref_source.order)[0]
        (number,) = torch.nonzero(at >= 0, as_tuple=True)
        place = torch.arange(number.shape[0], device=number.device)
        self._drawn = found, number
        return ClassPairs(at[number], number, place, number.new_full((), number.shape[0]))

    @property
    def has_drawn(self) -> bool:
        return self._drawn is not None

    def drawn_here(self) -> ClassPairs:
        """Of the last `draw`: which of this process's own anchors, and which of its own references, in the caller's
        order, take part."""
        assert self._drawn is not None
        found, number = self._drawn
        ref_source, rank = self.ref_source, self.ranks.rank
        anchors = found.anchors[number] - sum(self.sizes[:rank])
        first, last = ref_source.first[rank], ref_source.first[rank] + ref_source.sizes[rank]
        mine = (found.positives >= first) & (found.positives < last)
        return ClassPairs(anchors, found.positives[mine] - first, anchors[:0], anchors.new_full((), NO_REFERENCE))

    def select(self, rows: Tensor, refs: Tensor, labels: Tensor, count: Tensor) -> SharedPairs:
        """The pairs of the last `draw`: anchors and positives stay where they are."""
        assert self._drawn is not None
        ref_source, (found, number) = self.ref_source, self._drawn
        owner = torch.bucketize(found.positives, torch.tensor(ref_source.first[1:], device=number.device), right=True)
        of_rank = [torch.nonzero(owner == r, as_tuple=True)[0] for r in range(self.ranks.world)]
        at = places_of(found.positives[of_rank[self.ranks.rank]][None], ref_source.sorted_of(self.ranks.rank)[1])[0]
        y = self.shared_refs()
        assert y is not None
        chosen = type(ref_source)(self.ranks, number, number, of_rank, False)
        x = self.x.to(self.dtype).index_select(0, rows)
        sizes = [int(t) for t in torch.bincount(self._owners(found.anchors), minlength=self.ranks.world)]
        y = y.index_select(0, at)
        return SharedPairs(x, labels, chosen, False, self.distance, self.impl, y, sizes, self.poison)

    def _owners(self, anchors: Tensor) -> Tensor:
        ends = torch.tensor(self.sizes, device=anchors.device).cumsum(0)
        return torch.bucketize(anchors, ends, right=True)

    def paired(self) -> Tensor:
        """Of `select`'s pairs: each anchor has one positive, wherever it is."""
        (row,) = self.reduce(Reduction("sum", "positives"))
        return row

    def at_both_ends(self, values: Tensor, other: Tensor, first: Tensor) -> Tensor:
        return torch.where(first, values, 0.0)


def of_batch(
    ranks: Ranks, schedule: str, impl: str, distance: str, unit: bool, x: Tensor, labels: Tensor, sizes: list[int]
) -> SharedPairs:
    """Of this process's embeddings (n, D) with labels (n,), all processes' having `sizes` rows."""
    chosen = chunked_backend(impl, x)
    every = ranks.gather(labels, sizes)
    ordered, order = torch.sort(labels, stable=True)
    ref_source = SOURCES[schedule](ranks, ordered, order + sum(sizes[: ranks.rank]), every, True)
    rows = sorted_rows(x.to(accumulator(x.dtype)), order, unit=unit, impl=chosen)
    return SharedPairs(rows, order, ref_source, True, distance, chosen, None, sizes, ranks.sum(poison(rows, None)))


def of_references(
    ranks: Ranks, schedule: str, impl: str, distance: str, unit: bool, x: Tensor, labels: Tensor, y: Tensor,
    ref_labels: Tensor, sizes: list[int], ref_sizes: list[int],
) -> SharedPairs:  # fmt: skip
    """The same against all processes' references, of which this one has y (m, D) with ref_labels (m,)."""
    chosen = chunked_backend(impl, x)
    every = ranks.gather(ref_labels, ref_sizes)
    ordered, order = torch.sort(labels, stable=True)
    ref_source = SOURCES[schedule](ranks, ordered, order + sum(sizes[: ranks.rank]), every, False)
    wide = torch.promote_types(accumulator(x.dtype), y.dtype)
    rows = sorted_rows(x.to(wide), order, unit=unit, impl=chosen)
    refs = sorted_rows(y.to(wide), torch.sort(ref_labels, stable=True).indices, unit=unit, impl=chosen)
    return SharedPairs(rows, order, ref_source, False, distance, chosen, refs, sizes, ranks.sum(poison(rows, refs)))


def of_proxies(
    criterion: Criterion, weight: Tensor, how: tuple[Ranks, str, str], x: Tensor, labels: Tensor, sizes: list[int]
) -> SharedPairs:
    """Some of a criterion's proxies, this process's (c, D), as anchors against all processes' embeddings."""
    ranks = how[0]
    counts = [count for (count,) in ranks.tell([weight.shape[0]], x.device)]
    first = sum(counts[: ranks.rank])
    x, wide = upcast(x, weight)
    assert wide is not None
    x = normalize(x) if criterion.normalize else x
    classes = torch.arange(first, first + weight.shape[0], device=x.device)
    return of_references(*how, "dot", False, normalize(wide), classes, x, labels, counts, sizes)
