"""The tensor cores of a warp: mma.sync, ldmatrix, stmatrix.

Fragments as the ISA lays them out, lane = 4 * group + member: a register of A holds row group (or 8 further), columns
of its member; one of B rows of its member, column group. Sums of float32 may truncate there, so here they do: exact
products added to the accumulator exactly, the sum cut to float32. tf32 drops the bits that it has no room for.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np

from .arithmetic import Run, put
from .faults import Fault, Unsupported
from .moves import locate, whole_warps
from .shared import refuse_partial

TRUNCATE = [True]
PER_WORD = {"bf16": 2, "f16": 2, "tf32": 1, "s8": 4, "f64": 1}


def widen(bits: np.ndarray, name: str) -> np.ndarray:
    """What bits (...,) of 32 or 64 hold, (..., elements), in a type in which sums of products are exact."""
    if name == "f64":
        return bits.view("f8")[..., None]
    if name == "tf32":
        return (bits & np.uint32(0xFFFFE000)).view("f4").astype("f8")[..., None]
    if name == "bf16":
        halves = np.ascontiguousarray(bits)[..., None].view("u2").astype("u4") << np.uint32(16)
        return halves.view("f4").astype("f8")
    kind = "f2" if name == "f16" else "i1"
    return np.ascontiguousarray(bits)[..., None].view(kind).astype("f8")


def cut(x: np.ndarray) -> np.ndarray:
    """float64 to float32, towards zero if sums truncate."""
    near = x.astype("f4")
    if not TRUNCATE[0]:
        return near
    return np.where(np.abs(near) > np.abs(x), np.nextafter(near, np.float32(0)), near)


def add(product: np.ndarray, c: np.ndarray, name: str) -> np.ndarray:
    """The accumulator with a product added, both float64, as it is kept: float64, float32 or int32."""
    if name == "f64":
        return product + c
    if name != "s8":
        return cut(product + c)
    return np.clip(product + c, -(2.0**31), 2.0**31 - 1).astype("i4")


def _fragments(registers: list[np.ndarray], warps: int, split: tuple[int, int], name: str) -> np.ndarray:
    """(second, first, warp, group, member, element) of registers numbered 2 * second + first."""
    bits = np.stack([r.view("u8" if name == "f64" else "u4") for r in registers])
    return widen(bits.reshape(*split, warps, 8, 4), name)


def a_matrix(registers: list[np.ndarray], warps: int, name: str) -> np.ndarray:
    """(warp, row, k) of one register (8 rows) or four (16 rows, twice the columns)."""
    split = (2, 2) if len(registers) == 4 else (1, 1)
    found = _fragments(registers, warps, split, name).transpose(2, 1, 3, 0, 4, 5)
    return found.reshape(warps, 8 * split[0], -1)


def _mma(builder: Any, words: list[str], operands: tuple[Any, ...]) -> Run:
    shape, kinds = words[3], words[6:] if words[6] != "satfinite" else words[7:]
    name = kinds[1]
    known = {"m16n8k16": ("bf16", "f16"), "m16n8k8": ("tf32",), "m16n8k32": ("s8",), "m8n8k4": ("f64",)}
    if name not in known.get(shape, ()) or kinds[2] != name or words[4:6] != ["row", "col"]:
        raise Unsupported("a shape or type")
    if kinds[0] != {"s8": "s32", "f64": "f64"}.get(name, "f32"):
        raise Unsupported("an accumulator")
    size, out = (8, "f8") if name == "f64" else (4, "i4" if name == "s8" else "f4")
    to = [builder.to(o) for o in operands[0]]
    a, b, c = ([builder.of(o, size) for o in part] for part in operands[1:4])
    split = (2, 2) if len(c) == 4 else (1, 2)

    def run(block: Any, r: list[Any], mask: Any) -> None:
        whole_warps(block, mask, "mma")
        warps = block.threads // 32
        left = a_matrix([r[s] for s in a], warps, name)
        right = _fragments([r[s] for s in b], warps, (1, len(b)), name)[0].transpose(1, 0, 3, 4, 2)
        sums = np.stack([r[s].view(out) for s in c]).reshape(*split, warps, 8, 4).transpose(2, 0, 3, 4, 1)
        sums = sums.reshape(warps, 8 * split[0], 8).astype("f8")
        found = add(left @ right.reshape(warps, -1, 8), sums, name)
        parts = found.reshape(warps, split[0], 8, 4, 2).transpose(1, 4, 0, 2, 3).reshape(len(to), -1)
        for slot, part in zip(to, parts, strict=True):
            put(r, slot, np.ascontiguousarray(part), mask)

    return run


def _matrices(words: list[str]) -> int:
    found = re.fullmatch(r"x([124])", words[4])
    if not found or words[3] != "m8n8" or words[-1] != "b16":
        raise Unsupported("a shape")
    return int(found[1])


def _rows(block: Any, address: np.ndarray, count: int) -> np.ndarray:
    """(matrix, warp, row): the addresses of rows of 16 bytes, which lane 8 * matrix + row names."""
    lanes = address.reshape(-1, 4, 8)[:, :count]
    return np.ascontiguousarray(lanes.transpose(1, 0, 2))


def _halves(block: Any, rows: np.ndarray, trans: bool) -> np.ndarray:
    """Which 16-bit units of shared memory make up each lane's word: (matrix, threads, 2)."""
    if (rows & 15).any():
        raise Fault("misaligned access", "a row of a matrix of shared memory")
    if int(rows.max()) > block.shared.size - 16:
        raise Fault("access outside shared memory", f"a row at {int(rows.max())} of {block.shared.size}")
    elements = rows[..., None].astype(np.int64) // 2 + np.arange(8)  # (matrix, warp, row, column)
    if trans:
        elements = elements.swapaxes(2, 3)
    return elements.reshape(len(rows), -1, 2)


def _ldmatrix(builder: Any, words: list[str], operands: tuple[Any, ...]) -> Run:
    count, trans = _matrices(words), "trans" in words
    to, where = [builder.to(o) for o in operands[0]], locate(builder, operands[1], 4)

    def run(block: Any, r: list[Any], mask: Any) -> None:
        refuse_partial(mask, "ldmatrix")
        at = _halves(block, _rows(block, where(r), count), trans)
        warp = np.tile(block.warp, count)
        found = block.shared.load(at.reshape(-1, 2), 2, warp).reshape(count, -1, 2)
        for k, slot in enumerate(to):
            put(r, slot, np.ascontiguousarray(found[k]).view("u4")[:, 0], mask)

    return run


def _stmatrix(builder: Any, words: list[str], operands: tuple[Any, ...]) -> Run:
    count, trans = _matrices(words), "trans" in words
    where, slots = locate(builder, operands[0], 4), [builder.of(o, 4) for o in operands[1]]

    def run(block: Any, r: list[Any], mask: Any) -> None:
        refuse_partial(mask, "stmatrix")
        at = _halves(block, _rows(block, where(r), count), trans)
        values = np.stack([r[slot].view("u2").reshape(-1, 2) for slot in slots])
        block.shared.store(at.reshape(-1, 2), values.reshape(-1, 2), np.tile(block.warp, count))

    return run


TABLE: dict[str, Callable[..., Run]] = {"mma": _mma, "ldmatrix": _ldmatrix, "stmatrix": _stmatrix}
