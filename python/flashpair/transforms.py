"""A user's own transform phi(t) of `Reduction`, beside the built-in ones."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from .reduction import BUILT_IN, TRANSFORMS


class Custom(NamedTuple):
    dense: Callable[..., Tensor]
    value: Any
    slope: Any
    apart: bool  # dense takes scale * z and the offset apart

    def of_pairs(self, s: Tensor, own: Tensor | float) -> Tensor:
        return self.dense(s, own) if self.apart else self.dense(s + own)


_custom: dict[str, Custom] = {}


def custom(name: str) -> Custom:
    return _custom[name]


def register_transform(name: str, dense: Callable[[Tensor], Tensor], *, value: Any = None, slope: Any = None) -> None:
    """Makes ``Reduction("sum", side, name)`` mean the sum of phi(t) over a row's pairs, t = scale * z + offset.

    Args:
        name: a word of your own. Registering it again replaces it.
        dense: phi of a tensor of any shape and dtype, elementwise and differentiable; the reference implementation,
            and second derivatives, run it.
        value, slope: phi and phi' as functions of a block t of float32 or float64, both decorated with
            ``triton.jit``; they are compiled into the kernels of ``impl="fused"`` (and ``"tiled"`` on a GPU), exactly
            as the built-in ones of ``flashpair.kernels.transforms``. Without them those refuse; the C++ kernels of
            ``"tiled"`` on the CPU know the built-in transforms only, and ``impl="auto"`` takes the reference there.

    Raises:
        TypeError, ValueError: a name that is not a word or is built in, or one of `value` and `slope` alone.
    """
    if not isinstance(name, str) or not name.isidentifier():
        raise TypeError(f"name must be a word, got {name!r}")
    if name in BUILT_IN:
        raise ValueError(f"name {name!r} is a built-in transform")
    if not callable(dense):
        raise TypeError(f"dense must be callable, got {type(dense).__name__}")
    if (value is None) != (slope is None):
        raise ValueError("value and slope go together: give both triton.jit functions, or neither")
    _register(name, Custom(dense, value, slope, _takes_two(dense)))


def _takes_two(dense: Callable[..., Tensor]) -> bool:
    try:
        parameters = inspect.signature(dense).parameters.values()
    except (TypeError, ValueError):  # of functions that are not Python's, such as torch.exp
        return False
    return sum(p.default is p.empty and p.kind <= p.POSITIONAL_OR_KEYWORD for p in parameters) == 2


def _register(name: str, transform: Custom) -> None:
    if name not in TRANSFORMS:
        TRANSFORMS.append(name)
    _custom[name] = transform


def parametrised(name: str, dense: Callable[..., Tensor]) -> str:
    """A transform of this package's with numbers in it, registered when it first comes up under a name of its own."""
    if name not in _custom:
        _register(name, Custom(dense, None, None, _takes_two(dense)))
    return name


def obstacles(name: str, impl: str, device: str) -> list[str]:
    """Why `impl` cannot run a transform; empty if it can."""
    if name in BUILT_IN or impl == "reference":
        return []
    if impl in ("tiled", "screened") and device == "cpu":
        return [f"transform {name!r} is your own, and the C++ kernels of {impl} know {', '.join(BUILT_IN)}"]
    if _custom[name].value is None:
        return [f"transform {name!r} was registered without the triton.jit functions `value` and `slope`"]
    return []
