"""Pairs of a batch with itself, as a square problem, and with a memory's entries, which are constants."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..chunked.pairs import ChunkedPairs, LabelledSource
from ..core.call import Call
from ..core.chunks import Chunk, Received
from ..core.class_pairs import ClassPairs, gather_class_pairs
from ..engine.dispatch import Route, route_chunked_call
from .queue import SortedRun


class MemorySource(LabelledSource):
    """The batch, then each run of the memory. References stand in the order of the batch's samples, as they came,
    and then of the memory's entries, the oldest first.

    Args:
        labels: the batch's (N,), sorted; `order`: (N,) the caller's index of each.
        runs: none of them empty.
        batch_as_rows: the batch comes as rows that are met one way, as the memory's are, with their gradient.
    """

    def __init__(
        self, labels: Tensor, order: Tensor, runs: Sequence[SortedRun], *, batch_as_rows: bool = False
    ) -> None:
        self.labels, self.order, self.runs, self.batch_as_rows = labels, order, runs, batch_as_rows

    def labels_and_order(self) -> tuple[Tensor, Tensor]:
        raise AssertionError("nobody sorts a memory's labels in each step")

    def counts(self) -> tuple[Tensor, int]:
        same = torch.zeros_like(self.labels)
        for labels, _ in self.parts():
            lo, hi = span(labels, self.labels)
            same += hi - lo
        return same, self.labels.shape[0] + sum(map(len, self.runs))

    def one_way(self) -> MemorySource:
        return MemorySource(self.labels, self.order, self.runs, batch_as_rows=True)

    def parts(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Labels, sorted, and places among all references of the batch and of each run."""
        yield self.labels, self.order
        for s in self.runs:
            yield s.labels, s.sequence_ids + self.labels.shape[0]

    def chunks(self, x: Tensor, y: Tensor | None, anchor_values: Tensor | None) -> Iterator[Chunk]:
        yield Chunk(y if self.batch_as_rows else None, self.labels, self.order, wanted=self.batch_as_rows)
        for s in self.runs:
            yield Chunk(s.rows.to(x.dtype), s.labels, s.sequence_ids + self.labels.shape[0])

    def send(self, chunk: Chunk, numbers: Tensor | None, rows: Tensor | None) -> list[Received]:
        return [Received(slice(None), None, rows)]

    def flush(self) -> list[Received]:
        return []


class MemoryPairs(ChunkedPairs):
    """Anchors (N, D) against themselves and a memory, of whose entries only counts and places are looked for."""

    ref_source: MemorySource

    def __init__(self, x: Tensor, ref_source: MemorySource, distance: str, route: Route) -> None:
        super().__init__(x, ref_source.order, ref_source, True, distance, route)

    def _route_of(self, call: Call) -> Route:
        """The batch's, or `screened` for those runs of the memory that are worth it."""
        route = super()._route_of(call)
        return route if self.route.named else route_chunked_call(route, call, self.x)

    @property
    def ref_labels(self) -> Tensor:
        """Of the batch and of the memory (M,), sorted."""
        return torch.cat([labels for labels, _ in self.ref_source.parts()]).sort().values

    def positive_places(self, places: range) -> Tensor:
        labels, n = self.labels, self.labels.shape[0]
        k = torch.arange(places.start, places.stop, device=labels.device)
        rank = torch.arange(n, device=labels.device)
        places_of_positives, before = torch.full((n, len(places)), -1, device=k.device), torch.zeros_like(labels)
        for part, (others, order) in enumerate(self.ref_source.parts()):
            lo, hi = span(others, labels)
            own = int(part == 0)  # of its class in the batch one is the anchor itself
            at = lo[:, None] + k - before[:, None]
            here = (at >= lo[:, None]) & (at < (hi - own)[:, None])
            if own:
                at = at + (at >= rank[:, None])
            if order.shape[0]:
                places_of_positives = torch.where(here, order[at.clamp(0, order.shape[0] - 1)], places_of_positives)
            before = before + (hi - lo - own)
        return places_of_positives

    def class_pairs(self) -> ClassPairs:
        """The first sample of each class, with the second one or, without it, the first that stands in the memory."""
        labels, n = self.labels, self.labels.shape[0]
        rank = torch.arange(n, device=labels.device)
        first = torch.searchsorted(labels, labels) == rank
        follows = torch.searchsorted(labels, labels, right=True) > rank + 1
        none = torch.full_like(rank, torch.iinfo(torch.int64).max)
        oldest = none
        for s in self.ref_source.runs:
            lo, hi = span(s.labels, labels)
            stamp = torch.where(hi > lo, s.sequence_ids[lo.clamp_max(len(s) - 1)], none)
            oldest = torch.minimum(oldest, stamp)
        there = oldest < none
        second = self.ref_source.order[(rank + 1).clamp_max(max(n - 1, 0))] if n else rank
        positives = torch.where(follows, second, torch.where(there, oldest + n, 0))
        return gather_class_pairs(rank, positives, first & (follows | there), n)


def span(labels: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Where each of wanted (N,) begins and ends among sorted labels (M,)."""
    return torch.searchsorted(labels, wanted), torch.searchsorted(labels, wanted, right=True)
