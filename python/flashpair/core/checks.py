"""Checks of arguments, before any work. An error names the argument, what it takes and what it got.

No check reads a GPU's values.
"""

from __future__ import annotations

import functools
import numbers
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32)
SHOWN = 60  # characters of a value that an error shows


class Labelled:
    """Embeddings that bring their labels with them (References)."""

    embeddings: Tensor
    labels: Tensor


def what(value: Any) -> str:
    """The value in a few words of one line: a tensor's dtype, shape and device, an array's, what a list holds."""
    if isinstance(value, Tensor):
        layout = "" if value.layout == torch.strided else f" {str(value.layout).removeprefix('torch.')}"
        shape = "nested" if value.is_nested else tuple(value.shape)
        return f"{str(value.dtype).removeprefix('torch.')}{layout} {shape} on {value.device}"
    kind = type(value).__name__
    if hasattr(value, "dtype") and hasattr(value, "shape"):
        return (
            f"{type(value).__module__.partition('.')[0]} {kind} of dtype {value.dtype} and shape {tuple(value.shape)}"
        )
    if isinstance(value, (list, tuple)) and value:
        return f"{kind} of {len(value)}, the first of them {what(value[0])}"
    shown = " ".join(repr(value).split())
    return f"{kind} {shown if len(shown) <= SHOWN else shown[:SHOWN] + '...'}"


NUMBERED = "numpy.unique(values, return_inverse=True)[1] has a number for each"


def to_tensor(value: Any) -> str:
    """How to make a tensor of what is none, as the end of an error; empty where it takes more words."""
    if isinstance(value, Tensor):
        return ""
    dtype, first = getattr(value, "dtype", None), value[0] if isinstance(value, (list, tuple)) and value else None
    if isinstance(first, str) or getattr(dtype, "kind", "") in ("U", "S", "T"):
        return f"; number what is text first: {NUMBERED}"
    if getattr(dtype, "kind", "") == "O":
        return f"; what is numbers is one array after values.astype(int) or (float), and of text {NUMBERED}"
    if isinstance(first, Tensor):
        alike = all(isinstance(t, Tensor) and (t.shape, t.dtype) == (first.shape, first.dtype) for t in value)
        return "; torch.stack makes one of them" if alike else "; a loader's batch comes apart into its tensors first"
    if getattr(dtype, "isnative", True) is False:
        return "; torch.from_numpy takes it in this machine's byte order: array.astype(array.dtype.newbyteorder('='))"
    if hasattr(value, "to_numpy"):
        return "; torch.tensor(values.to_numpy()) makes a tensor of it"
    if hasattr(first, "__array__"):
        return "; torch.as_tensor(numpy.stack(values)) makes a tensor of them"
    return "; torch.as_tensor makes a tensor of it" if dtype is not None or first is not None else ""


def memory(value: Tensor, name: str) -> Tensor:
    """`value` in ordinary memory: not sparse, not nested, and without a sign that torch keeps beside it. Of a tensor of
    inference mode, which autograd may not keep, a copy where gradients are on."""
    if value.layout != torch.strided or value.is_nested:
        raise TypeError(f"{name} must be a dense tensor, got {what(value)}")
    if torch.compiler.is_compiling():
        return value
    value = value.resolve_neg()
    return value.clone() if value.is_inference() and torch.is_grad_enabled() else value


def like(value: Tensor, of: Tensor, name: str, whose: str = "embeddings") -> None:
    """A tensor on the device of `of`; a number on the CPU goes with every device, as in PyTorch."""
    if value.device != of.device and (value.dim() or value.device.type != "cpu"):
        raise ValueError(f"{name} must be on the device of {whose}, {of.device}, got {what(value)}")


def parameters(module: Any, x: Tensor) -> None:
    """A criterion's own parameters, buffers and learned hyper-parameters, on the device of the embeddings `x`."""
    for name, value in (*module._parameters.items(), *module._buffers.items()):
        if value is not None and value.device != x.device:
            like(value, x, f"{type(module).__name__}.{name}")
    for name in module.shown:
        value = module.__dict__.get(name)
        if isinstance(value, Tensor):
            like(value, x, f"{type(module).__name__}.{name}")


