"""Formats times and sizes. 1 GB is 10^9 bytes."""

from __future__ import annotations

Steps = tuple[tuple[float, str], ...]
TIMES: Steps = ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs"))
SIZES: Steps = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1.0, "B"))


def _step(value: float, steps: Steps) -> tuple[float, str]:
    return next((step for step in steps if value >= step[0] * 0.9995), steps[-1])


def _digits(value: float) -> str:
    text = f"{value:,.{0 if value >= 99.95 else 1 if value >= 9.995 else 2}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def duration(seconds: float) -> str:
    scale, unit = _step(seconds, TIMES)
    return f"{_digits(seconds / scale)} {unit}"


def span(low: float, high: float) -> str:
    """Two durations in one unit."""
    scale, unit = _step(high, TIMES)
    return f"{_digits(low / scale)} to {_digits(high / scale)} {unit}"


def size(count: float) -> str:
    scale, unit = _step(count, SIZES)
    return f"{_digits(count / scale)} {unit}"
