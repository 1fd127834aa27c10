"""Transforms phi that are not built in: those of users, and this package's own that contain hyper-parameters."""

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
        value: the user's Triton function that computes phi, or None.
        slope: the user's Triton function that computes phi', or None.
    """

    def __init__(self, dense: Callable[..., Tensor], value: Any = None, slope: Any = None) -> None:
        self.dense, self.value, self.slope = dense, value, slope
        self.two_args = _takes_two(dense)
        self.program = expression.program(dense, self.two_args)  # its steps, or the reason why it has none
        self.compiled: dict[str, Any] = {}  # its compiled form, by the name of the backend

    def of_pairs(self, s: Tensor, offset: Tensor | float) -> Tensor:
        """phi (N, M) of s = scale * z (N, M) and of an offset, a number or a tensor () or (N, 1)."""
        if self.two_args:
            return checked(self.dense(s, offset), s)
        t = s + offset
        return checked(self.dense(t), t)


def checked(result: Any, t: Tensor) -> Tensor:
    """`result`, which a transform has returned for a tensor t. It must have the shape, dtype and device of t."""
    if not isinstance(result, Tensor) or (result.shape, result.dtype, result.device) != (t.shape, t.dtype, t.device):
        raise TypeError(f"a transform must return a tensor like t, {what(t)}, got {what(result)}")
    return result


def _check_elementwise(name: str, dense: Callable[..., Tensor], two_args: bool) -> None:
    """Raises for a function that is not elementwise, not deterministic, or changes its argument in place.

    The function is tried on six numbers. If it fails on these, nothing is checked, since it may work on others.
    """
    t = torch.tensor([[-2.5, 0.3, 1.7], [0.9, -0.6, -1.1]], dtype=torch.float64, device="cpu")
    offset = (torch.full_like(t, 0.4),) if two_args else ()
    try:
        with torch.no_grad():
            argument = t.clone()
            together = dense(argument, *offset)
            each = [dense(e.reshape(1), *(o[:1, 0] for o in offset)) for e in t.clone().flatten()]
    except Exception:
        return
    if not torch.equal(argument, t):
        raise ValueError(f"transform {name!r} must not change its argument in place")
    checked(together, t)
    if not torch.allclose(together, torch.cat(each).reshape(t.shape), rtol=1e-6, atol=1e-9, equal_nan=True):
        raise ValueError(
            f"transform {name!r} must be elementwise: on six numbers at once it returns other values than on each alone"
        )


def _takes_two(dense: Callable[..., Tensor]) -> bool:
    """Whether a function needs two arguments, not one."""
    try:
        parameters = inspect.signature(dense).parameters.values()
    except (TypeError, ValueError):  # functions written in C, such as torch.exp, have no signature
        return False
    needed = sum(p.default is p.empty and p.kind <= p.POSITIONAL_OR_KEYWORD for p in parameters)
    if needed > 2 or not any(p.kind <= p.VAR_POSITIONAL for p in parameters):
        raise TypeError(
            f"dense must be a function of t, or of scale * z and the offset, got one with {needed} arguments"
        )
    return needed == 2


_custom: dict[str, CustomTransform] = {}


def custom(name: str) -> CustomTransform:
    """The transform registered under a name."""
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
    """Makes `transform` the one of that name.

    An older one of that name keeps its number under another name, since a graph that used it may still run backward.
    """
    if name in _custom:
        before = f"{name} {len(TRANSFORMS)}"
        TRANSFORMS[TRANSFORMS.index(name)], _custom[before] = before, _custom[name]
    TRANSFORMS.append(name)
    _custom[name] = transform


def specialised(name: str, dense: Callable[..., Tensor]) -> str:
    """Registers a transform of this package at its first use, and returns its name, which contains its numbers."""
    if name not in _custom:
        _register(name, CustomTransform(dense))
    return name


def unsupported_reasons(name: str, impl: str, device: str) -> str:
    """Why the implementation `impl` cannot run a transform on a type of device; empty if it can."""
    if name in BUILT_IN or impl == "reference":
        return ""
    transform, on_cpu = _custom[name], impl in ("tiled", "screened") and device == "cpu"
    if transform.value is not None and not on_cpu:
        return ""
    return f"transform {name!r} has no fused form: {transform.program}" if isinstance(transform.program, str) else ""


# As torch.compiler.assume_constant_result does (see dispatch.py): tracing looks up the transform of a name once.
unsupported_reasons._dynamo_marked_constant = True  # type: ignore[attr-defined]