def embeddings(value: Any, name: str = "embeddings", letters: str = "N, D") -> Tensor:
    """A float16, bfloat16, float32 or float64 tensor of shape (N, D), D > 0."""
    if not isinstance(value, Tensor) or value.dtype not in FLOATS:
        raise TypeError(
            f"{name} must be a float16, bfloat16, float32 or float64 tensor of shape ({letters}), "
            f"got {what(value)}{to_tensor(value)}{_swapped(value)}"
        )
    value = memory(value, name)
    if value.dim() != 2 or value.shape[1] == 0:
        raise ValueError(f"{name} must have shape ({letters}) with D > 0, got {what(value)}")
    return value


def _swapped(value: Any) -> str:
    of_labels = isinstance(value, Tensor) and value.dim() == 1 and value.dtype in INTEGERS
    return "; embeddings come first, then labels" if of_labels else ""


def labels_dtype(value: Any, name: str = "labels", length: str = "N") -> Tensor:
    """An integer tensor of any shape."""
    if not isinstance(value, Tensor) or value.dtype not in INTEGERS:
        hint = to_tensor(value)
        if isinstance(value, Tensor):
            hint = f"; {name}.to(torch.int64), where they are whole numbers"
        raise TypeError(f"{name} must be an integer tensor of shape ({length},), got {what(value)}{hint}")
    return memory(value, name)


def labels(value: Any, of: Tensor, name: str = "labels", length: str = "N", whose: str = "embeddings") -> Tensor:
    """An integer tensor of one entry a row of `of`, on its device; returned as int64, which has no room for uint64."""
    value = labels_dtype(value, name, length)
    if value.dim() != 1 or value.shape[0] != of.shape[0]:
        column = f"; {name}.squeeze(1)" if value.shape == (of.shape[0], 1) else ""
        raise ValueError(
            f"{name} must have shape ({length},) = ({of.shape[0]},) like {whose}, got {what(value)}{column}"
        )
    if value.device != of.device:
        raise ValueError(f"{name} must be on the device of {whose}, {of.device}, got {what(value)}")
    return value.to(torch.int64)


def batch(x: Any, x_labels: Any, y: Any, y_labels: Any) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """The four arguments of every criterion's call: embeddings, labels, ref_emb, ref_labels."""
    x = embeddings(x)
    x_labels = labels(x_labels, x)
    if isinstance(y, Labelled):
        if y_labels is not None:
            raise ValueError("ref_labels must be None with References as ref_emb, which have labels")
        y, y_labels = y.embeddings, y.labels
    if (y is None) != (y_labels is None):
        given, missing = ("ref_emb", "ref_labels") if y_labels is None else ("ref_labels", "ref_emb")
        raise ValueError(f"{missing} must be given with {given}, got None")
    if y is None:
        return x, x_labels, None, None
    y = references(y, x)
    return x, x_labels, y, labels(y_labels, y, "ref_labels", "M", "ref_emb")


def references(y: Any, x: Tensor) -> Tensor:
    """Embeddings (M, D) of the width of `x` (N, D), and on its device."""
    y = embeddings(y, "ref_emb", "M, D")
    if y.shape[1] != x.shape[1]:
        raise ValueError(f"ref_emb must have the width of embeddings, D = {x.shape[1]}, got {what(y)}")
    if y.device != x.device:
        raise ValueError(f"ref_emb must be on the device of embeddings, {x.device}, got {what(y)}")
    return y


def word(value: Any, words: Iterable[str], name: str) -> str:
    words = tuple(words)
    if value not in words:
        raise ValueError(f"{name} must be one of {', '.join(words)}, got {value!r}")
    return value


