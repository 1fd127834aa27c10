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
from .collectives import HOME, RING, Exchange, Ranks

WHOLE = slice(None)


class RankSource(LabelledSource):
    """What both schedules share.

    Args:
        labels: this process's anchors' (n,), sorted, and `order` (n,), their places among all anchors.
        ref_labels: every process's references', as they came; `both`: these are the anchors.
    """

    def __init__(self, ranks: Ranks, labels: Tensor, order: Tensor, ref_labels: Sequence[Tensor], both: bool) -> None:
        self.ranks, self.labels, self.order, self.both = ranks, labels, order, both
        self.ref_labels, self.sizes = ref_labels, [t.shape[0] for t in ref_labels]
        self.first = [sum(self.sizes[:r]) for r in range(ranks.world)]
        self._known: tuple[Tensor, Tensor] | None = None
        self._sorted: dict[int, tuple[Tensor, Tensor]] = {}

    def known(self) -> tuple[Tensor, Tensor]:
        if self._known is None:
            labels, order = torch.sort(torch.cat(list(self.ref_labels)), stable=True)
            self._known = labels, order
        return self._known

    def singly(self) -> RankSource:
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
        return range(1, 1 + (self.ranks.world // 2 if self.both else self.ranks.world - 1))

    def meeting(self, visitor: int, host: int) -> tuple[slice, slice]:
        """Which rows of each meet when one visits the other."""
        opposite = self.both and 2 * ((host - visitor) % self.ranks.world) == self.ranks.world
        if not opposite:
            return WHOLE, WHOLE
        # the lower one of the two visits the first half of the other's rows, and is visited by its second half
        middle = self.sizes[max(visitor, host)] // 2
        return (WHOLE, slice(0, middle)) if visitor < host else (slice(middle, None), WHOLE)

    def own_piece(self, y: Tensor | None) -> Chunk:
        """Of `both`: the anchors among themselves; else this process's references."""
        labels, order = self.sorted_of(self.ranks.rank)
        if self.both:
            return Chunk(None, labels, order)
        return Chunk(y, labels, order, wanted=True, tag=0)

    def chunk(self, step: int, rows: Tensor, along: Tensor | None) -> Chunk:
        """That of the process `step` places on, from all of its rows (m, D) and numbers (V, m)."""
        host = self.ranks.at(step)
        mine, theirs = self.meeting(self.ranks.rank, host)
        labels, order = self.sorted_of(host)
        along = None if along is None else along[:, theirs]
        return Chunk(
            rows[theirs], labels[theirs], order[theirs], mine, self.both, along, wanted=not self.both, tag=step
        )

    def numbers_home(self, step: int, numbers: Tensor | None) -> Received | None:
        """Exchanges numbers (V, m) found for the host `step` places on for those that the visitor from there found."""
        if numbers is None:
            return None
        host, visitor = self.ranks.at(step), self.ranks.at(-step)
        own = self.meeting(visitor, self.ranks.rank)[1]
        size = len(range(*own.indices(self.sizes[self.ranks.rank])))
        into = numbers.new_empty(numbers.shape[0], size)
        return Received(own, self.ranks.exchange(numbers.contiguous(), host, into, visitor, HOME).wait(), None)


def _bytes(part: Tensor, size: int, rows: bool) -> int:
    """Of rows (size, D) or numbers (V, size) of the dtype and the width of `part`."""
    return size * part.itemsize * (part.shape[1] if rows else part.shape[0])


class Ring(RankSource):
    """One process's references at a time: each hands on to the process before it what it has, and is computing with it
    while the next comes. Memory: two processes' rows. Sent by each, a pass: its rows and numbers times the steps; a
    backward pass: the found gradients besides."""

    def chunks(self, x: Tensor, y: Tensor | None, along: Tensor | None) -> Iterator[Chunk]:
        rows = x if self.both or y is None else y
        parts = [rows] if along is None or not self.both else [along, rows]
        steps = self.steps

        def hand_on(packet: Tensor, step: int) -> Exchange:
            size = self.sizes[self.ranks.at(step)]
            into = packet.new_empty(sum(_bytes(part, size, part is rows) for part in parts))
            return self.ranks.exchange(packet, self.ranks.at(-1), into, self.ranks.at(1), RING)

        packet = torch.cat([part.contiguous().view(torch.uint8).reshape(-1) for part in parts])
        coming = hand_on(packet, steps[0]) if steps else None
        yield self.own_piece(y)
        for step in steps:
            assert coming is not None
            packet = coming.wait()
            coming = hand_on(packet, step + 1) if step + 1 in steps else None
            size = self.sizes[self.ranks.at(step)]
            found, at = [], 0
            for part in parts:
                end = at + _bytes(part, size, part is rows)
                shape = (size, part.shape[1]) if part is rows else (part.shape[0], size)
                found.append(packet[at:end].view(part.dtype).view(shape))
                at = end
            yield self.chunk(step, found[-1], found[0] if len(found) == 2 else None)

    def send(self, chunk: Chunk, numbers: Tensor | None, rows: Tensor | None) -> list[Received]:
        step, rank = chunk.tag, self.ranks.rank
        if not step:
            return [Received(WHOLE, None, rows)]
        found = self.numbers_home(step, numbers)
        if rows is None:
            return [] if found is None else [found]
        host, visitor = self.ranks.at(step), self.ranks.at(-step)
        own = self.meeting(visitor, rank)[1]
        into = rows.new_empty(len(range(*own.indices(self.sizes[rank]))), rows.shape[1])
        home = self.ranks.exchange(rows.contiguous(), host, into, visitor, HOME).wait()
        return [Received(own, None if found is None else found.numbers, home)]

    def flush(self) -> list[Received]:
        return []


class AllGather(RankSource):
    """All references at once: one all-gather of rows for all passes, one of numbers a pass, and in backward one
    reduce-scatter. Memory: all processes' rows, and in backward their gradient."""

    def __init__(self, *args: object) -> None:
        super().__init__(*args)  # type: ignore[arg-type]
        self._rows: tuple[Tensor, list[Tensor]] | None = None
        self._out: Tensor | None = None

    def chunks(self, x: Tensor, y: Tensor | None, along: Tensor | None) -> Iterator[Chunk]:
        rows = x if self.both or y is None else y
        if self._rows is None or self._rows[0].data_ptr() != rows.data_ptr() or self._rows[0].shape != rows.shape:
            self._rows = rows, self.ranks.gather(rows, self.sizes)
        numbers = self.ranks.gather(along.T, self.sizes) if along is not None and self.both else None
        yield self.own_piece(y)
        for step in self.steps:
            host = self.ranks.at(step)
            yield self.chunk(step, self._rows[1][host], None if numbers is None else numbers[host].T)

    def send(self, chunk: Chunk, numbers: Tensor | None, rows: Tensor | None) -> list[Received]:
        step = chunk.tag
        if not step:
            return [Received(WHOLE, None, rows)]
        if rows is not None:
            if self._out is None:
                self._out = rows.new_zeros(self.ranks.world, max(self.sizes), rows.shape[1])
            host = self.ranks.at(step)
            self._out[host, : self.sizes[host]][self.meeting(self.ranks.rank, host)[1]] += rows
        found = self.numbers_home(step, numbers)
        return [] if found is None else [found]

    def flush(self) -> list[Received]:
        if self._out is None:  # with one process there was nobody to visit
            return []
        out, self._out = self._out, None
        return [Received(WHOLE, None, self.ranks.scatter_sum(out, self.sizes[self.ranks.rank]))]


SOURCES = {"all_gather": AllGather, "ring": Ring}
