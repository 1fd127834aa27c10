"""The contract of a source of references: it brings them in chunks, and takes back values and gradients of a chunk."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

NO_REFERENCE = torch.iinfo(torch.int64).max  # stands where an index among all references would, for an empty set


class Chunk(NamedTuple):
    """Some of the references, and the anchors that they make pairs with.

    Attributes:
        y: (M, D), the references, sorted by label; None: they are all anchors, and no anchor is a pair with itself.
        labels: (M,) int64, the labels of the references, sorted.
        order: (M,) int64, the index of each reference among all references. Of equal extremes the lowest index counts.
        anchors: which of the sorted anchors make pairs with the references.
        two_sided: the references are anchors (of another process), too, and their references are `anchors`. Their
            values and gradients go to `ReferenceSource.send`.
        anchor_values: (V, M), with `two_sided` what the call needs to know of the references as anchors.
        end: () int64: references from there on take no part; None: all take part.
        needs_grad: the gradient of `y` is needed, and goes to `ReferenceSource.send`.
        tag: a note of the source to itself, which says where the chunk is from.
    """

    y: Tensor | None
    labels: Tensor
    order: Tensor
    anchors: slice = slice(None)
    two_sided: bool = False
    anchor_values: Tensor | None = None
    end: Tensor | None = None
    needs_grad: bool = False
    tag: Any = None


class Received(NamedTuple):
    """What others computed for some of this process's rows: its anchors, or its references where it has any.

    Attributes:
        rows: which of the sorted rows.
        numbers: (V, n), their values, or the gradients of their offsets.
        grad: (n, D), a part of the rows' gradient.
    """

    rows: slice
    numbers: Tensor | None
    grad: Tensor | None


class ReferenceSource(Protocol):
    """Where the references of a call come from.

    Attributes:
        labels: (N,) int64, of the anchors, sorted.
        order: (N,) int64, the index of each anchor among all anchors.
    """

    labels: Tensor
    order: Tensor

    def chunks(self, x: Tensor, y: Tensor | None, anchor_values: Tensor | None) -> Iterator[Chunk]:
        """Every chunk once, in a fixed order.

        Args:
            x: (N, D), the sorted anchors.
            y: (m, D), the sorted references of this process, if it has any beside its anchors.
            anchor_values: (V, N), what other processes need to know of these anchors in a `two_sided` chunk.
        """

    def send(self, chunk: Chunk, numbers: Tensor | None, grad: Tensor | None) -> list[Received]:
        """Sends what was computed for a chunk's references, and returns what others have computed for this process.

        Args:
            chunk: the chunk.
            numbers: (V, M), values or gradients of offsets, for a `two_sided` chunk.
            grad: (M, D), the gradient of the chunk's references.
        """

    def flush(self) -> list[Received]:
        """What others computed and have not sent yet, after the last chunk of a backward pass."""


def as_numbers(integers: Tensor, dtype: torch.dtype) -> Tensor:
    """The bits of integers (K, N) as rows of floating-point numbers, to send with others; `as_integers` reads them."""
    return integers.T.contiguous().view(dtype).T


def as_integers(numbers: Tensor) -> Tensor:
    """The integers (K, N) whose bits `as_numbers` turned into numbers."""
    return numbers.T.contiguous().view(torch.int64).T


def places_of(wanted: Tensor, order: Tensor) -> Tensor:
    """Where each of `wanted` (K, N) stands in `order` (M,); -1: it is not there. Contiguous, as backends need it."""
    if order.shape[0] == 0:
        return torch.full_like(wanted, -1)
    ordered, place = torch.sort(order)
    wanted = wanted.contiguous()
    nearest = torch.searchsorted(ordered, wanted).clamp_max(order.shape[0] - 1)
    return torch.where(ordered[nearest] == wanted, place[nearest], -1)


def only_once() -> None:
    """Raises in a backward pass that is to be differentiated itself (create_graph=True): the result would be wrong."""
    if torch.is_grad_enabled():
        raise RuntimeError("second derivatives need all references in one tensor, on one process")
