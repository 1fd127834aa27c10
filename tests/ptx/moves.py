"""What moves values: mov, selp, loads and stores, cp.async, and exchanges within a warp."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .arithmetic import DTYPES, Run, put
from .faults import Fault, Unsupported
from .parse import SIZES, Address
from .shared import refuse_partial
from .tensors import UINT


def _mov(builder: Any, words: list[str], operands: tuple[Any, ...]) -> Run:
    size = SIZES[words[1]] if words[1] != "pred" else 0
    to, source = operands
    if isinstance(to, tuple):
        return _unpack(builder, to, builder.of(source, size), size)
    if isinstance(source, tuple):
        return _pack(builder, builder.to(to), source, size)
    target, a = builder.to(to), builder.of(source, size)

    def run(block: Any, r: list[Any], mask: Any) -> None:
        value = r[a]
        if mask is None:
            r[target] = value if value is None else value.view()  # another object: a write, see warpgroup.py
        elif value is not None:  # what nothing wrote may be moved, but not used
            put(r, target, value, mask)

    return run


def _unpack(builder: Any, parts: tuple[str, ...], a: int, size: int) -> Run:
    kind = UINT[size // len(parts)]
    slots = [builder.to(part) for part in parts]

    def run(block: Any, r: list[Any], mask: Any) -> None:
        found = r[a].view(kind).reshape(-1, len(slots))
        for k, slot in enumerate(slots):
            if slot >= 0:
                put(r, slot, found[:, k].copy(), mask)

    return run


def _pack(builder: Any, to: int, parts: tuple[str, ...], size: int) -> Run:
    width = size // len(parts)
    slots, kind = [builder.of(part, width) for part in parts], UINT[size]

    def run(block: Any, r: list[Any], mask: Any) -> None:
        both = np.stack([r[slot].view(UINT[width]) for slot in slots], 1)
        put(r, to, both.view(kind)[:, 0], mask)

    return run


def _selp(builder: Any, words: list[str], operands: tuple[Any, ...]) -> Run:
    size = SIZES[words[1]]
    kind, to = UINT[size], builder.to(operands[0])
    a, b, p = builder.of(operands[1], size), builder.of(operands[2], size), builder.of(operands[3], 0)

    def run(block: Any, r: list[Any], mask: Any) -> None:
        put(r, to, np.where(r[p], r[a].view(kind), r[b].view(kind)), mask)

    return run


def locate(builder: Any, address: Address, size: int) -> Callable[[list[Any]], np.ndarray]:
    """Addresses (T,) of so many bytes each."""
    kind = UINT[size]
    base, offset = address
    if not base.startswith("%"):
        base, offset = str(builder.constant(base, size)), offset
    slot, more = builder.of(base, size), kind.type(offset % 2 ** (8 * size))
    return lambda r: r[slot].view(kind) + more


def _registers(operand: Any) -> tuple[str, ...]:
    return operand if isinstance(operand, tuple) else (operand,)


def _space(words: list[str]) -> str:
    for word in words:
        if word.partition("::")[0] in ("global", "shared", "param"):
            return word.partition("::")[0]
    if "gpu" in words:
        return "global"
    raise Unsupported("generic addresses")


def _spread(values: np.ndarray, mask: Any, threads: int) -> np.ndarray:
    if mask is None:
        return values
    full = np.zeros(threads, values.dtype)
    full[mask] = values
    return full


def _ld(builder: Any, words: list[str], operands: tuple[Any, ...]) -> Run:
    """A vector's parts, each extended to its register."""
    space, kind, parts = _space(words), DTYPES[words[-1]], _registers(operands[0])
    slots = [builder.to(part) for part in parts]
    held = [np.dtype(f"{kind.kind if kind.kind in 'iu' else 'u'}{builder.bits(part)}") for part in parts]
    width, count = kind.itemsize, len(parts)
    if space == "param":
        return _parameter(builder, operands[1], slots, kind, held)
    where = locate(builder, operands[1], 8 if space == "global" else 4)

    def run(block: Any, r: list[Any], mask: Any) -> None:
        address, warp, stamps = where(r), block.warp, block.stamps
        if mask is not None:
            address, warp, stamps = address[mask], warp[mask], stamps[mask]
        if space == "global":
            found = block.tensors.load(address, width, count, stamps)
        else:
            found = block.shared.load(block.shared.places(address, width, count), width, warp)
        for k, (slot, wide) in enumerate(zip(slots, held, strict=True)):
            value = found[:, k].view(kind)
            if wide.itemsize != width:
                value = value.astype(wide)
            elif mask is None:
                value = value.copy()
            put(r, slot, _spread(value, mask, block.threads), mask)

    return run


