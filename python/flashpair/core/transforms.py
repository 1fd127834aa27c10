"""Transforms phi of `Reduction` beside the built-in ones: a user's own, and this package's with numbers in them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import expression
from .checks import what
from .reduction import BUILT_IN, TRANSFORMS


class CustomTransform:
    """A transform that is not built in.

    Args:
        dense: a function of t = scale * z + offset, or of scale * z and the offset.
        value, slope: the user's jit functions, or None.
    """

    def __init__(self, dense: Callable[..., Tensor], value: Any = None, slope: Any = None) -> None:
        self.dense, self.value, self.slope = dense, value, slope
        self.two_args = _takes_two(dense)
        self.program = expression.program(dense, self.two_args)  # its steps, or why it has none
        self.compiled: dict[str, Any] = {}  # what each backend has made of it, by the backend's name

    def of_pairs(self, s: Tensor, own: Tensor | float) -> Tensor:
        if self.two_args:
            return checked(self.dense(s, own), s)
        t = s + own
        return checked(self.dense(t), t)


def checked(result: Any, t: Tensor) -> Tensor:
    """What a transform has made of t."""
    if not isinstance(result, Tensor) or (result.shape, result.dtype, result.device) != (t.shape, t.dtype, t.device):
        raise TypeError(f"a transform must return a tensor like t, {what(t)}, got {what(result)}")
    return result


def _check_elementwise(name: str, dense: Callable[..., Tensor], two_args: bool) -> None:
    """Raises for a function that was not traced and is not elementwise, not deterministic, or changes its argument.

    It is tried on a few numbers; what it cannot do with these it may do with others.
    """
    t = torch.tensor([[-2.5, 0.3, 1.7], [0.9, -0.6, -1.1]], dtype=torch.float64, device="cpu")
    own = (torch.full_like(t, 0.4),) if two_args else ()
    try:
        with torch.no_grad():
            given = t.clone()
            whole = dense(given, *own)
            each = [dense(e.reshape(1), *(o[:1, 0] for o in own)) for e in t.clone().flatten()]
    except Exception:
        return
    if not torch.equal(given, t):
        raise ValueError(f"transform {name!r} must not change its argument in place")
    checked(whole, t)
    if not torch.allclose(whole, torch.cat(each).reshape(t.shape), rtol=1e-6, atol=1e-9, equal_nan=True):
        raise ValueError(
            f"transform {name!r} must be elementwise: on six numbers at once it returns other values than on each alone"
        )


def _takes_two(dense: Callable[..., Tensor]) -> bool:
    try:
        parameters = inspect.signature(dense).parameters.values()
    except (TypeError, ValueError):  # of functions that are not Python's, such as torch.exp
        return False
    needed = sum(p.default is p.empty and p.kind <= p.POSITIONAL_OR_KEYWORD for p in parameters)
    if needed > 2 or not any(p.kind <= p.VAR_POSITIONAL for p in parameters):
        raise TypeError(
            f"dense must be a function of t, or of scale * z and the offset, got one with {needed} arguments"
        )
    return needed == 2


_custom: dict[str, CustomTransform] = {}


def custom(name: str) -> CustomTransform:
    return _custom[name]


def register_transform(name: str, dense: Callable[..., Tensor], *, value: Any = None, slope: Any = None) -> None:
    """Makes a function phi of your own a transform: ``Reduction("sum", side, name)`` sums phi(scale z + offset).

    If `dense` uses only arithmetic, exp, expm1, log, log1p, sqrt, sigmoid, tanh, softplus, relu, abs, maximum, minimum,
    clamp, where, comparisons, detach, square and whole powers, and has at most 96 steps with its derivative, it is
    traced: the C++ kernels run the steps and Triton kernels are generated from them, so it is fused everywhere, with
    the numbers that it has when it is registered. Otherwise ``impl="auto"`` uses the reference, and other
    implementations raise.

    Args:
        name: an identifier of your own. Registering it again replaces it, except in graphs that wait for their
            backward.
        dense: phi in PyTorch, elementwise and differentiable, of a tensor t of any shape and dtype; or of two tensors,
            scale z and the offset, if they do not enter as their sum. The reference and second derivatives run it.
        value: phi as a function of a block t of float32 or float64, decorated with ``triton.jit``, to be used in
            Triton's kernels instead of generated code; with `slope`.
        slope: phi', likewise; with `value`.

    Raises:
        TypeError: `name` is not an identifier, `dense` not callable with one or two tensors or not returning a tensor
            like its argument.
        ValueError: a built-in name, one of `value` and `slope` alone, or a function that is not elementwise or changes
            its argument, as far as some numbers show.

    Examples:
        >>> flashpair.register_transform("cubed", lambda t: t * t * t)
        >>> x = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0], [-0.8, 0.6]])
        >>> labels = torch.tensor([0, 0, 1, 1])
        >>> (cubes,) = flashpair.row_reduce(x, labels, flashpair.Reduction("sum", "positives", "cubed"))
        >>> [round(value, 4) for value in cubes.tolist()]
        [0.216, 0.216, 0.216, 0.216]
    """
    if not isinstance(name, str) or not name.isidentifier():
        raise TypeError(f"name must be an identifier, got {name!r}")
    if name in BUILT_IN:
        raise ValueError(f"name {name!r} is a built-in transform")
    if not callable(dense):
        raise TypeError(f"dense must be callable, got {type(dense).__name__}")
    if (value is None) != (slope is None):
        raise ValueError("value and slope must be given together, or neither")
    transform = CustomTransform(dense, value, slope)
    if isinstance(transform.program, str):
        _check_elementwise(name, dense, transform.two_args)
    _register(name, transform)


def _register(name: str, transform: CustomTransform) -> None:
    """The newest of a name; a graph that has gone forward with an older one goes back with it."""
    if name in _custom:
        before = f"{name} {len(TRANSFORMS)}"
        TRANSFORMS[TRANSFORMS.index(name)], _custom[before] = before, _custom[name]
    TRANSFORMS.append(name)
    _custom[name] = transform


def specialised(name: str, dense: Callable[..., Tensor]) -> str:
    """A transform of this package's with numbers in it, registered when it first comes up under a name of its own."""
    if name not in _custom:
        _register(name, CustomTransform(dense))
    return name


def unsupported_reasons(name: str, impl: str, device: str) -> str:
    """Why `impl` cannot run a transform; empty if it can."""
    if name in BUILT_IN or impl == "reference":
        return ""
    own, compiled = _custom[name], impl in ("tiled", "screened") and device == "cpu"
    if own.value is not None and not compiled:
        return ""
    return f"transform {name!r} has no fused form: {own.program}" if isinstance(own.program, str) else ""


# What torch.compiler.assume_constant_result sets, as in dispatch.py: what a name means is looked at when it is traced.
unsupported_reasons._dynamo_marked_constant = True  # type: ignore[attr-defined]
