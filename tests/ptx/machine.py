"""Runs a kernel: a grid of blocks one after the other, and a block's threads in lockstep.

A register is a numpy array over the block's threads. Threads that part at a branch run apart, the earliest
first (order.py), until they meet again. A block is a generator: where it waits for other blocks it yields.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from .control import Program, Segment
from .faults import Fault
from .shared import Shared
from .tensors import Tensors

Mask = np.ndarray | None  # of the threads that take part; None for all of a block
LIMIT = 2_000_000  # segments that a block may run before it is said to hang


class Place(NamedTuple):
    """Where a block stands: its number, shared bytes, and the special registers' values."""

    number: int
    shared: int
    special: dict[str, int]


class Block:
    """One block in flight."""

    def __init__(self, program: Program, tensors: Tensors, parameters: bytes, place: Place) -> None:
        self.program, self.tensors, self.parameters = program, tensors, parameters
        threads = program.threads
        self.threads = threads
        self.warp = np.arange(threads) // 32
        self.shared = Shared(place.shared)
        self.number, self.interval = place.number, 0
        self.registers = list(program.registers)
        for name, slot in program.special.items():
            self.registers[slot] = np.full(threads, place.special[name], np.uint32)
        self.wgmma: Any = None  # warpgroup.py's state
        self.stamp()

    def stamp(self) -> None:
        """Who is accessing global memory, see tensors.py."""
        self.stamps = (self.number << 40 | self.interval << 8) + self.warp

    def barrier(self) -> None:
        self.interval += 1
        self.shared.barrier()
        self.stamp()

    def run(self) -> Iterator[None]:
        """Until every thread has left."""
        program, registers = self.program, self.registers
        ready: dict[int, Mask] = {0: None}
        parked: dict[int, Mask] = {}
        left = 0  # threads that have
        for _ in range(LIMIT):
            if not ready:
                if not parked:
                    self.shared.end()
                    if self.wgmma and (self.wgmma.groups or self.wgmma.now):
                        raise Fault("wgmma never waited for", program.kernel.name)
                    return
                at = self._release(parked, left)
                ready, parked = {program.segments[at].following: None}, {}
            at = min(ready)
            mask = ready.pop(at)
            segment = program.segments[at]
            program.visited.add(at)
            number = 0
            try:
                for step in segment.steps:
                    step(self, registers, mask)
                    number += 1
            except (Fault, TypeError, AttributeError, IndexError, ValueError) as error:
                raise _placed(error, program, segment.start + number, registers) from error
            if segment.end == "barrier":
                _join(parked, at, mask)
            elif segment.end == "exit":
                left += self.threads if mask is None else int(mask.sum())
            elif segment.end == "branch":
                for goal, who in self._branch(segment, mask):
                    _join(ready, goal, who)
            else:
                _join(ready, segment.following, mask)
                if segment.end == "yield":
                    yield
        raise Fault("a block does not end", program.kernel.name)

    def _branch(self, segment: Segment, mask: Mask) -> list[tuple[int, Mask]]:
        if segment.guard < 0:
            return [(segment.target, mask)]
        taken = self.registers[segment.guard]
        if segment.negated:
            taken = ~taken
        if mask is not None:
            taken = taken & mask
        count, total = int(np.count_nonzero(taken)), self.threads if mask is None else int(np.count_nonzero(mask))
        if count == total:
            return [(segment.target, mask)]
        if not count:
            return [(segment.following, mask)]
        return [(segment.target, taken), (segment.following, ~taken if mask is None else mask & ~taken)]

    def _release(self, parked: dict[int, Mask], left: int) -> int:
        """All threads are at one barrier, or it is a fault."""
        at, mask = next(iter(parked.items()))
        if len(parked) > 1 or mask is not None or left:
            places = [self.program.segments[place] for place in parked]
            last = places[0].start + len(places[0].steps)
            words = f"threads wait at {len(parked)} places, {left} have left"
            raise _placed(Fault("divergent barrier", words), self.program, last, self.registers)
        self.barrier()
        return at


def _join(ready: dict[int, Mask], at: int, mask: Mask) -> None:
    if at in ready:
        other = ready[at]
        assert mask is not None and other is not None
        mask = mask | other
        mask = None if mask.all() else mask
    ready[at] = mask


def _placed(error: Exception, program: Program, at: int, registers: list[Any]) -> Exception:
    """The fault with its place: kernel, instruction, source line."""
    instruction = program.kernel.code[min(at, len(program.kernel.code) - 1)]
    if not isinstance(error, Fault):
        if not any(r is None for r in registers):
            return error
        error = Fault("read of a register that nothing wrote", repr(error))
    if not error.place:
        error.place = f"[{program.kernel.name} at {instruction.source}: {instruction.text}]"
    return error


def launch(
    program: Program, grid: tuple[int, int, int], tensors: Tensors, parameters: bytes, shared: int,
    more: dict[str, int] | None = None,
) -> None:  # fmt: skip
    """All blocks of a grid, each to its end, or to where it waits for another. more: further special registers."""
    waiting: list[Iterator[None]] = []
    static = sum(size for _, size in program.kernel.shared.values() if size > 0)
    base = max((offset for offset, _ in program.kernel.shared.values()), default=0)
    with np.errstate(all="ignore"):
        for number in range(grid[0] * grid[1] * grid[2]):
            x, rest = number % grid[0], number // grid[0]
            special = {"%ctaid.x": x, "%ctaid.y": rest % grid[1], "%ctaid.z": rest // grid[1]}
            special |= dict(zip(("%nctaid.x", "%nctaid.y", "%nctaid.z"), grid, strict=True))
            place = Place(number, max(static, base + shared), special | (more or {}))
            block = Block(program, tensors, parameters, place)
            running = block.run()
            if next(running, "done") is None:
                waiting.append(running)
        while waiting:
            waiting = [block for block in waiting if next(block, "done") is None]
