"""How row losses become one number."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from ..core.pairs import PairReducer
from ..core.problem import AVERAGINGS
from .output_checks import RowLosses


def reduce_losses(rows: RowLosses, reduction: str, pairs: PairReducer | None, extra: Tensor | None = None) -> Tensor:
    """The loss of a batch, from its rows.

    Args:
        rows: the row losses (N,).
        reduction: the criterion's reduction.
        pairs: the pairs, which know the order of rows; None: rows are in the caller's order.
        extra: () that is added to the loss of each valid row, or None.
    """
    rows, extra = with_extra(rows, reduction, extra)
    if reduction == "none":
        return rows.losses if pairs is None else pairs.restore(rows.losses)
    loss = average(rows, reduction)
    return loss if extra is None else loss + extra.to(loss.dtype)


def with_extra(rows: RowLosses, reduction: str, extra: Tensor | None) -> tuple[RowLosses, Tensor | None]:
    """Adds `extra` () to the loss of each valid row.

    An average over terms has no rows to add it to. Then the rows stay as they are, and `extra` is returned, which the
    caller adds to the average.
    """
    if extra is None or (rows.terms and reduction in ("nonzero", "mean_pairs")):
        return rows, extra
    extra = extra.to(rows.losses.dtype).expand_as(rows.losses)  # torch.where of a tensor () would change the dtype
    losses = rows.losses + extra.masked_fill(~rows.valid, 0.0)
    return RowLosses(losses, rows.valid, rows.denominator, rows.terms, rows.shares), None


def average(rows: RowLosses, reduction: str, total: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """The loss () of some rows.

    Args:
        rows: the row losses.
        reduction: any reduction but "none".
        total: a function that sums a count () over all processes, if `rows` are only this process's rows. The result
            is then this process's share of the loss.
    """
    losses = rows.losses

    def summed(count: Tensor) -> Tensor:
        return (count if total is None else total(count)).clamp_min(1)

    if rows.shares:
        return losses.sum()
    if reduction == "mean_pairs":
        return _sum_of(t.losses.sum() / summed(t.number.sum()) for t in rows.terms)
    if reduction == "nonzero" and rows.terms:
        return _sum_of(t.losses.sum() / summed(t.nonzero.sum()) for t in rows.terms if t.nonzero is not None)
    if reduction == "nonzero":
        positive = ~(losses <= 0)  # true for NaN
        return torch.where(positive, losses, 0.0).sum() / summed(positive.sum())
    if reduction == "sum":
        return losses.sum()
    if reduction not in ("mean", "mean_valid"):
        raise ValueError(f"reduction must be one of {', '.join(AVERAGINGS)}, got {reduction!r}")
    by = rows.valid.sum() if reduction == "mean_valid" else rows.denominator
    if total is not None and not isinstance(by, Tensor):
        by = torch.full((), by, dtype=torch.int64, device=losses.device)
    if isinstance(by, Tensor):
        return losses.sum() / summed(by)
    return losses.mean() if by == losses.shape[0] > 0 else losses.sum() / max(by, 1)


def _sum_of(parts: Iterable[Tensor]) -> Tensor:
    return functools.reduce(torch.add, parts)
