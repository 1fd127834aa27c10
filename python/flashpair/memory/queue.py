"""A queue of labelled rows, kept in runs that are each sorted by label.

A batch touches one or two runs, however long the queue is. No run is changed in place: a new one takes its place, so a
graph whose backward is yet to come keeps the run that it saw. The host knows which entries stand in which run. It waits
for a GPU once for each batch, to learn whether all rows are finite.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backends.cpu.screened import keep_rounded

RUN_ROWS = 8192  # rows of a run; with 128 float32 numbers each, a step writes 4 MB


class SortedRun(NamedTuple):
    """Entries of a queue, sorted by label; entries of one label are sorted by age, the oldest first.

    Attributes:
        rows: (m, D), the embeddings.
        labels: (m,) int64, sorted.
        sequence_ids: (m,) int64, how many entries had come to the queue before each.
    """

    rows: Tensor
    labels: Tensor
    sequence_ids: Tensor

    def __len__(self) -> int:
        return self.labels.shape[0]

    def take(self, places: Tensor) -> SortedRun:
        """The entries at some places (k,)."""
        return SortedRun(*(t.index_select(0, places) for t in self))


def positions(mask: Tensor, count: int) -> Tensor:
    """Where mask (m,) is true, (count,) int64. The host knows `count`, and so need not wait for a GPU."""
    m = mask.shape[0]
    place = torch.where(mask, mask.cumsum(0) - 1, count)  # the others go to one place past the last
    rank = torch.arange(m, device=mask.device)
    return rank.new_zeros(count + 1).index_copy(0, place, rank)[:count]


def merge_runs(old: SortedRun, kept: Tensor, new: SortedRun) -> SortedRun:
    """A run of some old entries and of all new ones.

    Args:
        old: a run.
        kept: (k,) int64, ascending, the places of the old entries that stay.
        new: a run whose entries are all younger.
    """
    labels, k, n = old.labels.index_select(0, kept), kept.shape[0], len(new)
    if not k or not n:
        return new if n else old.take(kept)
    old_places = torch.arange(k, device=kept.device) + torch.searchsorted(new.labels, labels)
    new_places = torch.arange(n, device=kept.device) + torch.searchsorted(labels, new.labels, right=True)
    source = kept.new_zeros(k + n).index_copy(0, old_places, kept)
    return SortedRun(*(a.index_select(0, source).index_copy_(0, new_places, b) for a, b in zip(old, new, strict=True)))


class Queue:
    """The newest `size` rows (D,) of all that have come, in the order in which they came.

    Args:
        size: the largest number of rows.
        width: D.
        dtype: the dtype of the rows.

    Attributes:
        count: how many rows have come in all.
        length: how many rows the queue holds.
        runs: the entries of all batches but the last. Entry number i (its sequence id) belongs to run
            (i % size) // run_rows.
        pending: the last batch. It joins the runs when the next batch comes, so that a run is written once for the
            entries that come and for those that go.
    """

    def __init__(self, size: int, width: int, dtype: torch.dtype) -> None:
        self.size, self.width, self.run_rows = size, width, RUN_ROWS
        self.count = self.length = 0
        nothing = torch.zeros(0, dtype=torch.int64, device="cpu")
        self.pending = self.empty = SortedRun(torch.zeros(0, width, dtype=dtype, device="cpu"), nothing, nothing)
        self.runs = [self.empty] * -(-size // self.run_rows)

    def __getstate__(self) -> dict[str, Any]:
        """The state without int8 forms that are kept with rows, which cannot be copied or stored."""
        plain = {k: SortedRun(*(t.detach() for t in s)) for k, s in (("empty", self.empty), ("pending", self.pending))}
        return {**vars(self), **plain, "runs": [SortedRun(*(t.detach() for t in s)) for s in self.runs]}

    def fork(self) -> Queue:
        """A queue of the same entries. A change of one does not change the other, as no run is changed in place."""
        other = Queue.__new__(Queue)
        vars(other).update(vars(self), runs=list(self.runs))
        return other

    def apply(self, change: Callable[[Tensor], Tensor]) -> None:
        """Moves or casts all entries by a function of a tensor. Rows that are not finite in a new dtype are dropped."""
        before = self.empty.rows.dtype
        self.empty, self.pending, *self.runs = (
            SortedRun(*map(change, s)) for s in (self.empty, self.pending, *self.runs)
        )
        rows = self.empty.rows
        if rows.dtype != before and rows.device.type != "meta":
            if not all(bool(s.rows.isfinite().all()) for s in self.held()):
                self.restore(*self.in_order(), self.count, len(self.pending))

    def held(self) -> tuple[SortedRun, ...]:
        """All runs that have entries, and the pending batch."""
        return tuple(s for s in (*self.runs, self.pending) if len(s))

    def evict(self, n: int) -> None:
        """Makes room for `n` more rows: the oldest go if there would be more than `size`. Pending rows join runs."""
        first_pending, oldest = self.count - len(self.pending), self.count - self.length
        first = max(oldest, self.count + n - self.size)
        going, coming = (
            self._rows_of_runs(oldest, min(first, first_pending)),
            self._rows_of_runs(max(first_pending, first), self.count),
        )
        pending = self.pending
        if first > first_pending:
            pending = pending.take(positions(pending.sequence_ids >= first, self.count - first))
        run_of = (pending.sequence_ids % self.size) // self.run_rows
        for k in going | coming:
            old, new = self.runs[k], pending
            if coming[k] < len(pending):
                new = pending.take(positions(run_of == k, coming[k]))
            self.runs[k] = merge_runs(old, positions(old.sequence_ids >= first, len(old) - going[k]), new)
            keep_rounded(self.runs[k].rows)
        self.pending, self.length = self.empty, self.count - first

    def append(self, rows: Tensor, labels: Tensor, order: Tensor) -> None:
        """Appends a batch, for which `evict` has made room.

        Args:
            rows: (n, D), sorted by label.
            labels: (n,) int64, sorted.
            order: (n,) int64, the caller's index of each row.
        """
        rows = rows.to(self.empty.rows.dtype)
        finite = rows.isfinite().all(1)
        if not finite.all():  # one would make every loss NaN for as long as it stays
            places = finite.nonzero()[:, 0]
            rows, labels, order = rows[places], labels[places], order[places].argsort().argsort()
        self.pending = SortedRun(rows, labels, order + self.count)
        self.count, self.length = self.count + rows.shape[0], self.length + rows.shape[0]

    def _rows_of_runs(self, first: int, last: int) -> Counter[int]:
        """How many of the entries [first, last) belong to each run."""
        counts: Counter[int] = Counter()
        while first < last:
            place = first % self.size
            k = place // self.run_rows
            step = min(last - first, min((k + 1) * self.run_rows, self.size) - place)
            counts[k] += step
            first += step
        return counts

    def in_order(self) -> tuple[Tensor, Tensor]:
        """Rows (m, D) and labels (m,), the oldest first."""
        m = self.length
        rows, labels = self.empty.rows.new_empty(m, self.width), self.empty.labels.new_empty(m)
        for s in self.held():
            places = s.sequence_ids - (self.count - m)
            rows.index_copy_(0, places, s.rows)
            labels.index_copy_(0, places, s.labels)
        return rows, labels

    def restore(self, rows: Tensor, labels: Tensor, count: int, pending: int) -> None:
        """Fills the queue with entries. Rows that are not finite stay out, as in `append`.

        Args:
            rows: (m, D), the oldest first, as `in_order` returns them.
            labels: (m,) int64.
            count: how many rows have come in all.
            pending: how many of the last rows are the pending batch.
        """
        finite = rows.isfinite().all(1)
        if not finite.all():
            pending = int(finite[len(finite) - pending :].sum())
            rows, labels = rows[finite], labels[finite]
        m = labels.shape[0]
        sequence_ids = torch.arange(count - m, count, device=labels.device)
        everything = SortedRun(rows, labels, sequence_ids)
        first_pending, run_of = m - pending, (sequence_ids % self.size) // self.run_rows
        self.count, self.length = count, m
        counts = self._rows_of_runs(count - m, count - pending)
        for k in range(len(self.runs)):
            places = positions(run_of[:first_pending] == k, counts[k])
            self.runs[k] = self._sorted(everything, places) if counts[k] else self.empty
            keep_rounded(self.runs[k].rows)
        self.pending = (
            self._sorted(everything, torch.arange(first_pending, m, device=labels.device)) if pending else self.empty
        )

    def _sorted(self, s: SortedRun, places: Tensor) -> SortedRun:
        """The entries at some places (k,), which are in ascending order, sorted by label."""
        return s.take(places[torch.sort(s.labels.index_select(0, places), stable=True).indices])
