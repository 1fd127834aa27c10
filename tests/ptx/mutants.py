"""The product's kernels with one thing taken from them: `python -m tests.ptx mutants [words ...]`.

A barrier, a wait, a fence, a mask. Each mutant runs on the memory of the launch that it is a mutant of; a fault finds
it, or a result that differs, or one that does once what a mask keeps out holds other numbers. What nothing finds must
have a reason, which trace.py looks for in the launch itself, and what has one nothing may find. Instructions that no
launch reaches are left out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from . import cases, launch
from .arithmetic import put
from .cases import MINED, PLAIN, Case
from .control import Builder, Program, Step, changed
from .engine import gpu
from .faults import Fault
from .moves import locate
from .parse import Instruction
from .tensors import UINT
from .trace import TRUE, Trace, allowed, taking_part

CASES = [
    Case("fused", "sm_80", "bf16", MINED, 131, 128), Case("fused", "sm_80", "f32", MINED, 70, 64),
    Case("fused", "sm_80", "f64", PLAIN, 40, 33), Case("fused", "sm_90", "bf16", MINED, 131, 128),
    Case("fused", "sm_90", "f32", MINED, 70, 64), Case("fused", "sm_90", "bf16", "ContrastiveLoss", 70, 40),
    Case("screened", "sm_80", "bf16", MINED, 133, 64), Case("screened", "sm_90", "bf16", MINED, 133, 64),
    Case("tiled", "sm_90", "bf16", MINED, 131, 300),
]  # fmt: skip
FEW = 9  # rows of a second run of each case, in which masks are false that the first finds true
LONG = 390  # of a third one, whose loops go round more often than they load ahead: of each grid its first block
NOTHING = {"op": "nop", "operands": (), "guard": ""}
POISON = (0xFF, 0x7F)  # bytes: NaN, -1; the largest numbers
DISCARDED = "what it keeps out is not used"
OTHER = "other result"
POISONED = "other result with other numbers there"


class Mutant(NamedTuple):
    """kind; the instruction's number in its kernel; what changes of it."""

    kind: str
    at: int
    changes: dict[str, Any]


def mutations(at: int, i: Instruction) -> Iterator[Mutant]:
    """What may be taken from an instruction."""
    if i.op == "bar.sync":
        yield Mutant("barrier", at, NOTHING)
    elif i.op.startswith("cp.async.wait_group"):
        yield Mutant("copy's wait", at, {"operands": (str(int(str(i.operands[0])) + 1),)})
    elif i.op.startswith("fence.proxy"):
        yield Mutant("proxy fence", at, NOTHING)
    elif i.op.startswith(("wgmma.wait", "wgmma.fence")):
        yield Mutant(f"wgmma's {i.words[1].partition('_')[0]}", at, NOTHING)
    elif i.op.startswith(("ld.global", "st.global", "cp.async.c")):
        if i.guard:
            yield Mutant("mask", at, {"guard": ""})
        if i.op.startswith("cp") and len(i.operands) > 3:
            yield Mutant("copy's mask", at, {"operands": i.operands[:3]})


def mutants(program: Program) -> Iterator[Mutant]:
    """Those of what has run."""
    code, reached = program.kernel.code, set()
    starts = sorted(segment.start for segment in program.segments)
    stops = dict(zip(starts, [*starts[1:], len(code)], strict=True))
    for number in program.visited:
        start = program.segments[number].start
        reached |= set(range(start, stops[start]))
    for at in sorted(reached):
        yield from mutations(at, code[at])


def without(program: Program, mutant: Mutant, poison: int | None = None) -> Program:
    """The program that lacks it. With a poison, what the mask would keep out reads and writes nothing else."""
    whole = program.kernel.code[mutant.at]

    def wrap(builder: Builder, at: int, i: Instruction, run: Step) -> Step:
        return poisoned(builder, whole, mutant.kind != "mask", run, poison or 0)

    return changed(program, mutant.at, whole._replace(**mutant.changes), None if poison is None else wrap)


