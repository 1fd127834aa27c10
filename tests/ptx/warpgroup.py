"""wgmma: products that four warps issue and the tensor cores do on their own time.

Computed at once, but kept from the registers until the wait; till then the accumulators are InFlight, and the bytes of
shared memory that it reads are busy. Registers that go into one must be as a wgmma.fence found them.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from .arithmetic import Run
from .faults import Fault, InFlight, Unsupported
from .matrix import a_matrix, add, widen
from .shared import refuse_partial

SWIZZLES = {1: 128, 2: 64, 3: 32}  # of a descriptor: bytes of a row of its pattern
BYTES = {"bf16": 2, "f16": 2, "tf32": 4, "s8": 1}


class Issued(NamedTuple):
    """One wgmma in flight: its accumulators, the shared memory and the registers that it reads."""

    to: list[int]
    bytes: list[np.ndarray]
    read: list[tuple[int, Any]]


class Flight:
    """A block's wgmmas: those not yet committed, the groups, and what registers will hold."""

    def __init__(self) -> None:
        self.fenced: list[Any] | None = None  # the registers as the last fence found them
        self.now: list[Issued] = []
        self.groups: list[list[Issued]] = []
        self.values: dict[int, np.ndarray] = {}

    def fence(self, registers: list[Any]) -> None:
        self.fenced = list(registers)

    def held(self, registers: list[Any], slots: list[int]) -> list[np.ndarray]:
        """What registers bring into a wgmma."""
        if self.fenced is None:
            raise Fault("wgmma without a wgmma.fence")
        found = []
        for slot in slots:
            if slot in self.values and isinstance(registers[slot], InFlight):
                found.append(self.values[slot])
                continue
            if registers[slot] is not self.fenced[slot]:
                raise Fault("wgmma of a register that was written after its wgmma.fence")
            found.append(registers[slot])
        return found

    def wait(self, block: Any, registers: list[Any], left: int) -> None:
        cut = max(0, len(self.groups) - left)
        done, self.groups = self.groups[:cut], self.groups[cut:]
        later = {slot for group in [*self.groups, self.now] for one in group for slot in one.to}
        for one in (one for group in done for one in group):
            for at in one.bytes:
                block.shared.hold(at, -1)
            if any(registers[slot] is not value for slot, value in one.read):
                raise Fault("write of a register that a wgmma in flight reads")
            for slot in one.to:
                if slot not in later and slot in self.values:
                    registers[slot] = self.values.pop(slot)


class Layout(NamedTuple):
    """Of an operand: its rows (along M or N), k, bytes of an element, whether the rows are what is contiguous."""

    rows: int
    depth: int
    width: int
    transposed: bool

    def offsets(self, swizzle: int, leading: int, stride: int) -> np.ndarray:
        """(rows, k): byte offsets before the swizzle."""
        r, k = np.arange(self.rows)[:, None], np.arange(self.depth)[None, :]
        if swizzle not in SWIZZLES:
            if self.transposed:
                raise Unsupported("a transposed operand without a swizzle")
            b = k * self.width
            return r // 8 * stride + b // 16 * leading + r % 8 * 16 + b % 16
        row = SWIZZLES[swizzle]
        if self.transposed:
            across = row // self.width
            return r // across * leading + k // 8 * stride + k % 8 * row + r % across * self.width
        return r // 8 * stride + r % 8 * row + k * self.width


