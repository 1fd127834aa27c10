"""What is kept with a tensor as long as it lives: found again by the tensor itself, and gone with it."""

from __future__ import annotations

from typing import Generic, TypeVar

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

T = TypeVar("T")


class TensorCache(Generic[T]):
    """A value for some tensors, by identity. It keeps no tensor alive."""

    def __init__(self) -> None:
        self._values = WeakTensorKeyDictionary()

    def __setitem__(self, tensor: Tensor, value: T) -> None:
        self._values[tensor] = value

    def get(self, tensor: Tensor | None) -> T | None:
        """The value, or None for a tensor that has none."""
        if tensor is None or not self._values:
            return None
        value: T | None = self._values.get(tensor)
        return value
