"""The product's kernels with one thing taken from them: `python -m tests.ptx mutants [words ...]`.

A barrier, a wait, a fence, a mask. Each mutant runs on the memory of the launch that it is a mutant of; a fault finds
it, or a result that differs. Instructions that the launch does not reach are left out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np

from . import cases, launch
from .cases import MINED, PLAIN, Case
from .control import Program, build
from .engine import gpu
from .faults import Fault
from .parse import Instruction

CASES = [
    Case("fused", "sm_80", "bf16", MINED, 131, 128), Case("fused", "sm_80", "f32", MINED, 70, 64),
    Case("fused", "sm_80", "f64", PLAIN, 40, 33), Case("fused", "sm_90", "bf16", MINED, 131, 128),
    Case("fused", "sm_90", "f32", MINED, 70, 64), Case("fused", "sm_90", "bf16", "ContrastiveLoss", 70, 40),
    Case("screened", "sm_80", "bf16", MINED, 133, 64), Case("screened", "sm_90", "bf16", MINED, 133, 64),
    Case("tiled", "sm_90", "bf16", MINED, 131, 300),
]  # fmt: skip
MASKS = 10  # of a kernel, spread over it
NOTHING = {"op": "nop", "operands": (), "guard": ""}


def mutation(i: Instruction) -> tuple[str, dict[str, Any]] | None:
    """What may be taken from an instruction: the mutant's kind, and what changes."""
    if i.op == "bar.sync":
        return "barrier", NOTHING
    if i.op.startswith("cp.async.wait_group"):
        return "copy's wait", {"operands": (str(int(str(i.operands[0])) + 1),)}
    if i.op.startswith("fence.proxy"):
        return "proxy fence", NOTHING
    if i.op.startswith(("wgmma.wait", "wgmma.fence")):
        return f"wgmma's {i.words[1].partition('_')[0]}", NOTHING
    if i.guard and i.op.startswith(("ld.global", "st.global", "cp.async.c")):
        return "mask", {"guard": ""}
    return None


def mutants(program: Program, few: bool) -> Iterator[tuple[str, Instruction, Program]]:
    """Kind, instruction, and the program without it, of those that have run; of each kind one, if few."""
    code, reached = program.kernel.code, set()
    starts = sorted(segment.start for segment in program.segments)
    stops = dict(zip(starts, [*starts[1:], len(code)], strict=True))
    for number in program.visited:
        start = program.segments[number].start
        reached |= set(range(start, stops[start]))
    found = [(at, changed) for at in sorted(reached) if (changed := mutation(code[at]))]
    if few:
        found = list({kind: (at, (kind, changes)) for at, (kind, changes) in reversed(found)}.values())
    masks = [one for one in found if one[1][0] == "mask"]
    for at, (kind, changes) in [one for one in found if one[1][0] != "mask"] + masks[:: -(-len(masks) // MASKS) or 1]:
        own = [*code[:at], code[at]._replace(**changes), *code[at + 1 :]]
        yield kind, code[at], build(program.kernel._replace(code=own), program.threads)


def trial(one: launch.Launch, program: Program, before: list[np.ndarray], after: list[np.ndarray]) -> str:
    """What finds a mutant: the fault, or "other result"; empty for nothing."""
    for region, held in zip(one.regions, before, strict=True):
        region.own[:] = held
    try:
        one.run(program)
    except Fault as fault:
        return fault.kind
    same = all((r.own == held).all() for r, held in zip(one.regions, after, strict=True))
    return "" if same else "other result"


def of_case(case: Case, few: bool) -> list[dict[str, Any]]:
    """The mutants of each kernel of a case, of its first launch."""
    found: list[dict[str, Any]] = []
    seen: set[str] = set()

    def execute(one: launch.Launch) -> None:
        before = [r.own.copy() for r in one.regions]
        one.program.visited.clear()
        one.run()
        if one.text in seen:
            return
        seen.add(one.text)
        after = [r.own.copy() for r in one.regions]
        for kind, instruction, program in mutants(one.program, few):
            by = trial(one, program, before, after)
            found.append({"kernel": one.name, "mutant": kind, "at": instruction.source, "by": by})
        for region, held in zip(one.regions, after, strict=True):
            region.own[:] = held

    launch.execute[0] = execute
    try:
        with gpu(case.arch), cases.uninitialised_is_nan():
            cases.step(case, case.schedule, cases.DTYPES[case.dtype])
    finally:
        launch.execute[0] = launch.Launch.run
    return found


def summary(case: Case, each: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """By kernel and kind: how many, how many are found and by what, and where those stand that are not."""
    for kernel, kind in dict.fromkeys((one["kernel"], one["mutant"]) for one in each):
        own = [one for one in each if (one["kernel"], one["mutant"]) == (kernel, kind)]
        by = Counter(one["by"] for one in own if one["by"])
        missed = sorted(one["at"] for one in own if not one["by"])
        record = {"case": str(case), "kernel": kernel, "mutant": kind, "of": len(own), "found": by.total()}
        yield record | {"by": dict(by), "missed": missed, "good": bool(by)}


def run(words: list[str]) -> Iterator[dict[str, Any]]:
    """Of the cases whose names hold all the words; with "quick" among these, few of each kernel."""
    wanted = [word for word in words if word != "quick"]
    for case in CASES:
        if all(word in str(case) for word in wanted):
            yield from summary(case, of_case(case, "quick" in words))
