"""What warps do on either side of a barrier: whether any two of them would meet without it.

Apart from shared.py and tensors.py, which look for races as they happen: here each byte has the set of the warps that
write it and of those that read it, before the barrier and behind it.
"""

from __future__ import annotations

from typing import Any

import numpy as np

BEFORE, NOW = 0, 2  # rows of a plane: who writes, and behind it who reads
IDLE = "no access on one side of it"
APART = "nothing is accessed on both sides of it"
READ = "what is accessed on both sides of it is only read"
OWN = "what is accessed on both sides of it is one warp's own"


def _several(warps: np.ndarray) -> np.ndarray:
    """Whether a set, given by its bits, has more than one member."""
    return warps & (warps - np.uint32(1)) != 0


class Ledger:
    """One block's accesses, by space (shared memory, or a tensor) and place."""

    def __init__(self) -> None:
        self.planes: dict[Any, np.ndarray] = {}
        self.last = -1  # the barrier before this interval; none yet
        self.met: dict[int, set[str]] = {}  # by barrier; what was found of it each time, "" for a conflict

    def access(self, space: Any, size: int, at: np.ndarray, warps: np.ndarray, writes: bool) -> None:
        """Places `at` by `warps`, of one shape."""
        if space not in self.planes:
            self.planes[space] = np.zeros((4, size), np.uint32)
        row = self.planes[space][NOW + (not writes)]
        for warp in np.unique(warps):
            row[at[warps == warp]] |= np.uint32(1 << int(warp))

    def barrier(self, number: int) -> None:
        """All come to a barrier. What is removed is every instance of it: those in a row leave one interval."""
        self.judge()
        for plane in self.planes.values():
            plane[:2] = plane[2:] | (plane[:2] if number == self.last else np.uint32(0))
            plane[2:] = 0
        self.last = number

    def end(self) -> None:
        """The block has ended."""
        self.judge()
        self.planes.clear()
        self.last = -1

    def judge(self) -> None:
        if self.last >= 0:
            self.met.setdefault(self.last, set()).add(self._judged())

    def _judged(self) -> str:
        early, late, both, wrote, shared = False, False, False, False, False
        for writers, readers, writes, reads in self.planes.values():
            before, now = writers | readers, writes | reads
            early, late = early or before.any(), late or now.any()
            at = np.flatnonzero((before != 0) & (now != 0))
            if not len(at):
                continue
            both = True
            any_writes = (writers[at] | writes[at]) != 0
            wrote = wrote or any_writes.any()
            later = (writes[at] != 0) & _several(writes[at] | before[at])
            earlier = (writers[at] != 0) & _several(now[at] | writers[at])
            shared = shared or (later | earlier).any()
        if shared:
            return ""
        return IDLE if not (early and late) else APART if not both else OWN if wrote else READ

    def why(self, number: int) -> str:
        """Why a barrier is not needed; empty if it is."""
        met = self.met.get(number, {""})
        return "" if "" in met else next(reason for reason in (OWN, READ, APART, IDLE) if reason in met)
