"""Reads machine code of NVIDIA chips: instructions, loops, and the pipe that runs each instruction."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import NamedTuple

LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)([^;]*);")
RESOURCES = re.compile(r"REG:(\d+) STACK:(\d+)")

# By the first word of an opcode. All other opcodes that do not begin with U run on the ALU.
PIPES = {
    "tensor": "HGMMA HMMA IGMMA IMMA QGMMA DMMA BMMA",
    "ex2": "MUFU I2F F2I F2F FRND POPC FLO BREV",
    "fma": "FFMA FMUL FADD FFMA32I FMUL32I FADD32I HFMA2 HMUL2 HADD2 IMAD IMUL FSWZADD",
    "fp64": "DFMA DMUL DADD DSETP DMNMX",
    "lsu": "LDG LDS STG STS LDL STL LDSM STSM LDGSTS SHFL ATOM ATOMS ATOMG RED REDUX LDC LD ST MATCH QSPC MOVM S2R",
    "control": "BRA BRX JMP CALL RET EXIT BAR BSYNC BSSY BREAK WARPSYNC NOP DEPBAR LDGDEPBAR WARPGROUP MEMBAR FENCE "
    "WARPGROUPSET NANOSLEEP YIELD ERRBAR CCTL SYNCS ARRIVES ELECT ENDCOLLECTIVE KILL PREEXIT",
}
PIPE_OF = {word: pipe for pipe, words in PIPES.items() for word in words.split()}


class Instruction(NamedTuple):
    address: int
    predicate: str
    opcode: str  # with its modifiers: LDG.E.64
    operands: str

    @property
    def pipe(self) -> str:
        word = self.opcode.split(".")[0]
        return PIPE_OF.get(word) or ("uniform" if word.startswith("U") or word == "R2UR" else "alu")


class Loop(NamedTuple):
    first: int  # index of its first instruction
    last: int

    def within(self, other: Loop) -> bool:
        return other.first <= self.first and self.last <= other.last and self != other

    def crosses(self, other: Loop) -> bool:
        one, two = sorted((self, other))
        return one.first < two.first <= one.last < two.last


def _tool(name: str) -> Path:
    import triton

    return Path(triton.__file__).parent / "backends/nvidia/bin" / name


def dump(cubin: bytes, *options: str) -> str:
    """The output of Triton's cuobjdump for a cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.check_output([_tool("cuobjdump"), *options, file.name], text=True)


def resources(cubin: bytes) -> dict[str, int]:
    """Registers of a thread and bytes of its stack."""
    words = dump(cubin, "--dump-resource-usage")
    found = RESOURCES.search(words)
    assert found, words
    return {"registers": int(found[1]), "stack": int(found[2])}


def read(text: str) -> list[Instruction]:
    return [Instruction(int(a, 16), p or "", op, rest.strip()) for a, p, op, rest in LINE.findall(text)]


def loops(code: list[Instruction]) -> list[Loop]:
    """One loop for each backward branch; of those that begin at one place, the longest.

    An unconditional backward branch that crosses a loop is not a loop: it returns from code out of line (threads that
    wait for each other).
    """
    place = {one.address: k for k, one in enumerate(code)}
    found: dict[bool, dict[int, int]] = {True: {}, False: {}}
    for k, one in enumerate(code):
        target = re.search(r"0x([0-9a-f]+)", one.operands) if one.opcode.startswith("BRA") else None
        if target and (to := place.get(int(target[1], 16), k + 1)) < k:
            ends = found[bool(one.predicate)]
            ends[to] = max(k, ends.get(to, 0))
    sure, maybe = ([Loop(first, last) for first, last in found[known].items()] for known in (True, False))
    return sure + [loop for loop in maybe if not any(loop.crosses(other) for other in sure)]


def hot(code: list[Instruction]) -> tuple[list[Instruction], list[Instruction]]:
    """The loop over unmasked tiles, nearly all of the time of a large batch, and the part of it that loops along D.

    It is the shortest outermost loop with products: the loop over masked tiles has masks beside the same work. All code
    inside the loop is counted, also where a branch may skip it; code that the compiler moved out of line is not.
    """
    with_products = [s for s in loops(code) if any(i.pipe == "tensor" for i in code[s.first : s.last + 1])]
    outer = [loop for loop in with_products if not any(loop.within(other) for other in with_products)]
    if not outer:
        return [], []
    best = min(outer, key=lambda loop: loop.last - loop.first)
    inner = [loop for loop in with_products if loop.within(best)]
    along = {k for loop in inner for k in range(loop.first, loop.last + 1)}
    return (
        [code[k] for k in range(best.first, best.last + 1) if k not in along],
        [code[k] for k in sorted(along)],
    )


def count(code: list[Instruction]) -> Counter[str]:
    """Instructions by pipe; imad: those of fma that are integer, at half its rate."""
    found = Counter(one.pipe for one in code)
    found["imad"] = sum(one.opcode.startswith("IMAD") for one in code)
    return found
