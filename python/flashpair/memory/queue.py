"""A queue of labelled rows, kept in runs that are each sorted by label.

Appending a batch touches one or two runs, however long the queue is. No run is written into: one that changes is made
anew, so that whoever holds the old one (a graph whose backward is yet to come) keeps what it saw. The host knows which
entries stand where. It waits for a GPU once a batch, to learn whether all rows are finite.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backends.cpu.screened import keep_rounded

RUN_ROWS = 8192  # rows: of 128 float32 numbers 4 MB, which one step makes anew


class SortedRun(NamedTuple):
    """Entries of a queue, sorted by label, and of equal ones the older first.

    Args:
        rows: (m, D); labels: (m,) int64; sequence_ids: (m,) int64: how many entries the queue had had before each.
    """

    rows: Tensor
    labels: Tensor
    sequence_ids: Tensor

    def __len__(self) -> int:
        return self.labels.shape[0]

    def take(self, at: Tensor) -> SortedRun:
        return SortedRun(*(t.index_select(0, at) for t in self))


def positions(mask: Tensor, count: int) -> Tensor:
    """Where mask (m,) is true, as the host knows it to be `count` times."""
    m = mask.shape[0]
    place = torch.where(mask, mask.cumsum(0) - 1, count)  # the others go to one place past the last
    rank = torch.arange(m, device=mask.device)
    return rank.new_zeros(count + 1).index_copy(0, place, rank)[:count]


def merge_runs(old: SortedRun, at: Tensor, new: SortedRun) -> SortedRun:
    """The entries `at` (k,), ascending, of `old`, and all of `new`, each of which is younger."""
    labels, k, n = old.labels.index_select(0, at), at.shape[0], len(new)
    if not k or not n:
        return new if n else old.take(at)
    mine = torch.arange(k, device=at.device) + torch.searchsorted(new.labels, labels)
    theirs = torch.arange(n, device=at.device) + torch.searchsorted(labels, new.labels, right=True)
    source = at.new_zeros(k + n).index_copy(0, mine, at)
    return SortedRun(*(a.index_select(0, source).index_copy_(0, theirs, b) for a, b in zip(old, new, strict=True)))


class Queue:
    """The newest `size` of the rows (D,) that have come, in the order in which they came.

    Attributes:
        count: how many have come in all; `length`: how many are held.
        runs: the entries of all batches but the last, by their place in the queue.
        pending: the last batch. It joins the runs when the next batch comes, so that each run that it touches is made
            anew once, for the entries that come and for those that go.
    """

    def __init__(self, size: int, width: int, dtype: torch.dtype) -> None:
        self.size, self.width, self.run_rows = size, width, RUN_ROWS
        self.count = self.length = 0
        nothing = torch.zeros(0, dtype=torch.int64, device="cpu")
        self.pending = self.empty = SortedRun(torch.zeros(0, width, dtype=dtype, device="cpu"), nothing, nothing)
        self.runs = [self.empty] * -(-size // self.run_rows)

    def __getstate__(self) -> dict[str, Any]:
        """Without what is kept with rows, which has no copy and no file."""
        plain = {k: SortedRun(*(t.detach() for t in s)) for k, s in (("empty", self.empty), ("pending", self.pending))}
        return {**vars(self), **plain, "runs": [SortedRun(*(t.detach() for t in s)) for s in self.runs]}

    def fork(self) -> Queue:
        """A queue of the same entries, which changes by itself: runs are never written into."""
        other = Queue.__new__(Queue)
        vars(other).update(vars(self), runs=list(self.runs))
        return other

    def apply(self, change: Callable[[Tensor], Tensor]) -> None:
        """Moves or casts what is kept. What another dtype cannot hold goes."""
        before = self.empty.rows.dtype
        self.empty, self.pending, *self.runs = (
            SortedRun(*map(change, s)) for s in (self.empty, self.pending, *self.runs)
        )
        rows = self.empty.rows
        if rows.dtype != before and rows.device.type != "meta":
            if not all(bool(s.rows.isfinite().all()) for s in self.held()):
                self.restore(*self.in_order(), self.count, len(self.pending))

    def held(self) -> tuple[SortedRun, ...]:
        """All that is in the queue."""
        return tuple(s for s in (*self.runs, self.pending) if len(s))

    def evict(self, n: int) -> None:
        """Makes room for `n` more: the oldest go, as far as there would be more than `size`."""
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
        """Rows (n, D), sorted by label, and their order (n,) among each other, for which `evict` has made room."""
        rows = rows.to(self.empty.rows.dtype)
        finite = rows.isfinite().all(1)
        if not finite.all():  # one would make every loss NaN for as long as it stays
            at = finite.nonzero()[:, 0]
            rows, labels, order = rows[at], labels[at], order[at].argsort().argsort()
        self.pending = SortedRun(rows, labels, order + self.count)
        self.count, self.length = self.count + rows.shape[0], self.length + rows.shape[0]

    def _rows_of_runs(self, first: int, last: int) -> Counter[int]:
        """How many of the entries [first, last) stand in each run."""
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
            at = s.sequence_ids - (self.count - m)
            rows.index_copy_(0, at, s.rows)
            labels.index_copy_(0, at, s.labels)
        return rows, labels

    def restore(self, rows: Tensor, labels: Tensor, count: int, pending: int) -> None:
        """What `in_order` gave, of a queue that had had `count` entries, the last `pending` of them not in runs. Rows
        that are not finite stay out, as those that come do."""
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
            at = positions(run_of[:first_pending] == k, counts[k])
            self.runs[k] = self._sorted(everything, at) if counts[k] else self.empty
            keep_rounded(self.runs[k].rows)
        self.pending = (
            self._sorted(everything, torch.arange(first_pending, m, device=labels.device)) if pending else self.empty
        )

    def _sorted(self, s: SortedRun, at: Tensor) -> SortedRun:
        """Those at places `at`, ascending, by label."""
        return s.take(at[torch.sort(s.labels.index_select(0, at), stable=True).indices])
