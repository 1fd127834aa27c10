"""A queue of labelled rows, kept in segments that are each sorted by label.

What entering costs is bounded by the segments that it touches, one or two of them, however long the queue is. Nothing
is written into: a segment that changes is made anew, so that whoever holds the old one (a graph whose backward is yet
to come) keeps what it saw. Which entries stand where is known on the host,
which waits for a GPU once a batch: for whether all rows are finite.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backends.cpu.screened import keep_rounded

SEGMENT = 8192  # rows: of 128 float32 numbers 4 MB, which one step makes anew


class Segment(NamedTuple):
    """Entries of a queue, sorted by label, and of equal ones the older first.

    Args:
        rows: (m, D); labels: (m,) int64; stamps: (m,) int64: how many entries the queue had had before each.
    """

    rows: Tensor
    labels: Tensor
    stamps: Tensor

    def __len__(self) -> int:
        return self.labels.shape[0]

    def take(self, at: Tensor) -> Segment:
        return Segment(*(t.index_select(0, at) for t in self))


def positions(mask: Tensor, count: int) -> Tensor:
    """Where mask (m,) is true, as the host knows it to be `count` times."""
    m = mask.shape[0]
    place = torch.where(mask, mask.cumsum(0) - 1, count)  # the others go to one place past the last
    rank = torch.arange(m, device=mask.device)
    return rank.new_zeros(count + 1).index_copy(0, place, rank)[:count]


def merged(old: Segment, at: Tensor, new: Segment) -> Segment:
    """The entries `at` (k,), ascending, of `old`, and all of `new`, each of which is younger."""
    labels, k, n = old.labels.index_select(0, at), at.shape[0], len(new)
    if not k or not n:
        return new if n else old.take(at)
    mine = torch.arange(k, device=at.device) + torch.searchsorted(new.labels, labels)
    theirs = torch.arange(n, device=at.device) + torch.searchsorted(labels, new.labels, right=True)
    source = at.new_zeros(k + n).index_copy(0, mine, at)
    return Segment(*(a.index_select(0, source).index_copy_(0, theirs, b) for a, b in zip(old, new, strict=True)))


class Queue:
    """The newest `size` of the rows (D,) that have come, in the order in which they came.

    Attributes:
        count: how many have come in all; `length`: how many are held.
        late: the last batch, which joins the segments when the next one comes, so that a batch makes each segment that
            it touches anew once, for those that come and those that go.
    """

    def __init__(self, size: int, width: int, dtype: torch.dtype) -> None:
        self.size, self.width, self.segment = size, width, SEGMENT
        self.count = self.length = 0
        nothing = torch.zeros(0, dtype=torch.int64, device="cpu")
        self.late = self.empty = Segment(torch.zeros(0, width, dtype=dtype, device="cpu"), nothing, nothing)
        self.segments = [self.empty] * -(-size // self.segment)

    def __getstate__(self) -> dict[str, Any]:
        """Without what is kept with rows, which has no copy and no file."""
        plain = {k: Segment(*(t.detach() for t in s)) for k, s in (("empty", self.empty), ("late", self.late))}
        return {**vars(self), **plain, "segments": [Segment(*(t.detach() for t in s)) for s in self.segments]}

    def fork(self) -> Queue:
        """A queue of the same entries, which changes by itself: segments are never written into."""
        other = Queue.__new__(Queue)
        vars(other).update(vars(self), segments=list(self.segments))
        return other

    def apply(self, change: Callable[[Tensor], Tensor]) -> None:
        """Moves or casts what is kept. What another dtype cannot hold goes."""
        before = self.empty.rows.dtype
        self.empty, self.late, *self.segments = (
            Segment(*map(change, s)) for s in (self.empty, self.late, *self.segments)
        )
        rows = self.empty.rows
        if rows.dtype != before and rows.device.type != "meta":
            if not all(bool(s.rows.isfinite().all()) for s in self.held()):
                self.restore(*self.in_order(), self.count, len(self.late))

    def held(self) -> tuple[Segment, ...]:
        """All that is in the queue."""
        return tuple(s for s in (*self.segments, self.late) if len(s))

    def make_place(self, n: int) -> None:
        """The oldest go, as far as `n` more would make more than `size`."""
        joined, oldest = self.count - len(self.late), self.count - self.length
        first = max(oldest, self.count + n - self.size)
        going, coming = self._of(oldest, min(first, joined)), self._of(max(joined, first), self.count)
        late = self.late
        if first > joined:
            late = late.take(positions(late.stamps >= first, self.count - first))
        home = (late.stamps % self.size) // self.segment
        for k in going | coming:
            old, new = self.segments[k], late
            if coming[k] < len(late):
                new = late.take(positions(home == k, coming[k]))
            self.segments[k] = merged(old, positions(old.stamps >= first, len(old) - going[k]), new)
            keep_rounded(self.segments[k].rows)
        self.late, self.length = self.empty, self.count - first

    def enter(self, rows: Tensor, labels: Tensor, order: Tensor) -> None:
        """Rows (n, D), sorted by label, and their order (n,) among each other, for which `make_place` has been."""
        rows = rows.to(self.empty.rows.dtype)
        finite = rows.isfinite().all(1)
        if not finite.all():  # one would make every loss NaN for as long as it stays
            at = finite.nonzero()[:, 0]
            rows, labels, order = rows[at], labels[at], order[at].argsort().argsort()
        self.late = Segment(rows, labels, order + self.count)
        self.count, self.length = self.count + rows.shape[0], self.length + rows.shape[0]

    def _of(self, first: int, last: int) -> Counter[int]:
        """How many of the stamps [first, last) stand in each segment."""
        found: Counter[int] = Counter()
        while first < last:
            place = first % self.size
            k = place // self.segment
            step = min(last - first, min((k + 1) * self.segment, self.size) - place)
            found[k] += step
            first += step
        return found

    def in_order(self) -> tuple[Tensor, Tensor]:
        """Rows (m, D) and labels (m,), the oldest first."""
        m = self.length
        rows, labels = self.empty.rows.new_empty(m, self.width), self.empty.labels.new_empty(m)
        for s in self.held():
            at = s.stamps - (self.count - m)
            rows.index_copy_(0, at, s.rows)
            labels.index_copy_(0, at, s.labels)
        return rows, labels

    def restore(self, rows: Tensor, labels: Tensor, count: int, late: int) -> None:
        """What `in_order` gave, of a queue that had had `count` entries, the last `late` of them not in segments. Rows
        that are not finite stay out, as those that come do."""
        finite = rows.isfinite().all(1)
        if not finite.all():
            late = int(finite[len(finite) - late :].sum())
            rows, labels = rows[finite], labels[finite]
        m = labels.shape[0]
        stamps = torch.arange(count - m, count, device=labels.device)
        everything = Segment(rows, labels, stamps)
        joined, home = m - late, (stamps % self.size) // self.segment
        self.count, self.length = count, m
        counts = self._of(count - m, count - late)
        for k in range(len(self.segments)):
            at = positions(home[:joined] == k, counts[k])
            self.segments[k] = self._sorted(everything, at) if counts[k] else self.empty
            keep_rounded(self.segments[k].rows)
        self.late = self._sorted(everything, torch.arange(joined, m, device=labels.device)) if late else self.empty

    def _sorted(self, s: Segment, at: Tensor) -> Segment:
        """Those at places `at`, ascending, by label."""
        return s.take(at[torch.sort(s.labels.index_select(0, at), stable=True).indices])