def poisoned(builder: Builder, i: Instruction, size: bool, run: Step, poison: int) -> Step:
    """An instruction without its mask, after which those whom it would keep out have other numbers."""
    passes = allowed(builder, i, size)
    others = allowed(builder, i, False) if size and i.guard else None
    spoil = {"ld": _loaded, "st": _stored, "cp": _copied}[i.words[0]](builder, i, run, poison)

    def both(block: Any, r: list[Any], mask: Any) -> None:
        here = taking_part(block, mask)
        here = here & others(r) if others else here
        out = here & ~passes(r)
        spoil(block, r, here & ~out, out)

    return both


Spoil = Callable[[Any, list[Any], np.ndarray, np.ndarray], None]


def _some(run: Step, block: Any, r: list[Any], chosen: np.ndarray) -> None:
    if chosen.any():
        run(block, r, None if chosen.all() else chosen)


def _loaded(builder: Builder, i: Instruction, run: Step, poison: int) -> Spoil:
    parts = i.operands[0] if isinstance(i.operands[0], tuple) else (i.operands[0],)
    registers = [(builder.to(part), UINT[builder.bits(str(part))]) for part in parts if part != "_"]

    def spoil(block: Any, r: list[Any], inside: np.ndarray, out: np.ndarray) -> None:
        _some(run, block, r, inside | out)
        for slot, kind in registers:
            if out.any():
                put(r, slot, np.full(block.threads * kind.itemsize, poison, "u1").view(kind), out)

    return spoil


def _stored(builder: Builder, i: Instruction, run: Step, poison: int) -> Spoil:
    parts = i.operands[1] if isinstance(i.operands[1], tuple) else (i.operands[1],)
    slots = [builder.of(str(part), builder.bits(str(part))) for part in parts if str(part).startswith("%")]

    def spoil(block: Any, r: list[Any], inside: np.ndarray, out: np.ndarray) -> None:
        _some(run, block, r, inside)
        held = [r[slot] for slot in slots]
        for slot in slots:
            r[slot] = np.full(r[slot].nbytes, poison, "u1").view(r[slot].dtype)
        _some(run, block, r, out)
        for slot, value in zip(slots, held, strict=True):
            r[slot] = value

    return spoil


def _copied(builder: Builder, i: Instruction, run: Step, poison: int) -> Spoil:
    into, count = locate(builder, i.operands[0], 4), builder.constant(str(i.operands[2]), 4)  # type: ignore[arg-type]

    def spoil(block: Any, r: list[Any], inside: np.ndarray, out: np.ndarray) -> None:
        _some(run, block, r, inside | out)
        alone = np.setdiff1d(into(r)[out], into(r)[inside])
        block.shared.data[(alone[:, None] + np.arange(count, dtype=np.uint32)).ravel()] = poison

    return spoil


class Memory:
    """A launch's tensors before it and after it."""

    def __init__(self, one: launch.Launch) -> None:
        self.one, self.before = one, [r.own.copy() for r in one.regions]
        one.program.visited.clear()
        one.run()
        self.after = [r.own.copy() for r in one.regions]

    def put(self, held: list[np.ndarray]) -> None:
        for region, own in zip(self.one.regions, held, strict=True):
            region.own[:] = own

    def trial(self, program: Program) -> str:
        """What finds a mutant: the fault, or OTHER; empty for nothing."""
        self.put(self.before)
        try:
            self.one.run(program)
        except Fault as fault:
            return fault.kind
        same = all((r.own == held).all() for r, held in zip(self.one.regions, self.after, strict=True))
        return "" if same else OTHER

    def trace(self) -> Trace:
        self.put(self.before)
        return Trace(self.one)

    def judge(self, mutant: Mutant, trace: Trace) -> tuple[str, str]:
        """What finds a mutant, and why nothing does."""
        masks = mutant.kind.endswith("mask")
        why, program = trace.why(mutant.kind, mutant.at), self.one.program
        if masks and why == TRUE:
            return "", why
        by = self.trial(without(program, mutant))
        if not masks:
            return by, why  # of both, one is wrong
        if by or why:
            return by, "" if by else why
        poisoned = [self.trial(without(program, mutant, byte)) for byte in POISON]
        return (POISONED, "") if any(poisoned) else ("", DISCARDED)


