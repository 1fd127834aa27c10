"""A block's shared memory: which bytes are written, in flight, or touched by another warp since the last barrier.

By byte: `state`; `writer` and `reader`, 1 + the warp in this barrier interval, or SEVERAL; `unfenced`, 1 + the
warp whose generic store no proxy fence has followed; `busy`, how many wgmmas in flight read it.
"""

from __future__ import annotations

import numpy as np

from .faults import Fault, Unsupported
from .tensors import UINT

UNWRITTEN, WRITTEN, COPYING = 0, 1, 2
SEVERAL = 255


class Shared:
    def __init__(self, size: int) -> None:
        self.size = size
        room = -(-max(size, 1) // 16) * 16
        self.data, self.state, self.writer, self.reader, self.unfenced, self.busy = np.zeros((6, room), np.uint8)
        planes = (self.data, self.state, self.writer, self.reader, self.unfenced, self.busy)
        self.views = {width: [plane.view(kind) for plane in planes] for width, kind in UINT.items()}
        self.ones = {width: kind.type(int("01" * width, 16)) for width, kind in UINT.items()}
        self.groups: list[list[tuple[int, np.ndarray, np.ndarray]]] = []
        self.copies: list[tuple[int, np.ndarray, np.ndarray]] = []

    def places(self, address: np.ndarray, width: int, count: int) -> np.ndarray:
        """(T, count): which units of `width` bytes are at addresses (T,) of vectors of `count`."""
        length = width * count
        if (address & np.uint32(length - 1)).any():
            raise Fault("misaligned access", f"{length} bytes of shared memory")
        if int(address.max()) > self.size - length:
            raise Fault("access outside shared memory", f"{length} bytes at {int(address.max())} of {self.size}")
        return address.astype(np.int64)[:, None] // width + np.arange(count)

    def load(self, at: np.ndarray, width: int, warp: np.ndarray) -> np.ndarray:
        """Units `at` (T, count), read by warps (T,)."""
        data, state, writer, reader, _, _ = self.views[width]
        own = ((warp + 1) * self.ones[width]).astype(data.dtype)[:, None]
        self._defined(state[at], width)
        before = writer[at]
        if ((before != 0) & (before != own)).any():
            self._compare(before, own, "read of what another warp writes in the same barrier interval")
        readers = reader[at]
        mixed = (readers != 0) & (readers != own)
        reader[at] = np.where(mixed, _merge(readers, own), own) if mixed.any() else own
        after = reader[at]
        several = after != own
        if several.any():
            reader[at[several]] = data.dtype.type(2 ** (8 * width) - 1)
        return data[at]

    def _defined(self, state: np.ndarray, width: int) -> None:
        if (state != self.ones[width]).any():
            each = np.ascontiguousarray(state).view(np.uint8)
            if (each == COPYING).any():
                raise Fault("cp.async read before its wait", "")
            raise Fault("read of unwritten shared memory", "")

    def _compare(self, before: np.ndarray, own: np.ndarray, what: str) -> None:
        """A race if a byte of `before` is another's; words may be no one's in part."""
        old = np.ascontiguousarray(before)[..., None].view(np.uint8)
        new = np.ascontiguousarray(np.broadcast_to(own, before.shape))[..., None].view(np.uint8)
        bad = (old != 0) & (old != new)
        if bad.any():
            who = int(old[bad][0])
            raise Fault("race", f"shared memory: {what} ({'several' if who == SEVERAL else f'warp {who - 1}'})")

    def store(self, at: np.ndarray, values: np.ndarray, warp: np.ndarray, fresh: int = WRITTEN) -> None:
        width = values.dtype.itemsize
        data, state, writer, reader, unfenced, busy = self.views[width]
        own = ((warp + 1) * self.ones[width]).astype(data.dtype)[:, None]
        for plane, what in ((writer, "writes"), (reader, "reads")):
            before = plane[at]
            if ((before != 0) & (before != own)).any():
                self._compare(before, own, f"write of what another warp {what} in the same barrier interval")
        if busy[at].any():
            raise Fault("write of what a wgmma in flight reads", "")
        old = state[at]
        if (np.ascontiguousarray(old).view(np.uint8) == COPYING).any():
            raise Fault("write of what a cp.async in flight writes", "")
        writer[at] = own
        unfenced[at] = own
        state[at] = self.ones[width] * UINT[width].type(fresh)
        data[at] = values
        if (data[at] != values).any():  # whose lanes may be those of one warp: nothing says which comes last
            raise Fault("race", "shared memory: two threads write one place at once, and not the same")
        together = writer[at] != own
        if together.any():
            writer[at[together]] = UINT[width].type(2 ** (8 * width) - 1)

    def copy(self, at: np.ndarray, values: np.ndarray, warp: np.ndarray) -> None:
        """A cp.async: its bytes are nobody's to read before its wait."""
        self.store(at, values, warp, COPYING)
        self.copies.append((values.dtype.itemsize, at, warp))

    def commit(self) -> None:
        self.groups.append(self.copies)
        self.copies = []

    def wait(self, left: int) -> None:
        """Until at most so many groups are in flight."""
        cut = max(0, len(self.groups) - left)
        done, self.groups = self.groups[:cut], self.groups[cut:]
        for width, at, warp in (copy for group in done for copy in group):
            _, state, writer, _, unfenced, _ = self.views[width]
            own = ((warp + 1) * self.ones[width]).astype(state.dtype)[:, None]
            state[at], writer[at], unfenced[at] = self.ones[width], own, own

    def barrier(self) -> None:
        self.writer.fill(0)
        self.reader.fill(0)

    def fence(self, warps: np.ndarray, everyone: bool) -> None:
        """A proxy fence by these warps: of their own stores, and of all that a barrier has made theirs."""
        if everyone:
            self.unfenced.fill(0)
        else:
            self.unfenced[(self.writer == 0) | np.isin(self.writer, warps + 1)] = 0

    def operand(self, at: np.ndarray, warps: np.ndarray) -> np.ndarray:
        """Bytes `at` that a wgmma of several warps reads."""
        self._defined(self.state[at], 1)
        if self.writer[at].any():
            raise Fault("race", "a wgmma reads what a warp wrote in the same barrier interval")
        if self.unfenced[at].any():
            raise Fault("missing proxy fence", "a wgmma reads what generic stores wrote")
        return self.data[at]

    def hold(self, at: np.ndarray, change: int) -> None:
        """A wgmma starts (1) or has ended (-1) reading these bytes, each named once."""
        self.busy[at] += np.uint8(change % 256)
        if change < 0:
            self.reader[at] = SEVERAL

    def end(self) -> None:
        if self.copies or any(self.groups):
            raise Fault("cp.async never waited for", "")


def _merge(readers: np.ndarray, own: np.ndarray) -> np.ndarray:
    """The readers of each byte with one more."""
    old = np.ascontiguousarray(readers)[..., None].view(np.uint8)
    new = np.ascontiguousarray(np.broadcast_to(own, readers.shape))[..., None].view(np.uint8)
    merged = np.where((old == 0) | (old == new), new, np.uint8(SEVERAL))
    return merged.view(readers.dtype)[..., 0]


def refuse_partial(mask: np.ndarray | None, op: str) -> None:
    if mask is not None:
        raise Unsupported(f"{op} by some threads of a block")
