"""Pairs of a batch with itself and with the entries of a memory, which get no gradient."""

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
    """A source of a batch and of the runs of a memory.

    The index of a reference among all references counts the batch's samples in the caller's order first, and then the
    entries of the memory, the oldest first.

    Args:
        labels: (N,) int64, of the batch, sorted.
        order: (N,) int64, the caller's index of each sample.
        runs: the runs of the memory, none of them empty.
        batch_as_rows: the chunk of the batch holds its rows, as those of the memory do, and gets their gradient.
    """

    def __init__(
        self, labels: Tensor, order: Tensor, runs: Sequence[SortedRun], *, batch_as_rows: bool = False
    ) -> None:
        self.labels, self.order, self.runs, self.batch_as_rows = labels, order, runs, batch_as_rows

    def labels_and_order(self) -> tuple[Tensor, Tensor]:
        raise AssertionError("the labels of a memory are not sorted as a whole")

    def counts(self) -> tuple[Tensor, int]:
        same = torch.zeros_like(self.labels)
        for labels, _ in self.parts():
            lo, hi = span(labels, self.labels)
            same += hi - lo
        return same, self.labels.shape[0] + sum(map(len, self.runs))

    def one_way(self) -> MemorySource:
        return MemorySource(self.labels, self.order, self.runs, batch_as_rows=True)

    def parts(self) -> Iterator[tuple[Tensor, Tensor]]:
        """For the batch and for each run, sorted labels (m,), and indices among all references (m,)."""
        yield self.labels, self.order
        for s in self.runs:
            yield s.labels, s.sequence_ids + self.labels.shape[0]

    def chunks(self, x: Tensor, y: Tensor | None, anchor_values: Tensor | None) -> Iterator[Chunk]:
        yield Chunk(y if self.batch_as_rows else None, self.labels, self.order, needs_grad=self.batch_as_rows)
        for s in self.runs:
            yield Chunk(s.rows.to(x.dtype), s.labels, s.sequence_ids + self.labels.shape[0])

    def send(self, chunk: Chunk, numbers: Tensor | None, grad: Tensor | None) -> list[Received]:
        return [Received(slice(None), None, grad)]

    def flush(self) -> list[Received]:
        return []


class MemoryPairs(ChunkedPairs):
    """Anchors (N, D), sorted, against themselves and a memory.

    Args:
        x: (N, D), the anchors, sorted by label.
        ref_source: the batch and the memory.
        distance: ``"dot"``, ``"euclidean"`` or ``"squared_euclidean"``.
        route: the backend that runs, and its dtype.
    """

    ref_source: MemorySource

    def __init__(self, x: Tensor, ref_source: MemorySource, distance: str, route: Route) -> None:
        super().__init__(x, ref_source.order, ref_source, True, distance, route)

    def _route_of(self, call: Call) -> Route:
        """The route of the batch; on the CPU `screened`, which screens runs that are large enough."""
        route = super()._route_of(call)
        return route if self.route.named else route_chunked_call(route, call, self.x)

    @property
    def ref_labels(self) -> Tensor:
        """(M,) int64, of the batch and of the memory, sorted."""
        return torch.cat([labels for labels, _ in self.ref_source.parts()]).sort().values

    def positive_places(self, places: range) -> Tensor:
        labels, n = self.labels, self.labels.shape[0]
        k = torch.arange(places.start, places.stop, device=labels.device)
        rank = torch.arange(n, device=labels.device)
        positives, before = torch.full((n, len(places)), -1, device=k.device), torch.zeros_like(labels)
        for part, (part_labels, order) in enumerate(self.ref_source.parts()):
            lo, hi = span(part_labels, labels)
            itself = int(part == 0)  # in the batch, one sample of the anchor's class is the anchor itself
            row = lo[:, None] + k - before[:, None]
            here = (row >= lo[:, None]) & (row < (hi - itself)[:, None])
            if itself:
                row = row + (row >= rank[:, None])
            if order.shape[0]:
                positives = torch.where(here, order[row.clamp(0, order.shape[0] - 1)], positives)
            before = before + (hi - lo - itself)
        return positives

    def class_pairs(self) -> ClassPairs:
        """The first sample of each class with the second one, or else with the oldest entry of the class in memory."""
        labels, n = self.labels, self.labels.shape[0]
        rank = torch.arange(n, device=labels.device)
        first = torch.searchsorted(labels, labels) == rank
        has_second = torch.searchsorted(labels, labels, right=True) > rank + 1
        none = torch.full_like(rank, torch.iinfo(torch.int64).max)
        oldest = none
        for s in self.ref_source.runs:
            lo, hi = span(s.labels, labels)
            sequence_id = torch.where(hi > lo, s.sequence_ids[lo.clamp_max(len(s) - 1)], none)
            oldest = torch.minimum(oldest, sequence_id)
        in_memory = oldest < none
        second = self.ref_source.order[(rank + 1).clamp_max(max(n - 1, 0))] if n else rank
        positives = torch.where(has_second, second, torch.where(in_memory, oldest + n, 0))
        return gather_class_pairs(rank, positives, first & (has_second | in_memory), n)


def span(labels: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Where each label of wanted (N,) begins and ends among sorted labels (M,), two tensors (N,) int64."""
    return torch.searchsorted(labels, wanted), torch.searchsorted(labels, wanted, right=True)