class Hunt:
    """The mutants of each kernel that a case launches; what is silent in one launch is tried in the next."""

    def __init__(self, few: bool) -> None:
        self.few, self.long = few, False
        self.records: dict[tuple[str, str, int], dict[str, Any]] = {}  # by text, kind and number

    def __call__(self, one: launch.Launch) -> None:
        memory = Memory(one)
        if self.long:
            self._of_a_block(one, memory)
        else:
            self._of_all(one, memory)
        memory.put(memory.after)

    def _of_a_block(self, one: launch.Launch, memory: Memory) -> None:
        if any(text == one.text and not record["by"] for (text, *_), record in self.records.items()):
            memory.put(memory.before)
            first = Memory(one._replace(grid=(1, 1, 1)))
            self._try(first, [m for m in mutants(one.program) if m.kind != "mask" and self._open(one, m)])

    def _of_all(self, one: launch.Launch, memory: Memory) -> None:
        wanted = [m for m in mutants(one.program) if self._open(one, m)]
        if self.few:
            kinds = {kind for text, kind, _ in self.records if text == one.text}
            wanted = list({m.kind: m for m in reversed(wanted) if m.kind not in kinds}.values())
        if wanted:
            self._try(memory, wanted)

    def _try(self, memory: Memory, wanted: list[Mutant]) -> None:
        one, trace = memory.one, memory.trace()
        for mutant in wanted:
            by, why = memory.judge(mutant, trace)
            i = one.program.kernel.code[mutant.at]
            key = one.text, mutant.kind, mutant.at
            if not by and (earlier := self.records.get(key)):
                why = earlier["why"] if why == TRUE or not earlier["why"] else why
            record = {"kernel": one.name, "mutant": mutant.kind, "at": i.source, "what": i.text, "by": by, "why": why}
            self.records[key] = record

    def _open(self, one: launch.Launch, mutant: Mutant) -> bool:
        record = self.records.get((one.text, mutant.kind, mutant.at))
        return not record["by"] if record else not self.long


def of_case(case: Case, few: bool) -> list[dict[str, Any]]:
    hunt = Hunt(few)
    launch.execute[0] = hunt
    try:
        for n in (case.n, *(() if few else (FEW, LONG))):
            hunt.long = n == LONG
            with gpu(case.arch), cases.uninitialised_is_nan():
                cases.step(case._replace(n=n), case.schedule, cases.DTYPES[case.dtype])
    finally:
        launch.execute[0] = launch.Launch.run
    return list(hunt.records.values())


def summary(case: Case, each: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """By kernel and kind: how many, how many are found and by what, why others are not, and what has no reason.

    Nor has one that is found although there is a reason why it should not be.
    """
    for kernel, kind in dict.fromkeys((one["kernel"], one["mutant"]) for one in each):
        own = [one for one in each if (one["kernel"], one["mutant"]) == (kernel, kind)]
        by, why = (Counter(one[key] for one in own if one[key]) for key in ("by", "why"))
        missed = sorted(f"{one['at']}: {one['what']}" for one in own if bool(one["by"]) == bool(one["why"]))
        record = {"case": str(case), "kernel": kernel, "mutant": kind, "of": len(own), "found": by.total()}
        yield record | {"by": dict(by), "why": dict(why), "unexplained": missed, "good": not missed}


def run(words: list[str]) -> Iterator[dict[str, Any]]:
    """Of the cases whose names hold all the words; with "quick" among these, few of each kernel."""
    wanted = [word for word in words if word != "quick"]
    for case in CASES:
        if all(word in str(case) for word in wanted):
            yield from summary(case, of_case(case, "quick" in words))
