"""Instructions whose results NVIDIA bounds and does not fix, each as wrong as its bound lets it be.

The bounds are those of the PTX ISA 9.1, chapter 9.7.3, by section; `LIMITS` has them. A result is drawn from all that
is within its bound, by the bits of its operands: what passes here passes with any hardware that keeps its word. An
error in ulp is one from the correctly rounded result. Infinities, NaN, zeros and what the ISA's tables of special
operands fix are as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from .arithmetic import Run, divide, plain
from .faults import Unsupported


class Limit(NamedTuple):
    """The most that a float32 result may be off: steps from the correctly rounded one, or a share of the exact one."""

    ulp: int = 0
    relative: float = 0.0
    absolute: float = 0.0  # instead, where the operand is in (0.5, 2)


LIMITS = {
    "div.approx": Limit(ulp=2),  # 9.7.3.8: for |b| in [2^-126, 2^126]; beyond that the result is zero
    "div.full": Limit(ulp=2),  # 9.7.3.8: "across the full range of inputs"
    "rcp.approx": Limit(ulp=1),  # 9.7.3.13: "across the full range of inputs"
    "sqrt.approx": Limit(relative=2.0**-23),  # 9.7.3.15: "over the entire positive finite floating-point range"
    "rsqrt.approx": Limit(relative=2.0**-22.9),  # 9.7.3.16: likewise
    "lg2.approx": Limit(relative=2.0**-22, absolute=2.0**-22),  # 9.7.3.20: absolute in (0.5, 2), relative outside
    "ex2.approx": Limit(ulp=2),  # 9.7.3.21: "from correctly rounded result across the full range of inputs"
}
EXACT: dict[str, Callable[..., np.ndarray]] = {
    "div": divide, "rcp": lambda a: 1 / a, "sqrt": np.sqrt, "rsqrt": lambda a: 1 / np.sqrt(a), "lg2": np.log2,
    "ex2": np.exp2,
}  # fmt: skip


def drawn(args: tuple[np.ndarray, ...]) -> np.ndarray:
    """Numbers in [-1, 1], the ends among them, by the operands' bits."""
    seed = np.zeros(args[0].shape, np.uint64)
    for a in args:
        seed = (seed ^ np.ascontiguousarray(a).view(f"u{a.dtype.itemsize}")) * np.uint64(0x9E3779B97F4A7C15)
        seed ^= seed >> np.uint64(29)
    even = (seed * np.uint64(0xBF58476D1CE4E5B9) >> np.uint64(40)).astype(np.float64) / 2.0**23 - 1
    return np.clip(1.25 * even, -1, 1)


def reach(exact: np.ndarray, args: tuple[np.ndarray, ...], limit: Limit) -> tuple[np.ndarray, np.ndarray]:
    """The middle of what float64 `exact` may become in float32, and how far that reaches to both sides."""
    if limit.ulp:
        near = exact.astype(np.float32)
        step = np.abs(near.astype(np.float64) - np.nextafter(near, np.float32(0)))
        return near.astype(np.float64), limit.ulp * step
    far = limit.relative * np.abs(exact)
    if limit.absolute:
        far = np.where((args[0] > 0.5) & (args[0] < 2), limit.absolute, far)
    return exact, far


def off(exact: np.ndarray, args: tuple[np.ndarray, ...], limit: Limit) -> np.ndarray:
    """A float32 within the limit of float64 `exact`."""
    near = exact.astype(np.float32)
    middle, far = reach(exact, args, limit)
    found = (middle + drawn(args) * far).astype(np.float32)
    for _ in range(2):  # rounding may have gone past the limit
        over = np.abs(found.astype(np.float64) - middle) > far
        found = np.where(over, np.nextafter(found, near), found)
    fixed = ~np.isfinite(found) | (far == 0) | (args[-1] == 0)
    for a in args:
        fixed |= ~np.isfinite(a)
    return np.where(fixed, near, found)


def _float32(name: str) -> Callable[..., np.ndarray]:
    exact, limit = EXACT[name.partition(".")[0]], LIMITS[name]

    def fn(*args: np.ndarray) -> np.ndarray:
        found = off(exact(*(a.astype(np.float64) for a in args)), args, limit)
        if name == "div.approx":
            a, b = args
            lost = np.where(np.isinf(a), np.float32(np.nan), np.copysign(np.float32(0), found))
            found = np.where((np.abs(b) > 2.0**126) & np.isfinite(b) & ~np.isnan(a), lost, found)
        return found

    return fn


def reciprocal64(a: np.ndarray) -> np.ndarray:
    """rcp.approx.ftz.f64 (9.7.3.14): of the upper word of its operand, and only an upper word.

    The ISA bounds no error. Here it is up to a unit of the 20 bits that are left of the mantissa.
    """
    upper = np.uint64(0xFFFFFFFF00000000)
    cut = (np.ascontiguousarray(a).view(np.uint64) & upper).view(np.float64)
    small = np.float64(2.0**-1022)
    cut = np.where(np.abs(cut) < small, np.copysign(0.0, cut), cut)
    exact = 1 / cut
    moved = np.where(np.isfinite(exact) & (exact != 0), exact * (1 + drawn((a,)) * 2.0**-20), exact)
    found = (np.ascontiguousarray(moved).view(np.uint64) & upper).view(np.float64)
    return np.where(np.isnan(exact), exact, np.where(np.abs(found) < small, np.copysign(0.0, found), found))


def _made(builder: Any, words: list[str], operands: tuple[Any, ...]) -> Run:
    """An exact form (.rn) by arithmetic.py's, an approximate one (.approx, .full) by its limit."""
    how = next((w for w in words if w in ("approx", "full")), "")
    if not how:
        return plain(EXACT[words[0]])(builder, words, operands)
    if words == ["rcp", "approx", "ftz", "f64"]:
        return plain(reciprocal64)(builder, words, operands)
    name = f"{words[0]}.{how}"
    if words[-1] != "f32" or name not in LIMITS:
        raise Unsupported("an approximation")
    return plain(_float32(name))(builder, words, operands)


TABLE = {name: _made for name in EXACT}
