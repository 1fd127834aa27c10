"""What brings references a chunk at a time, and takes what was found for them: the contract of a source."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

NO_REFERENCE = torch.iinfo(torch.int64).max  # the place of no reference


class Chunk(NamedTuple):
    """Some of the references, and the anchors that meet them.

    Args:
        y: (M, D), sorted by label; None: the anchors themselves, each but for itself.
        labels: (M,) int64; `order`: (M,) int64, their places among all references: the lowest wins among equals.
        own: the anchors that meet them, of the sorted ones.
        both: they are anchors, too, whose references `own` are; what is found for them goes to `ReferenceSource.send`.
        along: (V, M): of `two_sided`, the numbers of its anchors that go along with them.
        end: () int64 or None: references from there on take no part.
        wanted: a gradient of `y` is wanted, and goes to `ReferenceSource.send`.
    """

    y: Tensor | None
    labels: Tensor
    order: Tensor
    own: slice = slice(None)
    two_sided: bool = False
    anchor_values: Tensor | None = None
    end: Tensor | None = None
    wanted: bool = False
    tag: Any = None  # the source's own note of whose it is


class Received(NamedTuple):
    """What was found elsewhere for this process's anchors `own`, or where it has references beside them, for these:
    numbers (V, n), and their part of the gradient (n, D)."""

    own: slice
    numbers: Tensor | None
    rows: Tensor | None


class ReferenceSource(Protocol):
    """Where the references come from. Anchors are sorted by label; `order` (N,) is their place among all anchors."""

    labels: Tensor
    order: Tensor

    def chunks(self, x: Tensor, y: Tensor | None, anchor_values: Tensor | None) -> Iterator[Chunk]:
        """Every chunk once. y: this process's references, if there are any beside the anchors; along (V, N): numbers of
        the anchors, for those that meet them elsewhere."""

    def send(self, chunk: Chunk, numbers: Tensor | None, rows: Tensor | None) -> list[Received]:
        """Hands over what was found for a chunk, and returns what others found for this process's."""

    def flush(self) -> list[Received]:
        """After the last chunk of a backward pass: what is still out."""


def as_numbers(whole: Tensor, dtype: torch.dtype) -> Tensor:
    """Integers (K, N) as rows of numbers of that dtype, bit by bit, for `send`; `as_integers` reads them."""
    return whole.T.contiguous().view(dtype).T


def as_integers(numbers: Tensor) -> Tensor:
    return numbers.T.contiguous().view(torch.int64).T


def places_of(winner: Tensor, order: Tensor) -> Tensor:
    """Where in `order` (M,) each of winner (K, N) stands; -1: nowhere. Contiguous, as schedules take it."""
    if order.shape[0] == 0:
        return torch.full_like(winner, -1)
    ordered, place = torch.sort(order)
    winner = winner.contiguous()
    at = torch.searchsorted(ordered, winner).clamp_max(order.shape[0] - 1)
    return torch.where(ordered[at] == winner, place[at], -1)


def only_once() -> None:
    """For a backward that cannot be differentiated: create_graph=True must not take its gradient for a constant."""
    if torch.is_grad_enabled():
        raise RuntimeError("second derivatives need all references in one tensor, on one process")