def _parameter(builder: Any, address: Address, slots: list[int], kind: np.dtype[Any], held: list[Any]) -> Run:
    """Of the kernel's parameters, which lie behind one another; threads may read different ones."""
    base, offset = address
    source = builder.of(base, 8) if base.startswith("%") else -1
    offset += 0 if source >= 0 else builder.kernel.parameters[base][0]

    def run(block: Any, r: list[Any], mask: Any) -> None:
        at = np.full(block.threads, offset) if source < 0 else r[source].view("i8") + offset
        if mask is not None:
            at = np.where(mask, at, at[mask][0])
        if at.min() < 0 or at.max() + kind.itemsize * len(slots) > len(block.parameters):
            raise Fault("access outside the parameters", f"at {at.max()} of {len(block.parameters)}")
        memory = np.frombuffer(block.parameters, "u1")
        for k, (slot, wide) in enumerate(zip(slots, held, strict=True)):
            places = at[:, None] + np.arange(k * kind.itemsize, (k + 1) * kind.itemsize)
            value = memory[places].view(kind)[:, 0]
            put(r, slot, value.astype(wide) if wide.itemsize != kind.itemsize else value, mask)

    return run


def _st(builder: Any, words: list[str], operands: tuple[Any, ...]) -> Run:
    space, kind, parts = _space(words), UINT[SIZES[words[-1]]], _registers(operands[1])
    width = kind.itemsize
    sizes = [builder.bits(part) if part.startswith("%") else width for part in parts]
    slots = [builder.of(part, size) for part, size in zip(parts, sizes, strict=True)]
    where = locate(builder, operands[0], 8 if space == "global" else 4)

    def run(block: Any, r: list[Any], mask: Any) -> None:
        address, warp, stamps = where(r), block.warp, block.stamps
        columns = [r[slot].view(f"u{size}") for slot, size in zip(slots, sizes, strict=True)]
        values = np.stack(columns, 1).astype(kind, copy=False)
        if mask is not None:
            address, warp, stamps, values = address[mask], warp[mask], stamps[mask], values[mask]
        if space == "global":
            block.tensors.store(address, values, stamps)
        else:
            block.shared.store(block.shared.places(address, width, len(slots)), values, warp)

    return run


