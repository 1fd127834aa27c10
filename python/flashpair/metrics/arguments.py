"""Arguments of several metrics that may be one number or a sequence of numbers."""

from __future__ import annotations

from collections.abc import Iterable
from numbers import Real
from typing import Any

from torch import Tensor

from ..core import checks


def several(value: Any, name: str, kind: str) -> list[Any]:
    """One number as a list of one, a sequence as a list. The caller checks the numbers.

    Raises:
        TypeError: `value` is neither. The error names `kind`, "ints" or "numbers".
    """
    if isinstance(value, Real):
        return [value]
    if isinstance(value, (str, bytes, dict, Tensor)) or not isinstance(value, Iterable):
        raise TypeError(f"{name} must be a sequence of {kind}, or one, got {checks.what(value)}")
    return list(value)
