"""Why a launch does without an instruction that a mutant lacks, found in a run of the launch that has them all.

Of a barrier, see ledger.py. Of a proxy fence: which products read what it alone has fenced. Of a wgmma's fence: which
products' registers were written since the fence before it. Of a wgmma's wait: what is used before the next one. Of a
mask: which lanes it keeps out, and whether they would do what others do.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple
from unittest import mock

import numpy as np

from . import machine, warpgroup
from .control import Builder, Step, build
from .faults import InFlight
from .launch import Launch
from .ledger import Ledger
from .moves import locate
from .parse import SIZES, Instruction
from .shared import WRITTEN, Shared
from .tensors import Region, Tensors

FENCED = "no product reads what no other fence covers"
SAME = "no product's register is written since the fence before it"
LATER = "nothing that it waits for is used before another wait"
NOTHING = "nothing that it waits for is in flight"
TRUE = "it is true in every lane"
REPEATED = "the lanes that it keeps out would do what others do"


def allowed(builder: Builder, i: Instruction, size: bool) -> Callable[[list[Any]], np.ndarray]:
    """Which threads a mask lets through: an instruction's guard, or a copy's number of bytes."""
    if size:
        given = builder.of(i.operands[3], 4)
        return lambda r: r[given].view("u4") != 0
    guard, negated = builder.of(i.guard, 0), i.negated
    return lambda r: r[guard] ^ negated


def taking_part(block: Any, mask: np.ndarray | None) -> np.ndarray:
    return np.ones(block.threads, bool) if mask is None else mask


class Pending(NamedTuple):
    """What a wgmma's wait has waited for, until another wait does."""

    wait: int
    last: int  # the group's number
    to: frozenset[Any]
    read: frozenset[Any]
    bytes: np.ndarray


class Trace:
    """One launch's run."""

    def __init__(self, one: Launch) -> None:
        self.one, self.ledger, self.next = one, Ledger(), -1
        self.number: dict[int, int] = {}  # of a proxy fence, its bit
        self.needed: set[int] = set()
        self.completes: set[int] = set()
        self.kept_out: dict[int, int] = {}  # lanes, by mask
        self.differ: set[int] = set()  # masks whose lanes do what no other does
        kernel = one.program.kernel
        self.wgmma = any(i.words[0] == "wgmma" for i in kernel.code)
        program = build(kernel, one.threads, self.wrap)
        tensors = TracedTensors(self, [r.fresh() for r in one.regions])
        with (
            mock.patch.object(machine, "Shared", functools.partial(TracedShared, self)),
            mock.patch.object(warpgroup, "Flight", functools.partial(TracedFlight, self)),
        ):
            machine.launch(program, one.grid, tensors, one.parameters, one.shared)

    def wrap(self, builder: Builder, at: int, i: Instruction, run: Step) -> Step:
        if i.op == "bar.sync":
            return functools.partial(self._arrive, at)
        if i.op.startswith("fence.proxy"):
            self.number[at] = len(self.number)
            return self._before(run, lambda block, r: block.shared.fenced_by(self.number[at]))
        if i.op.startswith("wgmma.fence"):
            return self._before(run, lambda block, r: warpgroup._flight(block).fenced_by(at, r))
        if i.op.startswith("wgmma.wait"):
            left = builder.constant(str(i.operands[0]), 4)
            return self._before(run, lambda block, r: block.wgmma and block.wgmma.waited_by(at, left, block))
        if i.guard and i.op.startswith(("ld.global", "st.global", "cp.async.c")):
            run = self._masked(builder, (at, 0), i, run)
        if i.op.startswith("cp.async.c") and len(i.operands) > 3:
            run = self._masked(builder, (at, 1), i, run)
        return self._using(builder, i, run) if self.wgmma else run

    def _arrive(self, at: int, block: Any, r: list[Any], mask: Any) -> None:
        self.next = at

    def _before(self, run: Step, what: Callable[[Any, list[Any]], Any]) -> Step:
        def both(block: Any, r: list[Any], mask: Any) -> None:
            what(block, r)
            run(block, r, mask)

        return both

    def _using(self, builder: Builder, i: Instruction, run: Step) -> Step:
        """Registers that a product may still write, used; or written, which it may still read."""
        named = [r for o in i.operands for r in (o if isinstance(o, tuple) else (o,)) if str(r).startswith("%")]
        to = i.operands[0] if i.operands and i.words[0] not in ("st", "bra") else ()
        to = to if isinstance(to, tuple) else (to,)
        product = i.op.startswith("wgmma.mma")
        used = i.operands[1] if product and isinstance(i.operands[1], tuple) else () if product else named
        uses, writes = ({builder.slots.get(n) for n in names} - {None} for names in (used, () if product else to))

        def both(block: Any, r: list[Any], mask: Any) -> None:
            if block.wgmma:
                for one in block.wgmma.pending:
                    if uses & one.to or writes & one.read:
                        self.needed.add(one.wait)
            run(block, r, mask)

        return both

    def _masked(self, builder: Builder, key: tuple[int, int], i: Instruction, run: Step) -> Step:
        passes, does = allowed(builder, i, bool(key[1])), _does(builder, i, bool(key[1]))
        outer = allowed(builder, i, False) if key[1] and i.guard else None

        def both(block: Any, r: list[Any], mask: Any) -> None:
            here = taking_part(block, mask)
            here = here & outer(r) if outer else here
            inside, out = here & passes(r), here & ~passes(r)
            self.kept_out[key] = self.kept_out.get(key, 0) + int(out.sum())
            if out.any() and not (does and repeats(does(r), inside, out)):
                self.differ.add(key)
            run(block, r, mask)

        return both

    def why(self, kind: str, at: int) -> str:
        """Why a launch does without it; empty if it does not, or for no reason that is known."""
        if kind == "barrier":
            return self.ledger.why(at)
        if kind == "mask" or kind == "copy's mask":
            key = at, int(kind != "mask")
            return TRUE if not self.kept_out.get(key) else REPEATED if key not in self.differ else ""
        if at in self.needed:
            return ""
        if kind == "wgmma's wait":
            return LATER if at in self.completes else NOTHING
        return {"proxy fence": FENCED, "wgmma's fence": SAME}.get(kind, "")


