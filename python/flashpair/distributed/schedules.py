"""How a process gets the references of all W processes: by one all-gather, or one process at a time in a ring.

A *step* is a distance in the ring of processes. In step s, process r computes the pairs of its anchors with the
references of process r + s (mod W), its *target*; process r - s (mod W), its *source*, computes pairs with the
references of process r.

- In a one-way schedule the references are no anchors. The steps are 1 to W - 1, so each process computes the pairs of
  its anchors with all references.
- In a two-sided schedule the references are the anchors. Every two processes compute the pairs between them once, and
  the values and gradients go to both. The steps are 1 to W / 2. If W is even, the last step is to the opposite process,
  which would compute the same pairs; so each of the two takes half of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..chunked.pairs import LabelledSource
from ..core.chunks import Chunk, Received
from .collectives import RETURN, RING, Ranks, Transfer

ALL_ROWS = slice(None)


class RankSource(LabelledSource):
    """The references of all processes: the parts that both schedules share.

    Args:
        ranks: the processes.
        labels: (n,) int64, of this process's anchors, sorted.
        order: (n,) int64, the index of each of them among all anchors.
        ref_labels: for each process the labels (m_r,) of its references, in the caller's order.
        two_sided: the references are the anchors.
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
        """The labels of a process's references, sorted, and the index of each among all references."""
        if rank not in self._sorted:
            labels, order = torch.sort(self.ref_labels[rank], stable=True)
            self._sorted[rank] = labels, order + self.first[rank]
        return self._sorted[rank]

    @property
    def steps(self) -> range:
        """The steps, beside the process's own references."""
        return range(1, 1 + (self.ranks.world // 2 if self.two_sided else self.ranks.world - 1))

    def overlap(self, source: int, target: int) -> tuple[slice, slice]:
        """Which anchors of process `source` make pairs with which references of process `target`, as slices of each."""
        opposite = self.two_sided and 2 * ((target - source) % self.ranks.world) == self.ranks.world
        if not opposite:
            return ALL_ROWS, ALL_ROWS
        # The rows of the higher rank are halved. The lower rank takes the first half as its references, and the second
        # half are anchors of the higher rank.
        middle = self.sizes[max(source, target)] // 2
        return (ALL_ROWS, slice(0, middle)) if source < target else (slice(middle, None), ALL_ROWS)

    def own_chunk(self, y: Tensor | None) -> Chunk:
        """The chunk of this process's own references. y: (m, D), these, sorted; not used where they are the anchors."""
        labels, order = self.sorted_of(self.ranks.rank)
        if self.two_sided:
            return Chunk(None, labels, order)
        return Chunk(y, labels, order, needs_grad=True, tag=0)

    def chunk(self, step: int, refs: Tensor, anchor_values: Tensor | None) -> Chunk:
        """The chunk of a step.

        Args:
            step: the step.
            refs: (m, D), all sorted references of the target.
            anchor_values: (V, m), what the target sent with them in a two-sided schedule, or None.
        """
        target = self.ranks.rank_at(step)
        anchors, refs_here = self.overlap(self.ranks.rank, target)
        labels, order = self.sorted_of(target)
        anchor_values = None if anchor_values is None else anchor_values[:, refs_here]
        return Chunk(
            refs[refs_here],
            labels[refs_here],
            order[refs_here],
            anchors,
            self.two_sided,
            anchor_values,
            needs_grad=not self.two_sided,
            tag=step,
        )

    def exchange_numbers(self, step: int, numbers: Tensor | None) -> Received | None:
        """Sends the numbers (V, m) of a step's chunk to its target, and receives those that the source computed."""
        if numbers is None:
            return None
        target, source = self.ranks.rank_at(step), self.ranks.rank_at(-step)
        rows, size = self.rows_of(source)
        into = numbers.new_empty(numbers.shape[0], size)
        return Received(rows, self.ranks.sendrecv(numbers.contiguous(), target, into, source, RETURN).wait(), None)

    def rows_of(self, source: int) -> tuple[slice, int]:
        """Which of this process's rows are references of process `source`, and how many these are."""
        rows = self.overlap(source, self.ranks.rank)[1]
        return rows, len(range(*rows.indices(self.sizes[self.ranks.rank])))


def _bytes(part: Tensor, size: int, is_rows: bool) -> int:
    """The bytes of rows (size, D), or of numbers (V, size), in the dtype and with the other dimension of `part`."""
    return size * part.itemsize * (part.shape[1] if is_rows else part.shape[0])


class Ring(RankSource):
    """One process's references at a time.

    In each step a process sends the references that it has to the process before it, receives the next ones from the
    process after it, and computes meanwhile. It holds the references of two processes. In each pass over the
    chunks it sends as many rows and numbers as all steps need, and in backward the gradients of each chunk.
    """

    def chunks(self, x: Tensor, y: Tensor | None, anchor_values: Tensor | None) -> Iterator[Chunk]:
        rows = x if self.two_sided or y is None else y
        parts = [rows] if anchor_values is None or not self.two_sided else [anchor_values, rows]
        steps = self.steps

        def send_next(buffer: Tensor, step: int) -> Transfer:
            """Passes `buffer` on, and receives the parts of the target of `step`."""
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
            received, begin = [], 0
            for part in parts:
                end = begin + _bytes(part, size, part is rows)
                shape = (size, part.shape[1]) if part is rows else (part.shape[0], size)
                received.append(buffer[begin:end].view(part.dtype).view(shape))
                begin = end
            yield self.chunk(step, received[-1], received[0] if len(received) == 2 else None)

    def send(self, chunk: Chunk, numbers: Tensor | None, grad: Tensor | None) -> list[Received]:
        step = chunk.tag
        if not step:
            return [Received(ALL_ROWS, None, grad)]
        received = self.exchange_numbers(step, numbers)
        if grad is None:
            return [] if received is None else [received]
        target, source = self.ranks.rank_at(step), self.ranks.rank_at(-step)
        rows, size = self.rows_of(source)
        into = grad.new_empty(size, grad.shape[1])
        returned = self.ranks.sendrecv(grad.contiguous(), target, into, source, RETURN).wait()
        return [Received(rows, None if received is None else received.numbers, returned)]

    def flush(self) -> list[Received]:
        return []


class AllGather(RankSource):
    """The references of all processes at once.

    One all-gather of rows serves all passes over the chunks. Each pass has an all-gather of numbers, and backward has
    one reduce-scatter. A process holds the rows of all processes, and in backward their gradients.
    """

    def __init__(self, *args: object) -> None:
        super().__init__(*args)  # type: ignore[arg-type]
        self._rows: tuple[Tensor, list[Tensor]] | None = None
        self._grads: Tensor | None = None  # (W, m, D), the gradients of all processes' references, in backward

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

    def send(self, chunk: Chunk, numbers: Tensor | None, grad: Tensor | None) -> list[Received]:
        step = chunk.tag
        if not step:
            return [Received(ALL_ROWS, None, grad)]
        if grad is not None:
            if self._grads is None:
                self._grads = grad.new_zeros(self.ranks.world, max(self.sizes), grad.shape[1])
            target = self.ranks.rank_at(step)
            self._grads[target, : self.sizes[target]][self.overlap(self.ranks.rank, target)[1]] += grad
        received = self.exchange_numbers(step, numbers)
        return [] if received is None else [received]

    def flush(self) -> list[Received]:
        if self._grads is None:  # there is only one process
            return []
        grads, self._grads = self._grads, None
        return [Received(ALL_ROWS, None, self.ranks.reduce_scatter(grads, self.sizes[self.ranks.rank]))]


SOURCES = {"all_gather": AllGather, "ring": Ring}
