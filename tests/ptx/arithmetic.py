"""Arithmetic, logic, comparisons and conversions: each a closure over registers' slots.

What has approximate forms is in approximate.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .faults import Unsupported
from .parse import SIZES

DTYPES = {"f32": "f4", "f64": "f8", "f16": "f2", "u8": "u1", "u16": "u2", "u32": "u4", "u64": "u8"}
DTYPES |= {"s8": "i1", "s16": "i2", "s32": "i4", "s64": "i8", "b8": "u1", "b16": "u2", "b32": "u4", "b64": "u8"}
DTYPES = {name: np.dtype(kind) for name, kind in DTYPES.items()} | {"pred": np.dtype(bool)}
TINY = np.float32(2.0**-126)
Run = Callable[[Any, list[Any], Any], None]


def put(registers: list[Any], slot: int, value: np.ndarray, mask: np.ndarray | None) -> None:
    """A register's new value, in the threads of the mask."""
    if mask is not None and (old := registers[slot]) is not None:
        value = np.where(mask, value, old.view(value.dtype))
    registers[slot] = value


def flush(x: np.ndarray) -> np.ndarray:
    """Subnormal float32 become zeros of their sign."""
    small = np.abs(x) < TINY
    return np.where(small, np.copysign(np.float32(0), x), x) if small.any() else x


def round_to(x: np.ndarray, how: str) -> np.ndarray:
    """float64 to float32 as .rn, .rz or .rm says."""
    near = x.astype(np.float32)
    if how == "rn":
        return near
    over = np.abs(near) > np.abs(x) if how == "rz" else near > x
    return np.where(over, np.nextafter(near, np.float32(0) if how == "rz" else np.float32(-np.inf)), near)