def _cp(builder: Any, words: list[str], operands: tuple[Any, ...]) -> Run:
    """cp.async: 4, 8 or 16 bytes, zeros where the source has none."""
    if words[:2] != ["cp", "async"]:
        raise Unsupported("bulk copies")
    if words[2] == "commit_group":

        def commit(block: Any, r: list[Any], mask: Any) -> None:
            refuse_partial(mask, "cp.async.commit_group")
            block.shared.commit()

        return commit
    if words[2] in ("wait_group", "wait_all"):
        left = builder.constant(operands[0], 4) if operands else 0

        def wait(block: Any, r: list[Any], mask: Any) -> None:
            refuse_partial(mask, "cp.async.wait_group")
            if words[2] == "wait_all":
                block.shared.commit()
            block.shared.wait(left)

        return wait
    into, out = locate(builder, operands[0], 4), locate(builder, operands[1], 8)
    size = builder.constant(operands[2], 4)
    given = builder.of(operands[3], 4) if len(operands) > 3 else -1

    def run(block: Any, r: list[Any], mask: Any) -> None:
        to, source, warp, stamps = into(r), out(r), block.warp, block.stamps
        some = np.full(len(to), size, np.uint32) if given < 0 else r[given].view("u4")
        if mask is not None:
            to, source, warp, stamps, some = to[mask], source[mask], warp[mask], stamps[mask], some[mask]
        full = some == size
        if not (full | (some == 0)).all():
            raise Fault("cp.async of a part", "this executor takes all of the bytes or none")
        values = np.zeros((len(to), size // 4), np.uint32)
        if full.any():
            values[full] = block.tensors.load(source[full], 4, size // 4, stamps[full])
        block.shared.copy(block.shared.places(to, 4, size // 4), values, warp)

    return run


def whole_warps(block: Any, mask: Any, op: str) -> None:
    """Instructions of all of a warp's threads, which must be there."""
    if mask is not None:
        counts = mask.reshape(-1, 32).sum(1)
        if ((counts > 0) & (counts < 32)).any():
            raise Fault("warp instruction in a divergent warp", op)


def _shfl(builder: Any, words: list[str], operands: tuple[Any, ...]) -> Run:
    """Of whole warps; a lane whose source is none of its segment's keeps its own value."""
    to, bar, reached = operands[0].partition("|")
    target, flag, mode = builder.to(to), builder.to(reached) if bar else -1, words[2]
    a, by, clamp, members = (builder.of(operand, 4) for operand in operands[1:5])

    def run(block: Any, r: list[Any], mask: Any) -> None:
        whole_warps(block, mask, "shfl")
        all_of_a_warp(r[members], mask, "shfl")
        thread = np.arange(block.threads)
        lane, step, given = thread % 32, r[by].view("u4").astype(np.int64), r[clamp].view("u4").astype(np.int64)
        segment, most = given >> 8 & 31, given & 31
        low = lane & segment
        high = low | (most & ~segment)
        source = {"up": lane - step, "down": lane + step, "bfly": lane ^ step, "idx": low | (step & ~segment & 31)}[
            mode
        ]
        inside = source >= high if mode == "up" else source <= high
        put(r, target, r[a].view("u4")[thread - lane + np.where(inside, source, lane)], mask)
        if flag >= 0:
            put(r, flag, inside, mask)

    return run


def all_of_a_warp(members: np.ndarray, mask: Any, op: str) -> None:
    own = members.view("u4") == 2**32 - 1
    if not (own if mask is None else own[mask]).all():
        raise Fault("an exchange of a part of a warp", f"{op}: this executor takes whole ones")


REDUCE = {"add": np.add.reduce, "min": np.minimum.reduce, "max": np.maximum.reduce, "and": np.bitwise_and.reduce}
REDUCE |= {"or": np.bitwise_or.reduce, "xor": np.bitwise_xor.reduce}


def _redux(builder: Any, words: list[str], operands: tuple[Any, ...]) -> Run:
    kind, reduce = DTYPES[words[-1]], REDUCE[words[2]]
    to, a, members = builder.to(operands[0]), builder.of(operands[1], 4), builder.of(operands[2], 4)

    def run(block: Any, r: list[Any], mask: Any) -> None:
        whole_warps(block, mask, "redux")
        all_of_a_warp(r[members], mask, "redux")
        found = reduce(r[a].view(kind).reshape(-1, 32), 1, dtype=kind)
        put(r, to, np.repeat(found, 32), mask)

    return run


def _atom(builder: Any, words: list[str], operands: tuple[Any, ...]) -> Run:
    if words[1] != "add" or _space(words) != "global":
        raise Unsupported("an atomic")
    kind, to, where = DTYPES[words[-1]], builder.to(operands[0]), locate(builder, operands[1], 8)
    a = builder.of(operands[2], kind.itemsize)

    def run(block: Any, r: list[Any], mask: Any) -> None:
        chosen = slice(None) if mask is None else mask
        found = block.tensors.add(where(r)[chosen], r[a].view(kind)[chosen])
        put(r, to, _spread(found, mask, block.threads), mask)

    return run


def _trap(builder: Any, words: list[str], operands: tuple[Any, ...]) -> Run:
    def run(block: Any, r: list[Any], mask: Any) -> None:
        raise Fault("trap")

    return run


def _nothing(builder: Any, words: list[str], operands: tuple[Any, ...]) -> Run:
    """Order among one warp's own accesses, which lockstep has."""
    return lambda block, r, mask: None


def _cvta(builder: Any, words: list[str], operands: tuple[Any, ...]) -> Run:
    if words[1:3] not in (["to", "global"], ["global", "u64"]):
        raise Unsupported("a space")
    return _mov(builder, ["mov", "b64"], operands)


TABLE: dict[str, Callable[..., Run]] = {
    "mov": _mov, "selp": _selp, "ld": _ld, "st": _st, "cp": _cp, "shfl": _shfl, "redux": _redux, "atom": _atom,
    "trap": _trap, "bar": _nothing, "nop": _nothing, "membar": _nothing, "cvta": _cvta,
}  # fmt: skip
