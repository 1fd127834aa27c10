"""Global memory: the tensors' own, every access held against them, and races between blocks and warps.

An element remembers who wrote it last and two of those who read it, as stamps: a block, one of its barrier intervals, a
warp. Two accesses race if neither a barrier nor the order of one warp comes between them, and one of them writes.
"""

from __future__ import annotations

import ctypes

import numpy as np

from .faults import Fault

UINT = {1: np.dtype("u1"), 2: np.dtype("u2"), 4: np.dtype("u4"), 8: np.dtype("u8")}


def raced(old: np.ndarray, new: np.ndarray) -> np.ndarray:
    """Which pairs of stamps are accesses that nothing orders; -1 is nobody's stamp."""
    return (old >= 0) & (old != new) & ((old >> 40 != new >> 40) | (old >> 8 == new >> 8))


class Region:
    """One tensor's memory: [start, stop), seen from the 16-byte boundary before it.

    Kernels know it `shift` further on, so that tensors that lie side by side are not so for them.
    """

    def __init__(self, name: str, start: int, length: int, grain: int, shift: int = 0) -> None:
        self.name, self.start, self.stop, self.grain, self.shift = name, start, start + length, grain, shift
        self.base = start & ~15
        held = (ctypes.c_uint8 * (-(-(self.stop - self.base) // 16) * 16)).from_address(self.base - shift)
        self.bytes = np.frombuffer(held, np.uint8)
        self.own = self.bytes[start - self.base : self.stop - self.base]
        self.units = {width: self.bytes.view(kind) for width, kind in UINT.items()}
        elements = -(-len(self.bytes) // grain)
        self.stamps = np.full((3, elements), -1, np.int64)
        self.writer, self.reader, self.other = self.stamps

    def forget(self) -> None:
        self.stamps.fill(-1)

    def fresh(self) -> Region:
        """The same memory, which nobody has touched."""
        return Region(self.name, self.start, self.stop - self.start, self.grain, self.shift)

    def shifted(self, shift: int) -> Region:
        return Region(self.name, self.start + shift, self.stop - self.start, self.grain, shift)

    def elements(self, at: np.ndarray, width: int) -> np.ndarray:
        """Which are touched by accesses of so many bytes at byte offsets `at` (T,): (T, elements of each)."""
        return at[:, None] // self.grain + np.arange(-(-width // self.grain))


class Tensors:
    """Global memory of one launch."""

    def __init__(self, regions: list[Region], blocks: int = 0) -> None:
        """blocks: of a launch with a grid barrier, whose arrivals are atomic additions."""
        self.regions, self.blocks, self.arrived = regions, blocks, 0

    def _find(self, address: int) -> Region:
        for region in self.regions:
            if region.start <= address < region.stop:
                return region
        near = min(self.regions, key=lambda r: min(abs(address - r.start), abs(address - r.stop)), default=None)
        where = f"; the nearest is {near.name}, [{near.start:#x}, {near.stop:#x})" if near else ""
        raise Fault("access outside the tensors", f"{address:#x} is in none of those passed{where}")

    def _each(self, address: np.ndarray, length: int):  # type: ignore[no-untyped-def]
        """Regions, which of the accesses are theirs (None for all), and these's byte offsets."""
        if (address & np.uint64(length - 1)).any():
            raise Fault(
                "misaligned access", f"{int(address[(address & np.uint64(length - 1)) > 0][0]):#x}, {length} bytes"
            )
        left = None
        while True:
            first = address[0] if left is None else address[left][0]
            region = self._find(int(first))
            own = (address >= region.start) & (address <= region.stop - length)
            if left is None and own.all():
                yield region, None, (address - np.uint64(region.base)).view(np.int64)
                return
            chosen = own if left is None else own & left
            if not chosen.any():
                raise Fault("access outside the tensors", f"{length} bytes at {int(first):#x}, past {region.name}")
            yield region, chosen, (address[chosen] - np.uint64(region.base)).view(np.int64)
            left = ~own if left is None else left & ~own
            if not left.any():
                return

    def load(self, address: np.ndarray, width: int, count: int, stamp: np.ndarray) -> np.ndarray:
        """(T, count) values of so many bytes each."""
        found = np.empty((len(address), count), UINT[width])
        steps = np.arange(count)
        for region, chosen, at in self._each(address, width * count):
            where = slice(None) if chosen is None else chosen
            found[where] = region.units[width][at[:, None] // width + steps]
            self._read(region, region.elements(at, width * count), stamp[where][:, None])
        return found

    def store(self, address: np.ndarray, values: np.ndarray, stamp: np.ndarray) -> None:
        """values (T, count)."""
        width, count = values.dtype.itemsize, values.shape[1]
        for region, chosen, at in self._each(address, width * count):
            where = slice(None) if chosen is None else chosen
            units, own = at[:, None] // width + np.arange(count), values[where]
            self._write(region, region.elements(at, width * count), stamp[where][:, None])
            region.units[width][units] = own
            if (region.units[width][units] != own).any():
                raise Fault("race", f"{region.name}: two threads write one element at once, and not the same")

    def _read(self, region: Region, at: np.ndarray, stamp: np.ndarray) -> None:
        writer = region.writer[at]
        if (bad := raced(writer, stamp)).any():
            raise Fault("race", f"{region.name}: read of what {_who(writer[bad][0])} writes")
        before = region.reader[at]
        region.other[at] = np.where((before >= 0) & (before != stamp), before, region.other[at])
        region.reader[at] = stamp

    def _write(self, region: Region, at: np.ndarray, stamp: np.ndarray) -> None:
        for others, what in ((region.writer, "writes"), (region.reader, "reads"), (region.other, "reads")):
            before = others[at]
            if (bad := raced(before, stamp)).any():
                raise Fault("race", f"{region.name}: write of what {_who(before[bad][0])} {what}")
        region.writer[at] = stamp

    def add(self, address: np.ndarray, values: np.ndarray) -> np.ndarray:
        """An atomic addition by each thread in turn; what it found there."""
        found = np.empty_like(values)
        width = values.dtype.itemsize
        for region, chosen, at in self._each(address, width):
            places = np.arange(len(address)) if chosen is None else np.flatnonzero(chosen)
            for place, index in zip(places, at // width, strict=True):
                found[place] = region.units[width][index]
                region.units[width][index] += values[place]
                self.arrived += 1
        if self.blocks and self.arrived == self.blocks:  # all is done that came before the barrier
            self.arrived = 0
            for region in self.regions:
                region.forget()
        return found


def _who(stamp: np.int64) -> str:
    return f"warp {int(stamp) & 255} of block {int(stamp) >> 40}"