@functools.lru_cache(maxsize=4096)
def places(descriptor: int, layout: Layout) -> np.ndarray:
    """(rows, k, bytes): the addresses of an operand's bytes."""
    start, leading, stride = ((descriptor >> at & 0x3FFF) << 4 for at in (0, 16, 32))
    swizzle = descriptor >> 62
    if descriptor >> 49 & 7:
        raise Unsupported("a base offset")
    at = start + layout.offsets(swizzle, leading, stride)
    if swizzle in SWIZZLES:  # address bits 4 and up change with those from 7 on, one for each doubling of 16 bytes
        at = at ^ (at >> 7 & SWIZZLES[swizzle] // 16 - 1) << 4
    return at[..., None] + np.arange(layout.width)


def _operand(block: Any, descriptors: np.ndarray, layout: Layout, name: str) -> tuple[np.ndarray, list[np.ndarray]]:
    """(warpgroup, rows, k), and which bytes it takes."""
    matrices, taken = [], []
    for group, own in enumerate(descriptors.reshape(-1, 128)):
        if (own != own[0]).any():
            raise Fault("wgmma descriptors that differ within a warpgroup")
        at = places(int(own[0]), layout)
        if at.max() >= block.shared.size:
            raise Fault("access outside shared memory", f"a wgmma's operand at {at.max()} of {block.shared.size}")
        found = block.shared.operand(at, np.arange(4 * group, 4 * group + 4))
        words = np.ascontiguousarray(found).view(f"u{layout.width}")[..., 0]
        matrices.append(_elements(words, name))
        taken.append(at)
    return np.stack(matrices), taken


def _elements(words: np.ndarray, name: str) -> np.ndarray:
    if name == "tf32":
        return widen(words, name)[..., 0]
    if name == "bf16":
        return (words.astype("u4") << np.uint32(16)).view("f4").astype("f8")
    return words.view("f2" if name == "f16" else "i1").astype("f8")


def _product(builder: Any, words: list[str], operands: tuple[Any, ...]) -> Run:
    kinds = [w for w in words[5:] if w != "satfinite"]
    shape, name = re.fullmatch(r"m64n(\d+)k(\d+)", words[4]), kinds[1]
    if not shape or name not in BYTES or kinds[2] != name or kinds[0] != ("s32" if name == "s8" else "f32"):
        raise Unsupported("a shape or type")
    n, depth = int(shape[1]), int(shape[2])
    to, flags = [builder.to(o) for o in operands[0]], operands[4:]
    from_registers = isinstance(operands[1], tuple)
    if name != "s8" and tuple(flags[:2]) != ("1", "1"):
        raise Unsupported("negated factors")
    transposed = [flag == "1" for flag in flags[2:]] if name in ("bf16", "f16") else []
    left = Layout(64, depth, BYTES[name], bool(transposed and not from_registers and transposed[0]))
    right = Layout(n, depth, BYTES[name], bool(transposed and transposed[-1]))
    a = [builder.of(o, 4) for o in operands[1]] if from_registers else builder.of(operands[1], 8)
    b, adds = builder.of(operands[2], 8), builder.of(operands[3], 0)
    out = "i4" if name == "s8" else "f4"

    def run(block: Any, r: list[Any], mask: Any) -> None:
        refuse_partial(mask, "wgmma")
        flight, groups = _flight(block), block.threads // 128
        y, taken = _operand(block, r[b].view("u8"), right, name)
        if from_registers:
            x = a_matrix(flight.held(r, a), block.threads // 32, name).reshape(groups, 64, -1)
        else:
            x, more = _operand(block, r[a].view("u8"), left, name)
            taken += more
        sums: Any = np.zeros(1)
        flight.held(r, [slot for slot in to if r[slot] is not None])
        if r[adds].any():
            if not r[adds].all():
                raise Fault("wgmma whose threads differ on whether it adds")
            held = np.stack([v.view(out) for v in flight.held(r, to)])
            sums = held.reshape(n // 8, 2, 2, groups, 4, 8, 4).transpose(3, 4, 1, 5, 0, 6, 2).reshape(groups, 64, n)
        found = add(x @ y.swapaxes(1, 2), sums.astype("f8"), name)
        parts = found.reshape(groups, 4, 2, 8, n // 8, 4, 2).transpose(4, 2, 6, 0, 1, 3, 5).reshape(len(to), -1)
        for slot, part in zip(to, parts, strict=True):
            flight.values[slot], r[slot] = np.ascontiguousarray(part), InFlight()
        for at in taken:
            block.shared.hold(at, 1)
        flight.now.append(Issued(to, taken, [(s, r[s]) for s in a] if isinstance(a, list) else []))

    return run


def _flight(block: Any) -> Flight:
    if block.wgmma is None:
        block.wgmma = Flight()
    return block.wgmma


def _wgmma(builder: Any, words: list[str], operands: tuple[Any, ...]) -> Run:
    if words[1] == "mma_async":
        return _product(builder, words, operands)
    left = builder.constant(operands[0], 4) if operands else 0

    def run(block: Any, r: list[Any], mask: Any) -> None:
        refuse_partial(mask, words[1])
        flight = _flight(block)
        if words[1] == "fence":
            flight.fence(r)
        elif words[1] == "commit_group":
            flight.groups.append(flight.now)
            flight.now = []
        else:
            flight.wait(block, r, left)

    if words[1] not in ("fence", "commit_group", "wait_group"):
        raise Unsupported(words[1])
    return run


def _fence(builder: Any, words: list[str], operands: tuple[Any, ...]) -> Run:
    if words[1:3] != ["proxy", "async"] and words[1] != "acq_rel":
        raise Unsupported("a fence")

    def run(block: Any, r: list[Any], mask: Any) -> None:
        if words[1] == "proxy":
            block.shared.fence(np.unique(block.warp if mask is None else block.warp[mask]), mask is None)

    return run


TABLE: dict[str, Callable[..., Run]] = {"wgmma": _wgmma, "fence": _fence}
