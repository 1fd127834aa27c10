"""A call of a fused criterion, and its pairs a block of anchors at a time, as pytorch-metric-learning compares them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..core.similarity import dense_pairs, l2_normalize
from ..miners.base import chunk

Answer = bool | Tensor  # a tensor () of bool, which a GPU may still be computing


@dataclass(eq=False)
class Call:
    """The arguments of a fused criterion's call, and its loss.

    Args:
        y, ref_labels: the references; None where the batch is compared with itself.
        dtype: the one in which the library would compute.
        numbers: the hyper-parameters of the library's loss that corner cases depend on.
        same: whether ref_emb is the tensor embeddings, and whether ref_labels is the tensor labels.
    """

    criterion: Any
    x: Tensor
    labels: Tensor
    y: Tensor | None
    ref_labels: Tensor | None
    loss: Tensor
    dtype: torch.dtype
    numbers: dict[str, float]
    same: tuple[bool, bool] = (False, False)

    @property
    def square(self) -> bool:
        return self.y is None

    @property
    def others(self) -> Tensor:
        return self.labels if self.ref_labels is None else self.ref_labels

    def rows(self, of: Tensor) -> Tensor:
        """As they are compared, in the library's dtype."""
        return l2_normalize(of.to(self.dtype)) if self.criterion.normalize else of.to(self.dtype)

    @functools.cached_property
    def own(self) -> Tensor:
        return self.rows(self.x)

    @functools.cached_property
    def refs(self) -> Tensor:
        return self.own if self.y is None else self.rows(self.y)

    def reach(self) -> float | Tensor:
        """An upper bound on every dot product."""
        if self.criterion.normalize:
            return 1.0
        return _longest(self.x) * (_longest(self.x) if self.y is None else _longest(self.y))


class Block(NamedTuple):
    """Some anchors against all references: similarities (B, M), and which pairs are positive, negative."""

    z: Tensor
    positive: Tensor
    negative: Tensor


def _longest(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x.to(torch.promote_types(x.dtype, torch.float32)), dim=1).amax()


def blocks(call: Call, distance: str = "dot") -> Iterator[Block]:
    size = chunk(call.refs.shape[0], call.refs.itemsize)
    for at in range(0, call.x.shape[0], size):
        labels = call.labels[at : at + size, None]
        positive = labels == call.others[None]
        negative = ~positive
        if call.square:
            positive.diagonal(at).fill_(False)
        yield Block(dense_pairs(call.own[at : at + size], call.refs, distance), positive, negative)


def of_any(call: Call, found: Callable[[Block], Tensor], distance: str = "dot") -> bool:
    return any(bool(found(block).any()) for block in blocks(call, distance))
