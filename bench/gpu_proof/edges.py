"""Pairs on the edge of a window or a hinge: roundings move one over it, which changes its two rows outright.

What was found is then held against the truth with the one pair on the other side, by the same bounds, so that nothing
else is forgiven. The pair is one of the rows that are most off, and its similarity is moved by no more than roundings
of this precision, as they were measured, move one.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from unittest import mock

import torch
from torch import Tensor

from flashpair.backends import reference

ROWS = 4  # the most wrong ones, among which a pair is looked for
FACTOR = 2.0
ALONE = 8.0  # times the usual row's error, and rounding may not be all of it
Results = dict[str, Tensor]


@contextlib.contextmanager
def _through(change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """The reference's similarities (N, M) as `change` has them."""
    real = reference.dense_pairs
    with mock.patch.object(reference, "dense_pairs", lambda *arguments: change(real(*arguments))):
        yield


def noted(compute: Callable[[], Results]) -> tuple[Results, Tensor | None]:
    """What the reference computes, and the similarities (N, N) that it saw, None where it has no such matrix."""
    seen: list[Tensor] = []

    def note(z: Tensor) -> Tensor:
        seen.append(z.detach())
        return z

    with _through(note):
        found = compute()
    return found, seen[0] if len(seen) == 1 and seen[0].shape[0] == seen[0].shape[1] else None


def _off(found: Results, truth: Results) -> Tensor:
    """(N,): how far each row of the gradient is off."""
    return torch.linalg.vector_norm(found["gradient"].double() - truth["gradient"], dim=1)


def other_sides(
    compute: Callable[[], Results], found: Results, truth: Results, z: Tensor, rounded: Tensor
) -> Iterator[tuple[tuple[int, int], Results]]:
    """Pairs, and the truth with each moved up and down. z, rounded (N, N): similarities in float64 and at the precision
    of plain PyTorch."""
    eps = torch.finfo(torch.float32).eps
    reach = FACTOR * ((rounded.double() - z).abs().max() + eps * z.abs().max())
    off = _off(found, truth).nan_to_num(nan=torch.inf)
    worst = off.topk(min(ROWS, off.shape[0])).indices.sort().values.tolist()
    for i, j in itertools.combinations(worst, 2):
        for sign in (1, -1):
            moved = torch.zeros_like(z)
            moved[i, j] = moved[j, i] = sign * reach
            with _through(lambda s, moved=moved: s + moved):  # type: ignore[misc]
                yield (i, j), compute()


def own_side(compute: Callable[[], Results], eager: Results, truth: Results, z: Tensor, rounded: Tensor) -> Results:
    """The truth that plain PyTorch is nearest to: had it moved a pair over an edge, its error would excuse any."""
    off = _off(eager, truth)
    if not off.max() > ALONE * off.median():
        return truth
    sides = [truth, *(other for _, other in other_sides(compute, eager, truth, z, rounded))]
    return min(sides, key=lambda side: _off(eager, side).norm().item())