def repeats(does: np.ndarray, inside: np.ndarray, out: np.ndarray) -> bool:
    """Whether each of some threads does what one of others does."""
    return {row.tobytes() for row in does[out]} <= {row.tobytes() for row in does[inside]}


def _does(builder: Builder, i: Instruction, whole: bool) -> Callable[[list[Any]], np.ndarray] | None:
    """(threads, numbers): the address and values of a store; both addresses of a copy, and its bytes unless whole."""
    if i.op.startswith("ld"):
        return None
    wide = 8 if i.op.startswith("st") else 4
    parts: list[Callable[[list[Any]], np.ndarray]] = [locate(builder, i.operands[0], wide)]  # type: ignore[arg-type]
    if wide == 4:
        parts.append(locate(builder, i.operands[1], 8))  # type: ignore[arg-type]
        if not whole and len(i.operands) > 3:
            given = builder.of(i.operands[3], 4)
            parts.append(lambda r: r[given].view("u4"))
    else:
        values = i.operands[1] if isinstance(i.operands[1], tuple) else (i.operands[1],)
        least = SIZES[i.words[-1]]
        for value in map(str, values):
            size = builder.bits(value) if value.startswith("%") else least
            slot = builder.of(value, size)
            parts.append(lambda r, slot=slot, size=size: r[slot].view(f"u{size}"))  # type: ignore[misc]
    return lambda r: np.stack([part(r).astype("u8") for part in parts], 1)


