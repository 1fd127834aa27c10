"""From parsed instructions to a program: segments between branches, each instruction a closure of its table."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from . import approximate, arithmetic, matrix, moves, warpgroup
from .faults import Unsupported
from .order import ordered
from .parse import SIZES, Instruction, Kernel, parse
from .tensors import UINT

ENDS = {"bra": "branch", "ret": "exit", "exit": "exit", "bar": "barrier", "barrier": "barrier"}
TABLES = (arithmetic.TABLE, approximate.TABLE, moves.TABLE, matrix.TABLE, warpgroup.TABLE)
Step = Callable[..., None]


class Segment(NamedTuple):
    """Instructions without a branch among them, and what is at their end."""

    start: int
    steps: list[Any]
    end: str  # next, branch, barrier, exit, yield
    guard: int  # the predicate's slot, -1 for none
    negated: bool
    target: int  # of a branch: a segment
    following: int  # the segment behind it


class Program(NamedTuple):
    kernel: Kernel
    threads: int
    segments: list[Segment]
    registers: list[Any]  # constants in their places, None for what the kernel writes
    special: dict[str, int]  # slots of %ctaid.x and its like
    visited: set[int]  # segments that have run
    builder: Builder


class Builder:
    """One kernel's registers by slot, while its instructions become closures."""

    def __init__(self, kernel: Kernel, threads: int) -> None:
        self.kernel, self.threads = kernel, threads
        self.slots: dict[Any, int] = {}
        self.registers: list[Any] = []
        self.special: dict[str, int] = {}
        lane = np.arange(threads, dtype=np.uint32)
        self.known = {"%tid.x": lane, "%laneid": lane % 32, "%warpid": lane // 32}
        self.known |= {"%ntid.x": np.full(threads, threads, np.uint32)}
        for axis in ("y", "z"):
            self.known |= {f"%tid.{axis}": lane * 0, f"%ntid.{axis}": lane * 0 + 1}

    def _slot(self, key: Any, value: Any = None) -> int:
        if key not in self.slots:
            self.slots[key] = len(self.registers)
            self.registers.append(value)
        return self.slots[key]

    def bits(self, register: str) -> int:
        """Bytes of a register, 0 of a predicate."""
        letters = register[1:].rstrip("0123456789")
        return self.kernel.registers[letters]

    def to(self, operand: Any) -> int:
        """The slot of a register that is written; -1 for the one that drops what it gets."""
        if operand == "_":
            return -1
        if not isinstance(operand, str) or not operand.startswith("%"):
            raise Unsupported(f"destination {operand}")
        self.bits(operand)
        return self._slot(operand)

    def of(self, operand: Any, size: int) -> int:
        """The slot of a value of so many bytes, or of a predicate (0): a register's or a constant's."""
        if not isinstance(operand, str):
            raise Unsupported(f"operand {operand}")
        if operand.startswith("%"):
            if operand in self.known:
                return self._slot(operand, self.known[operand])
            if operand.startswith(("%ctaid", "%nctaid", "%envreg")):
                self.special[operand] = self._slot(operand)
                return self.special[operand]
            if self.bits(operand) != size:
                raise Unsupported(f"{operand} as {size} bytes")
            return self._slot(operand)
        if size == 0:
            return self._slot((operand, 0), np.full(self.threads, int(operand, 0) != 0))
        return self._slot((operand, size), np.full(self.threads, self.constant(operand, size), UINT[size]))

    def constant(self, text: str, size: int) -> int:
        if text.startswith(("0f", "0d", "0F", "0D")):
            return int(text[2:], 16)
        if text in self.kernel.shared:
            return self.kernel.shared[text][0]
        if text in self.kernel.parameters:
            return self.kernel.parameters[text][0]
        try:
            text = text.removesuffix("U")
            return int(text, 0) % 2 ** (8 * size)
        except ValueError:
            raise Unsupported(f"operand {text}") from None


Wrap = Callable[[Builder, int, Instruction, Step], Step]  # one of an instruction's number, around its own


def step(builder: Builder, instruction: Instruction) -> Step:
    """The closure of one instruction, of those threads that its guard lets through."""
    family = instruction.words[0]
    made = next((table[family] for table in TABLES if family in table), None)
    try:
        if made is None:
            raise Unsupported("opcode")
        run = made(builder, instruction.words, instruction.operands)
    except (Unsupported, KeyError, IndexError, ValueError, TypeError) as error:
        raise Unsupported(f"{instruction.text} ({error})") from error
    if not instruction.guard:
        return run
    guard, negated = builder.of(instruction.guard, 0), instruction.negated

    def guarded(block: Any, registers: list[Any], mask: Any) -> None:
        chosen = registers[guard]
        if negated:
            chosen = ~chosen
        if mask is not None:
            chosen = chosen & mask
        count = np.count_nonzero(chosen)
        if count == len(chosen):
            run(block, registers, None)
        elif count:
            run(block, registers, chosen)

    return guarded


def _ends(instruction: Instruction) -> str:
    if instruction.words[:2] == ["ld", "acquire"]:
        return "yield"
    return "" if instruction.op == "bar.warp.sync" else ENDS.get(instruction.words[0], "")


def _falls(code: list[Instruction], starts: list[int], k: int) -> bool:
    """Whether segment k may go on to the next one."""
    if k + 1 == len(starts):
        return False
    last = code[starts[k + 1] - 1]
    return last.words[0] != "bra" or bool(last.guard)


@functools.lru_cache(maxsize=32)
def assemble(text: str, name: str, threads: int) -> Program:
    """The program of one of a module's kernels, for blocks of so many threads."""
    return build(parse(text)[name], threads)


def build(kernel: Kernel, threads: int, wrap: Wrap | None = None) -> Program:
    """wrap: what becomes of each step. A barrier has one then, of those who come to it."""
    code, builder = kernel.code, Builder(kernel, threads)

    def made(at: int) -> Step:
        own = step(builder, code[at])
        return wrap(builder, at, code[at], own) if wrap else own

    goals = {kernel.labels[i.operands[0]] for i in code if i.words[0] == "bra"}  # type: ignore[index]
    starts = sorted({0, *goals, *(at + 1 for at, i in enumerate(code) if _ends(i))} - {len(code)})
    number = {start: k for k, start in enumerate(starts)}
    ends = [_ends(code[stop - 1]) or "next" for stop in [*starts[1:], len(code)]]
    goal = {
        start: number[kernel.labels[code[stop - 1].operands[0]]] if end == "branch" else -1
        for start, stop, end in zip(starts, [*starts[1:], len(code)], ends, strict=True)
    }
    edges = {
        k: [] if end == "exit" else [goal[start]] * (end == "branch") + [k + 1] * _falls(code, starts, k)
        for k, (start, end) in enumerate(zip(starts, ends, strict=True))
    }
    rank = {k: place for place, k in enumerate(ordered(list(edges), edges, 0))}
    segments: list[Any] = [None] * len(starts)
    for k, (start, stop, end) in enumerate(zip(starts, [*starts[1:], len(code)], ends, strict=True)):
        last = code[stop - 1]
        body = range(start, stop - (end not in ("next", "yield", "barrier" if wrap else "")))
        if end == "barrier" and (last.operands not in (("0",),) or last.guard):
            raise Unsupported(last.text)
        guard = builder.of(last.guard, 0) if end == "branch" and last.guard else -1
        if end == "exit" and last.guard:
            raise Unsupported(last.text)
        target = rank[goal[start]] if end == "branch" else -1
        steps = [made(at) for at in body]
        segments[rank[k]] = Segment(start, steps, end, guard, last.negated, target, rank.get(k + 1, -1))
    for register in [key for key in builder.slots if isinstance(key, str)]:
        assert (
            register in builder.known or register in builder.special or builder.bits(register) in (0, *SIZES.values())
        )
    return Program(kernel, threads, segments, builder.registers, builder.special, set(), builder)


def changed(program: Program, at: int, instruction: Instruction, wrap: Wrap | None = None) -> Program:
    """The program with another instruction of the same registers at a place; none at that of a barrier."""
    number = max((s.start, k) for k, s in enumerate(program.segments) if s.start <= at)[1]
    own = program.segments[number]
    if at - own.start < len(own.steps):
        new = step(program.builder, instruction)
        new = wrap(program.builder, at, instruction, new) if wrap else new
        own = own._replace(steps=[*own.steps[: at - own.start], new, *own.steps[at - own.start + 1 :]])
    else:
        own = own._replace(end="next")
    return program._replace(segments=[*program.segments[:number], own, *program.segments[number + 1 :]], visited=set())