def _fma(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """One rounding, but for one case in 2^29 (float32) or 2^11 (float64, where it may be off in the last bit)."""
    wide = np.float64 if a.dtype == np.float32 else np.longdouble
    return a.astype(wide) * b + c


def _wrapped(fn: Callable[..., np.ndarray], kind: np.dtype[Any], words: list[str]) -> Callable[..., np.ndarray]:
    """With what .ftz, .sat and a rounding mode ask for."""
    how = next((w for w in words if w in ("rz", "rm", "rp")), "rn")
    if how != "rn" and kind == np.float32:
        if how == "rp":
            raise Unsupported(how)
        plain = fn

        def fn(*args: np.ndarray) -> np.ndarray:
            return round_to(plain(*(a.astype(np.float64) for a in args)), how)
    elif how != "rn":
        raise Unsupported(how)
    if "ftz" in words and kind == np.float32:
        loose = fn

        def fn(*args: np.ndarray) -> np.ndarray:
            return flush(loose(*map(flush, args)).astype(np.float32))

    return fn


def plain(fn: Callable[..., Any]) -> Callable[..., Run]:
    """An instruction whose operands and result are of one type."""

    def make(builder: Any, words: list[str], operands: tuple[Any, ...]) -> Run:
        name = words[-1]
        kind = DTYPES[name]
        own = _wrapped(fn, kind, words)
        size = SIZES[name] if name != "pred" else 0
        to, slots = builder.to(operands[0]), [builder.of(o, size) for o in operands[1:]]
        if len(slots) == 2:
            a, b = slots

            def run(block: Any, r: list[Any], mask: Any) -> None:
                put(r, to, own(r[a].view(kind), r[b].view(kind)), mask)
        else:

            def run(block: Any, r: list[Any], mask: Any) -> None:
                put(r, to, own(*(r[s].view(kind) for s in slots)).astype(kind, copy=False), mask)

        return run

    return make


def _halves(fn: Callable[..., Run]) -> Callable[..., Run]:
    """16-bit floats, one or two a register, through float32, which holds them; abs, min and max round nothing."""

    def make(builder: Any, words: list[str], operands: tuple[Any, ...]) -> Run:
        name = words[-1].removesuffix("x2")
        if name not in ("bf16", "f16"):
            return fn(builder, words, operands)
        size, narrow = (4 if words[-1].endswith("x2") else 2), _bf16 if name == "bf16" else _f16
        to, slots = builder.to(operands[0]), [builder.of(o, size) for o in operands[1:]]
        own, read = {"abs": np.abs, "max": np.fmax, "min": np.fmin}[words[0]], _reader(name, 2)
        if len(words) > 2:
            raise Unsupported("a form of it")

        def run(block: Any, r: list[Any], mask: Any) -> None:
            wide = own(*(read(r[s].view("u2")) for s in slots))
            put(r, to, narrow(wide).view(f"u{size}"), mask)

        return run

    return make


def divide(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    if a.dtype.kind == "f":
        return a / b
    some = np.where(b == 0, b.dtype.type(1), b)
    if a.dtype.kind == "u":
        return np.where(b == 0, ~b, a // some)
    quotient = np.abs(a.astype(np.int64)) // np.abs(some.astype(np.int64))
    return np.where((a < 0) != (b < 0), -quotient, quotient).astype(a.dtype)


def _mad(builder: Any, words: list[str], operands: tuple[Any, ...]) -> Run:
    kind, size, wide = DTYPES[words[-1]], SIZES[words[-1]], words[1] == "wide"
    if words[1] not in ("wide", "lo"):
        raise Unsupported(words[1])
    result = np.dtype(f"{kind.kind}{2 * size}") if wide else kind
    to, a, b = builder.to(operands[0]), builder.of(operands[1], size), builder.of(operands[2], size)
    c = builder.of(operands[3], result.itemsize) if words[0] == "mad" else -1

    def run(block: Any, r: list[Any], mask: Any) -> None:
        found = r[a].view(kind).astype(result, copy=False) * r[b].view(kind)
        put(r, to, found if c < 0 else found + r[c].view(result), mask)

    return run


def _shift(builder: Any, words: list[str], operands: tuple[Any, ...]) -> Run:
    kind, size = DTYPES[words[-1]], SIZES[words[-1]]
    to, a, b = builder.to(operands[0]), builder.of(operands[1], size), builder.of(operands[2], 4)
    left, bits = words[0] == "shl", 8 * size

    def run(block: Any, r: list[Any], mask: Any) -> None:
        value, by = r[a].view(kind), r[b].view("u4")
        far = by >= bits
        shift = np.minimum(by, bits - 1).astype(kind)
        found = value << shift if left else value >> shift
        if far.any() and (left or kind.kind == "u"):
            found = np.where(far, kind.type(0), found)
        put(r, to, found, mask)

    return run


def _bfe(builder: Any, words: list[str], operands: tuple[Any, ...]) -> Run:
    kind, size = DTYPES[words[-1]], SIZES[words[-1]]
    to, a = builder.to(operands[0]), builder.of(operands[1], size)
    at, length = builder.constant(operands[2], 4), builder.constant(operands[3], 4)
    up = 8 * size - at - length
    if up < 0:
        raise Unsupported("bits beyond the register")

    def run(block: Any, r: list[Any], mask: Any) -> None:
        put(r, to, r[a].view(kind) << kind.type(up) >> kind.type(up + at), mask)

    return run


def _bfi(builder: Any, words: list[str], operands: tuple[Any, ...]) -> Run:
    kind, size = DTYPES[words[-1]], SIZES[words[-1]]
    to, a, b = builder.to(operands[0]), builder.of(operands[1], size), builder.of(operands[2], size)
    at, length = builder.constant(operands[3], 4), builder.constant(operands[4], 4)
    field = kind.type((2**length - 1) << at)

    def run(block: Any, r: list[Any], mask: Any) -> None:
        put(r, to, (r[a].view(kind) << kind.type(at)) & field | r[b].view(kind) & ~field, mask)

    return run


def _prmt(builder: Any, words: list[str], operands: tuple[Any, ...]) -> Run:
    to, a, b = builder.to(operands[0]), builder.of(operands[1], 4), builder.of(operands[2], 4)
    chosen = builder.constant(operands[3], 4)
    picks = [chosen >> 4 * k & 15 for k in range(4)]
    if words != ["prmt", "b32"] or any(p & 8 for p in picks):
        raise Unsupported("a mode of prmt")

    def run(block: Any, r: list[Any], mask: Any) -> None:
        both = np.concatenate([r[a].view("u1").reshape(-1, 4), r[b].view("u1").reshape(-1, 4)], 1)
        put(r, to, np.ascontiguousarray(both[:, picks]).view("u4")[:, 0], mask)

    return run


def _cut(a: np.ndarray) -> np.ndarray:
    return np.clip(np.where(np.isnan(a), 0, a), 0, 1)


COMPARE: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "nan": lambda a, b: np.isnan(a) | np.isnan(b), "num": lambda a, b: ~(np.isnan(a) | np.isnan(b)),
    "equ": lambda a, b: ~((a < b) | (a > b)), "neu": np.not_equal, "ltu": lambda a, b: ~(a >= b),
    "leu": lambda a, b: ~(a > b), "gtu": lambda a, b: ~(a <= b), "geu": lambda a, b: ~(a < b),
}  # fmt: skip


def _setp(builder: Any, words: list[str], operands: tuple[Any, ...]) -> Run:
    kind, size, compare = DTYPES[words[-1]], SIZES[words[-1]], COMPARE[words[1]]
    if len(words) != 3:
        raise Unsupported("a form of setp")
    ordered = words[1] == "ne" and kind.kind == "f"
    to, a, b = builder.to(operands[0]), builder.of(operands[1], size), builder.of(operands[2], size)

    def run(block: Any, r: list[Any], mask: Any) -> None:
        x, y = r[a].view(kind), r[b].view(kind)
        found = compare(x, y)
        if ordered:  # of NaN only the unordered comparison holds
            found &= (x == x) & (y == y)
        put(r, to, found, mask)

    return run


def _cvt(builder: Any, words: list[str], operands: tuple[Any, ...]) -> Run:
    """cvt{.rounding}{.ftz}{.sat}.to.from, and the one that packs two."""
    to_name, from_name = words[-2:]
    to = builder.to(operands[0])
    if to_name in ("bf16x2", "f16x2"):
        high, low = (builder.of(o, 4) for o in operands[1:])
        narrow = _bf16 if to_name == "bf16x2" else _f16

        def pack(block: Any, r: list[Any], mask: Any) -> None:
            both = narrow(r[high].view("f4")).astype("u4") << np.uint32(16) | narrow(r[low].view("f4"))
            put(r, to, both, mask)

        return pack
    held = builder.bits(operands[1])
    a, target = builder.of(operands[1], held), builder.bits(operands[0])
    read = _reader(from_name, held)
    how = next((w for w in words if w in ("rn", "rz", "rni", "rzi", "rmi", "rpi")), "")
    whole = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}.get(how)
    ftz, sat = "ftz" in words, "sat" in words
    if how == "rz" or ("relu" in words) or (sat and to_name != "f32"):
        raise Unsupported("a rounding")

    def run(block: Any, r: list[Any], mask: Any) -> None:
        x = read(r[a])
        if ftz:
            x = flush(x)
        if whole is not None:
            x = whole(x)
        if sat:
            x = _cut(x)
        put(r, to, _narrow(x, to_name, target), mask)

    return run


def _bf16(x: np.ndarray) -> np.ndarray:
    """float32 to bfloat16's bits, to nearest even."""
    bits = x.astype("f4").view("u4")
    near = (bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(x), np.uint32(0x7FFF), near).astype("u2")


def _f16(x: np.ndarray) -> np.ndarray:
    return x.astype("f2").view("u2")


def _reader(name: str, held: int) -> Callable[[np.ndarray], np.ndarray]:
    if name == "bf16":
        return lambda a: (a.view("u2").astype("u4") << np.uint32(16)).view("f4")
    kind = DTYPES[name]
    if kind.itemsize == held:
        return lambda a: a.view(kind).astype("f4") if name == "f16" else a.view(kind)
    unsigned = np.dtype(f"u{kind.itemsize}")
    return lambda a: a.view(f"u{held}").astype(unsigned).view(kind)


def _narrow(x: np.ndarray, name: str, target: int) -> np.ndarray:
    if name in ("bf16", "f16"):
        return _bf16(x) if name == "bf16" else _f16(x)
    kind = DTYPES[name]
    if kind.kind in "iu" and x.dtype.kind == "f":
        info = np.iinfo(kind)
        x = np.where(np.isnan(x), 0, x)
        cut = np.clip(x, float(info.min), float(info.max)).astype(kind)
        return np.where(x >= float(info.max), info.max, cut).astype(kind)
    found = x.astype(kind)
    return found if kind.itemsize == target else found.astype(f"{kind.kind}{target}")  # a wider register, extended


TABLE: dict[str, Callable[..., Run]] = {
    "add": plain(np.add), "sub": plain(np.subtract), "neg": plain(np.negative), "abs": _halves(plain(np.abs)),
    "fma": plain(_fma), "and": plain(np.bitwise_and), "or": plain(np.bitwise_or), "xor": plain(np.bitwise_xor),
    "not": plain(np.invert), "popc": plain(np.bitwise_count), "rem": plain(np.fmod), "shl": _shift, "shr": _shift,
    "mad": _mad, "bfe": _bfe, "bfi": _bfi, "prmt": _prmt, "setp": _setp, "cvt": _cvt,
}  # fmt: skip


def _product(builder: Any, words: list[str], operands: tuple[Any, ...]) -> Run:
    return (plain(np.multiply) if words[-1].startswith("f") else _mad)(builder, words, operands)


def _extreme(least: np.ufunc, spread: np.ufunc) -> Callable[..., Run]:
    """min and max: the number of a number and a NaN, unless .NaN asks for the NaN; .relu cuts at zero."""

    def make(builder: Any, words: list[str], operands: tuple[Any, ...]) -> Run:
        fn = spread if "NaN" in words else least
        if "relu" not in words:
            return _halves(plain(fn))(builder, words, operands)
        return plain(lambda a, b: np.maximum(fn(a, b), a.dtype.type(0)))(builder, words, operands)

    return make


TABLE |= {"mul": _product, "max": _extreme(np.fmax, np.maximum), "min": _extreme(np.fmin, np.minimum)}