class TracedShared(Shared):
    def __init__(self, trace: Trace, size: int) -> None:
        super().__init__(size)
        self.trace, self.fences, self.block = trace, np.zeros(len(self.data), np.uint64), None
        self.pending: list[Pending] = []

    def _note(self, at: np.ndarray, width: int, warp: np.ndarray, writes: bool) -> None:
        each = at[..., None] * width + np.arange(width)
        warps = np.broadcast_to(warp.reshape(-1, *[1] * (each.ndim - 1)), each.shape)
        self.trace.ledger.access("shared", len(self.data), each, warps, writes)
        if writes:
            self.fences[each] = 0
            for one in self.pending:
                if one.bytes[each].any():
                    self.trace.needed.add(one.wait)

    def load(self, at: np.ndarray, width: int, warp: np.ndarray) -> np.ndarray:
        self._note(at, width, warp, False)
        return super().load(at, width, warp)

    def store(self, at: np.ndarray, values: np.ndarray, warp: np.ndarray, fresh: int = WRITTEN) -> None:
        self._note(at, values.dtype.itemsize, warp, True)
        super().store(at, values, warp, fresh)

    def wait(self, left: int) -> None:
        for group in self.groups[: max(0, len(self.groups) - left)]:
            for width, at, warp in group:
                self._note(at, width, warp, True)
        super().wait(left)

    def barrier(self) -> None:
        super().barrier()
        self.trace.ledger.barrier(self.trace.next)
        self._in_flight(np.flatnonzero(self.busy))

    def hold(self, at: np.ndarray, change: int) -> None:
        super().hold(at, change)
        self._in_flight(at.ravel())

    def _in_flight(self, at: np.ndarray) -> None:
        """Bytes that products read, in the name of all warps."""
        for warp in range(self.trace.one.threads // 32):
            self.trace.ledger.access("shared", len(self.data), at, np.full(at.shape, warp), False)

    def fenced_by(self, number: int) -> None:
        self.fences |= np.uint64(1 << number)  # a store takes it back

    def operand(self, at: np.ndarray, warps: np.ndarray) -> np.ndarray:
        fences = np.unique(self.fences[at])
        for number, bit in self.trace.number.items():
            if (fences == np.uint64(1 << bit)).any():
                self.trace.needed.add(number)
        return super().operand(at, warps)

    def end(self) -> None:
        super().end()
        self.trace.ledger.end()
        self.trace.needed |= {one.wait for one in self.pending}


class TracedFlight(warpgroup.Flight):
    def __init__(self, trace: Trace) -> None:
        super().__init__()
        self.trace, self.fence_at = trace, -1
        self.earlier: list[Any] | None = None
        self.pending: list[Pending] = []
        self.done = 0  # groups

    def fenced_by(self, at: int, registers: list[Any]) -> None:
        """`earlier`: the registers as the last fence but this one found them."""
        if at != self.fence_at:  # all instances of a fence go
            self.fence_at, self.earlier = at, self.fenced

    def held(self, registers: list[Any], slots: list[int]) -> list[np.ndarray]:
        earlier = self.earlier
        for slot in slots:
            in_flight = isinstance(registers[slot], InFlight)
            if earlier is None or (registers[slot] is not earlier[slot] and not in_flight):
                self.trace.needed.add(self.fence_at)
        return super().held(registers, slots)

    def waited_by(self, at: int, left: int, block: Any) -> None:
        count = max(0, len(self.groups) - left)
        self.pending = [one for one in self.pending if one.wait == at or one.last >= self.done + count]
        for group in self.groups[:count]:
            self.trace.completes.add(at)
            to = frozenset(slot for issued in group for slot in issued.to)
            read = frozenset(slot for issued in group for slot, _ in issued.read)
            plane = np.zeros(len(block.shared.data), bool)
            for own in (own for issued in group for own in issued.bytes):
                plane[own] = True
            self.pending.append(Pending(at, self.done, to, read, plane))
            self.done += 1
        block.shared.pending = self.pending


class TracedTensors(Tensors):
    def __init__(self, trace: Trace, regions: list[Region]) -> None:
        super().__init__(regions)
        self.trace = trace

    def _note(self, region: Region, at: np.ndarray, stamp: np.ndarray, writes: bool) -> None:
        warps = np.broadcast_to(stamp & 255, at.shape)
        self.trace.ledger.access(region.name, region.stamps.shape[1], at, warps, writes)

    def _read(self, region: Region, at: np.ndarray, stamp: np.ndarray) -> None:
        self._note(region, at, stamp, False)
        super()._read(region, at, stamp)

    def _write(self, region: Region, at: np.ndarray, stamp: np.ndarray) -> None:
        self._note(region, at, stamp, True)
        super()._write(region, at, stamp)
