"""What several metrics take: one number, or some."""

from __future__ import annotations

from collections.abc import Iterable
from numbers import Real
from typing import Any

from torch import Tensor

from ..core import checks


def several(value: Any, name: str, kind: str) -> list[Any]:
    """Of one number a list of it, of some theirs, which the caller checks.

    Raises:
        TypeError: neither. kind: what it takes, for the error: "ints" or "numbers".
    """
    if isinstance(value, Real):
        return [value]
    if isinstance(value, (str, bytes, dict, Tensor)) or not isinstance(value, Iterable):
        raise TypeError(f"{name} must be a sequence of {kind}, or one, got {checks.what(value)}")
    return list(value)
