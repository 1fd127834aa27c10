"""PTX text as instructions: opcode, guard, operands, source line."""

from __future__ import annotations

import functools
import re
from typing import NamedTuple

from .faults import Unsupported

SIZES = {"pred": 1, "b8": 1, "u8": 1, "s8": 1, "b16": 2, "u16": 2, "s16": 2, "f16": 2, "b32": 4, "u32": 4, "s32": 4}
SIZES |= {"f32": 4, "b64": 8, "u64": 8, "s64": 8, "f64": 8}


class Address(NamedTuple):
    """[base + offset]; the base is a register, a parameter or a variable."""

    base: str
    offset: int


Operand = str | Address | tuple[str, ...]


class Instruction(NamedTuple):
    op: str
    guard: str  # the predicate register, empty for none
    negated: bool
    operands: tuple[Operand, ...]
    source: str  # file:line, innermost first
    text: str

    @property
    def words(self) -> list[str]:
        return self.op.split(".")


class Kernel(NamedTuple):
    name: str
    target: str
    threads: int  # what the kernel requires, 0 for any number
    parameters: dict[str, tuple[int, int]]  # offset, bytes
    registers: dict[str, int]  # by the letters of their names: bytes, 0 for a predicate
    shared: dict[str, tuple[int, int]]  # variables: offset, bytes; -1 for what the launch decides
    code: list[Instruction]
    labels: dict[str, int]


def _split(text: str) -> list[str]:
    """At commas outside of brackets."""
    if not any(bracket in text for bracket in "{[("):
        return [part.strip() for part in text.split(",")] if text.strip() else []
    parts, depth, start = [], 0, 0
    for at, letter in enumerate(text):
        depth += letter in "{[("
        depth -= letter in "}])"
        if letter == "," and depth == 0:
            parts.append(text[start:at].strip())
            start = at + 1
    return [*parts, text[start:].strip()] if text.strip() else []


def operand(text: str) -> Operand:
    if text.startswith("{"):
        return tuple(part.strip() for part in text[1:-1].split(","))
    if text.startswith("["):
        found = re.fullmatch(r"\[\s*([^\s+\]]+)\s*(?:\+\s*(-?\w+))?\s*\]", text)
        if not found:
            raise Unsupported(f"address {text}")
        return Address(found[1], int(found[2] or "0", 0))
    return text


_STATEMENT = re.compile(r"(?:@(!?)(%\w+)\s+)?([a-z][\w.:]*)\s*(.*)", re.S)
_LOCATION = re.compile(r"\.loc\s+(\d+) (\d+) \d+(?:.*?inlined_at (\d+) (\d+))?")


_DROPPED = re.compile(r"\{ \.reg \.\w+ (\w+); (.*) \}")  # a register of a line's own, for a half that is not wanted


def _instruction(text: str, source: str) -> Instruction:
    found = _STATEMENT.fullmatch(text)
    if not found:
        raise Unsupported(text)
    try:
        operands = tuple(operand(part) for part in _split(found[4]))
    except Unsupported as error:
        raise Unsupported(f"{text} ({error})") from error
    return Instruction(found[3], found[2] or "", bool(found[1]), operands, source, " ".join(text.split())[:160])


_PARAMETER = re.compile(r"\.param(?:\s+\.align (\d+))?\s+\.([bsuf]\d+)(?:\s+\.ptr.*)?\s+(\w+)(?:\[(\d+)\])?")


def _parameters(text: str) -> dict[str, tuple[int, int]]:
    found, offset = {}, 0
    for part in _split(text):
        align, kind, name, count = _PARAMETER.fullmatch(part).groups()  # type: ignore[union-attr]
        size = SIZES[kind]
        most = max(int(align or 1), size)
        offset = -(-offset // most) * most
        found[name] = offset, size * int(count or 1)
        offset += size * int(count or 1)
    return found


def _variables(text: str) -> dict[str, tuple[int, int]]:
    """Shared variables, those of the launch behind the others."""
    found, offset, last = {}, 0, []
    for align, kind, name, count in re.findall(r"\.shared \.align (\d+) \.([bsuf]\d+) (\w+)\[(\d*)\];", text):
        if not count:
            last.append(name)
            continue
        offset = -(-offset // int(align)) * int(align)
        found[name] = offset, SIZES[kind] * int(count)
        offset += SIZES[kind] * int(count)
    return found | {name: (-(-offset // 1024) * 1024, -1) for name in last}


def _body(text: str, files: dict[str, str]) -> tuple[list[Instruction], dict[str, int]]:
    code: list[Instruction] = []
    labels: dict[str, int] = {}
    source = ""
    for line in text.split("\n"):
        stripped = line.partition("//")[0].strip()
        if stripped.startswith(".loc"):
            found = _LOCATION.match(stripped)
            if found:
                inner, outer = (
                    f"{files.get(f, f)}:{at}" if f else "" for f, at in (found.groups()[:2], found.groups()[2:])
                )
                source = f"{inner} in {outer}" if outer else inner
            continue
        if found := _DROPPED.fullmatch(stripped):
            stripped = re.sub(rf"\b{found[1]}\b", "_", found[2])
        while found := re.match(r"(\$?\w+):(?!:)\s*", stripped):
            labels[found[1]] = len(code)
            stripped = stripped[found.end() :]
        for statement in stripped.split(";"):
            words = statement.strip().removeprefix("{").strip()
            if words == "}":
                continue
            if words and not words.startswith("."):
                code.append(_instruction(words, source))
    return code, labels


@functools.lru_cache(maxsize=4)
def parse(text: str) -> dict[str, Kernel]:
    """The kernels of a module by their names."""
    files = {n: path.rpartition("/")[2] for n, path in re.findall(r'\.file\s+(\d+) "([^"]+)"', text)}
    target = re.search(r"\.target (\w+)", text)[1]  # type: ignore[index]
    found = {}
    for entry in re.finditer(r"\.entry (\w+)\((.*?)\)(.*?)\n\{\n(.*?)\n\}\n", text, re.S):
        name, parameters, attributes, body = entry.groups()
        threads = re.search(r"\.(?:req|max)ntid (\d+)(?:, *(\d+))?", attributes)
        counted = {
            letters: SIZES[kind] * (kind != "pred") for kind, letters in re.findall(r"\.reg \.(\w+)\s+%(\w+)[<;]", body)
        }
        shared = _variables(text[: text.index(".entry")] + body)
        code, labels = _body(body, files)
        required = int(threads[1]) if threads and ".reqntid" in attributes else 0
        found[name] = Kernel(name, target, required, _parameters(parameters), counted, shared, code, labels)
    return found
