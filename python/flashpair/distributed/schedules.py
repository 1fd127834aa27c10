"""How a process's anchors meet the references of all processes: gathered at once, or one process's at a time in a ring.

Of a batch whose anchors are its own references every two processes meet once, and what is found serves both of them: a
process visits the next W / 2 in the ring, and those at the opposite place (W even) visit each other with half of the
rows each. References beside the anchors are visited by everybody.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..chunked.pairs import LabelledSource
from ..core.chunks import Chunk, Received
from .collectives import RETURN, RING, Ranks, Transfer

WHOLE = slice(None)


class RankSource(LabelledSource):
    """What both schedules share.

    Args:
        labels: this process's anchors' (n,), sorted, and `order` (n,), their places among all anchors.
        ref_labels: every process's references', as they came; `two_sided`: these are the anchors.
    """

    def __init__(
        self, ranks: Ranks, labels: Tensor, order: Tensor, ref_labels: Sequence[Tensor], two_sided: bool
    ) -> None:
        self.ranks, self.labels, self.order, self.two_sided = ranks, labels, order, two_sided
        self.ref_labels, self.sizes = ref_labels, [t.shape[0] for t in ref_labels]
        self.first = [sum(self.sizes[:r]) for r in range(ranks.world)]
        self._labels_and_order: tuple[Tensor, Tensor] | None = None
        self._sorted: dict[int, tuple[Tensor, Tensor]] = {}

    def labels_and_order(self) -> tuple[Tensor, Tensor]:
        if self._labels_and_order is None:
            labels, order = torch.sort(torch.cat(list(self.ref_labels)), stable=True)
            self._labels_and_order = labels, order
        return self._labels_and_order

    def one_way(self) -> RankSource:
        return type(self)(self.ranks, self.labels, self.order, self.ref_labels, False)

    def sorted_of(self, rank: int) -> tuple[Tensor, Tensor]:
        """Labels of a process's references, sorted, and their places among all."""
        if rank not in self._sorted:
            labels, order = torch.sort(self.ref_labels[rank], stable=True)
            self._sorted[rank] = labels, order + self.first[rank]
        return self._sorted[rank]

    @property
    def steps(self) -> range:
        """Distances of the processes that this one visits."""
        return range(1, 1 + (self.ranks.world // 2 if self.two_sided else self.ranks.world - 1))

    def overlap(self, source: int, target: int) -> tuple[slice, slice]:
        """Which rows of each meet when one visits the other."""
        opposite = self.two_sided and 2 * ((target - source) % self.ranks.world) == self.ranks.world
        if not opposite:
            return WHOLE, WHOLE
        # the lower one of the two visits the first half of the other's rows, and is visited by its second half
        middle = self.sizes[max(source, target)] // 2
        return (WHOLE, slice(0, middle)) if source < target else (slice(middle, None), WHOLE)

    def own_chunk(self, y: Tensor | None) -> Chunk:
        """Of `two_sided`: the anchors among themselves; else this process's references."""
        labels, order = self.sorted_of(self.ranks.rank)
        if self.two_sided:
            return Chunk(None, labels, order)
        return Chunk(y, labels, order, wanted=True, tag=0)

    def chunk(self, step: int, rows: Tensor, anchor_values: Tensor | None) -> Chunk:
        """That of the process `step` places on, from all of its rows (m, D) and numbers (V, m)."""
        target = self.ranks.rank_at(step)
        mine, theirs = self.overlap(self.ranks.rank, target)
        labels, order = self.sorted_of(target)
        anchor_values = None if anchor_values is None else anchor_values[:, theirs]
        return Chunk(
            rows[theirs],
            labels[theirs],
            order[theirs],
            mine,
            self.two_sided,
            anchor_values,
            wanted=not self.two_sided,
            tag=step,
        )

    def exchange_numbers(self, step: int, numbers: Tensor | None) -> Received | None:
        """Exchanges numbers (V, m) found for the host `step` places on for those that the visitor from there found."""
        if numbers is None:
            return None
        target, source = self.ranks.rank_at(step), self.ranks.rank_at(-step)
        own = self.overlap(source, self.ranks.rank)[1]
        size = len(range(*own.indices(self.sizes[self.ranks.rank])))
        into = numbers.new_empty(numbers.shape[0], size)
        return Received(own, self.ranks.sendrecv(numbers.contiguous(), target, into, source, RETURN).wait(), None)


def _bytes(part: Tensor, size: int, rows: bool) -> int:
    """Of rows (size, D) or numbers (V, size) of the dtype and the width of `part`."""
    return size * part.itemsize * (part.shape[1] if rows else part.shape[0])


class Ring(RankSource):
    """One process's references at a time: each hands on to the process before it what it has, and is computing with it
    while the next comes. Memory: two processes' rows. Sent by each, a pass: its rows and numbers times the steps; a
    backward pass: the found gradients besides."""

    def chunks(self, x: Tensor, y: Tensor | None, anchor_values: Tensor | None) -> Iterator[Chunk]:
        rows = x if self.two_sided or y is None else y
        parts = [rows] if anchor_values is None or not self.two_sided else [anchor_values, rows]
        steps = self.steps

        def send_next(buffer: Tensor, step: int) -> Transfer:
            size = self.sizes[self.ranks.rank_at(step)]
            into = buffer.new_empty(sum(_bytes(part, size, part is rows) for part in parts))
            return self.ranks.sendrecv(buffer, self.ranks.rank_at(-1), into, self.ranks.rank_at(1), RING)

        buffer = torch.cat([part.contiguous().view(torch.uint8).reshape(-1) for part in parts])
        coming = send_next(buffer, steps[0]) if steps else None
        yield self.own_chunk(y)
        for step in steps:
            assert coming is not None
            buffer = coming.wait()
            coming = send_next(buffer, step + 1) if step + 1 in steps else None
            size = self.sizes[self.ranks.rank_at(step)]
            received, at = [], 0
            for part in parts:
                end = at + _bytes(part, size, part is rows)
                shape = (size, part.shape[1]) if part is rows else (part.shape[0], size)
                received.append(buffer[at:end].view(part.dtype).view(shape))
                at = end
            yield self.chunk(step, received[-1], received[0] if len(received) == 2 else None)

    def send(self, chunk: Chunk, numbers: Tensor | None, rows: Tensor | None) -> list[Received]:
        step, rank = chunk.tag, self.ranks.rank
        if not step:
            return [Received(WHOLE, None, rows)]
        received = self.exchange_numbers(step, numbers)
        if rows is None:
            return [] if received is None else [received]
        target, source = self.ranks.rank_at(step), self.ranks.rank_at(-step)
        own = self.overlap(source, rank)[1]
        into = rows.new_empty(len(range(*own.indices(self.sizes[rank]))), rows.shape[1])
        returned = self.ranks.sendrecv(rows.contiguous(), target, into, source, RETURN).wait()
        return [Received(own, None if received is None else received.numbers, returned)]

    def flush(self) -> list[Received]:
        return []


class AllGather(RankSource):
    """All references at once: one all-gather of rows for all passes, one of numbers a pass, and in backward one
    reduce-scatter. Memory: all processes' rows, and in backward their gradient."""

    def __init__(self, *args: object) -> None:
        super().__init__(*args)  # type: ignore[arg-type]
        self._rows: tuple[Tensor, list[Tensor]] | None = None
        self._out: Tensor | None = None

    def chunks(self, x: Tensor, y: Tensor | None, anchor_values: Tensor | None) -> Iterator[Chunk]:
        rows = x if self.two_sided or y is None else y
        if self._rows is None or self._rows[0].data_ptr() != rows.data_ptr() or self._rows[0].shape != rows.shape:
            self._rows = rows, self.ranks.gather(rows, self.sizes)
        numbers = (
            self.ranks.gather(anchor_values.T, self.sizes) if anchor_values is not None and self.two_sided else None
        )
        yield self.own_chunk(y)
        for step in self.steps:
            target = self.ranks.rank_at(step)
            yield self.chunk(step, self._rows[1][target], None if numbers is None else numbers[target].T)

    def send(self, chunk: Chunk, numbers: Tensor | None, rows: Tensor | None) -> list[Received]:
        step = chunk.tag
        if not step:
            return [Received(WHOLE, None, rows)]
        if rows is not None:
            if self._out is None:
                self._out = rows.new_zeros(self.ranks.world, max(self.sizes), rows.shape[1])
            target = self.ranks.rank_at(step)
            self._out[target, : self.sizes[target]][self.overlap(self.ranks.rank, target)[1]] += rows
        received = self.exchange_numbers(step, numbers)
        return [] if received is None else [received]

    def flush(self) -> list[Received]:
        if self._out is None:  # with one process there was nobody to visit
            return []
        out, self._out = self._out, None
        return [Received(WHOLE, None, self.ranks.reduce_scatter(out, self.sizes[self.ranks.rank]))]


SOURCES = {"all_gather": AllGather, "ring": Ring}