def number(value: Any, name: str, *, above: float | None = None, at_least: float | None = None) -> float | Tensor:
    """A finite real number in range, or a floating-point tensor () (a learnable one), whose value is not looked at."""
    if isinstance(value, Tensor):
        if value.dim() != 0 or not value.dtype.is_floating_point:
            raise ValueError(f"{name} must be a number or a floating-point tensor of shape (), got {what(value)}")
        return value
    if isinstance(value, bool) or not isinstance(value, (int, float, numbers.Real)):  # NumPy's are of the last
        raise TypeError(f"{name} must be a number or a floating-point tensor of shape (), got {what(value)}")
    try:
        value = float(value)
    except OverflowError:
        value = float("inf")
    low = "" if above is None else f" above {above:g}"
    low = low if at_least is None else f" of at least {at_least:g}"
    in_range = (above is None or value > above) and (at_least is None or value >= at_least)
    if not in_range or value != value or value in (float("inf"), float("-inf")):
        raise ValueError(f"{name} must be a finite number{low}, got {value!r}")
    return value


def constant(value: Any, name: str, *, at_least: float) -> float:
    """A finite number that only selects pairs, and so has no gradient to learn it by."""
    if isinstance(value, Tensor):
        raise TypeError(f"{name} must be a number (selection has no gradient), got {what(value)}")
    result = number(value, name, at_least=at_least)
    assert isinstance(result, float)
    return result


def plain_number(value: Any, name: str, *, above: float | None = None, at_least: float | None = None) -> float:
    """A finite number, not a tensor."""
    if isinstance(value, Tensor):
        raise TypeError(f"{name} must be a number, got {what(value)}")
    result = number(value, name, above=above, at_least=at_least)
    assert isinstance(result, float)
    return result


def flag(value: Any, name: str) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be a bool, got {what(value)}")
    return value


def renamed(who: str, old: str, value: Any, new: str, current: Any) -> Any:
    """An argument's value, where its old name still works: that of the old name, with a warning, if it was given."""
    if value is None:
        return current
    words = f"{who}: {old}= is now called {new}=, and its old name goes in the release after this one"
    warnings.warn(words, DeprecationWarning, stacklevel=3)
    return value


def integer(value: Any, name: str, among: Iterable[int] | None = None, *, at_least: int = 0) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, numbers.Integral)):
        raise TypeError(f"{name} must be an int, got {what(value)}")
    value = int(value)
    if among is not None and value not in (among := tuple(among)):
        raise ValueError(f"{name} must be one of {', '.join(map(str, among))}, got {value}")
    if value < at_least:
        raise ValueError(f"{name} must be at least {at_least}, got {value}")
    return value


def most(value: Any, name: str) -> int | None:
    """An int of at least 1, or None."""
    return None if value is None else integer(value, name, at_least=1)


def width(x: Tensor, size: int) -> None:
    """Embeddings (B, D) of as many columns as the weights have."""
    if x.shape[1] != size:
        raise ValueError(f"embeddings must have embedding_size = {size} columns, got {what(x)}")


def classes(value: Tensor, count: int) -> Tensor:
    """Labels in [0, count). On a GPU they are looked at by the device, which raises where it finds another."""
    if value.shape[0] == 0:
        return value
    inside = ((value >= 0) & (value < count)).all()
    fake = type(value).__name__ == "FakeTensor"  # which has no values to look at
    if value.device.type == "cpu" and not fake and not torch.compiler.is_compiling():
        if not inside:
            raise ValueError(f"labels must be in [0, {count}), got {int(value.min())} to {int(value.max())}")
    else:
        torch._assert_async(inside, f"labels must be in [0, {count})")
    return value


def after_init(cls: type, wanted: str, call: str) -> Callable[..., None]:
    """The class's own `__init__`, after which its parent's must have been called, which sets the attribute `wanted`."""
    init: Callable[..., None] = cls.__dict__["__init__"]

    @functools.wraps(init)
    def checked(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        if wanted not in self.__dict__:
            raise TypeError(f"__init__ of {cls.__name__} must call super().__init__({call})")

    return checked
