"""The results that methods of a criterion return, and checks of them with errors for the criterion's author."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..core import checks

# Methods that compute a loss from all references at once. They are not called where references come in chunks.
AT_ONCE = ("_loss", "_by_rows", "rows", "pairs_of", "prepared")
WIDE = (torch.float32, torch.float64)


class Terms(NamedTuple):
    """Terms that a loss averages one by one instead of by rows: its pairs of one side, or its triplets.

    A loss that has them returns them in `RowLosses`, so that "nonzero" and "mean_pairs" can average over terms.

    Attributes:
        losses: (N,), each row's sum of its terms.
        number: (N,), how many terms a row has.
        nonzero: (N,), how many of these are above 0; None where "nonzero" is not asked for.

    Examples:
        >>> terms = flashpair.Terms(torch.tensor([1.5, 0.0]), torch.tensor([3, 2]), torch.tensor([2, 0]))
        >>> terms.nonzero.tolist()
        [2, 0]
    """

    losses: Tensor
    number: Tensor
    nonzero: Tensor | None = None


class RowLosses(NamedTuple):
    """The losses of the rows, and what averages divide by. `row_losses` of a `Criterion` returns it.

    Attributes:
        losses: (N,), float32 or float64; 0 where a row has no loss.
        valid: (N,) bool, rows that have a loss.
        denominator: what "mean" divides by: an int, or a tensor ().
        terms: for a loss that averages pairs or triplets, its terms of each kind: "nonzero" averages each kind over its
            terms above 0, "mean_pairs" over all of them, and both add the averages up. The terms sum to `losses`.
        shares: True if `losses` are shares of one number, which every reduction but "none" gives.

    Examples:
        >>> rows = flashpair.RowLosses(torch.tensor([0.5, 0.0]), torch.tensor([True, False]), 2)
        >>> (rows.losses.sum() / rows.denominator).item()
        0.25
    """

    losses: Tensor
    valid: Tensor
    denominator: int | Tensor
    terms: tuple[Terms, ...] = ()
    shares: bool = False


class Penalty(NamedTuple):
    """A penalty that is a mean: its sum (), and the number () that it is divided by."""

    total: Tensor
    number: Tensor


def checked_rows(rows: Any, name: str, count: int, device: torch.device) -> RowLosses:
    """Checks what `row_losses` of the class `name` returned for `count` rows.

    Raises:
        TypeError: it is no RowLosses, or a tensor has a wrong type or dtype.
        ValueError: a tensor has another shape or device than it must have.
    """
    if not isinstance(rows, RowLosses):
        raise TypeError(
            f"row_losses of {name} must return RowLosses(losses, valid, denominator), got {checks.what(rows)}"
        )
    losses, by = rows.losses, rows.denominator
    if not isinstance(losses, Tensor):
        hint = "; pairs.reduce returns a tuple, one tensor a reduction: (r,) = pairs.reduce(...)"
        raise TypeError(
            f"losses of {name} must be a tensor of shape ({count},), got {checks.what(losses)}"
            + (hint if isinstance(losses, tuple) else "")
        )
    if losses.dtype not in WIDE:
        raise TypeError(
            f"losses of {name} must be float32 or float64, as pairs.reduce gives, got {checks.what(losses)}"
        )
    if losses.shape != (count,):
        raise ValueError(f"losses of {name} must have shape ({count},), one a row, got {checks.what(losses)}")
    _on(losses, device, f"losses of {name}")
    _of_rows(rows.valid, f"valid of {name}", count, device, boolean=True)
    if isinstance(by, Tensor):
        if by.dim() or by.is_complex():
            raise ValueError(f"denominator of {name} must be an int, or a tensor of shape (), got {checks.what(by)}")
        checks.like(by, losses, f"denominator of {name}")
    elif isinstance(by, bool) or not isinstance(by, (int, float)):
        raise TypeError(f"denominator of {name} must be an int, or a tensor of shape (), got {checks.what(by)}")
    for t in rows.terms:
        _terms(t, name, count, device)
    return rows


def _terms(terms: Any, name: str, count: int, device: torch.device) -> None:
    if not isinstance(terms, Terms):
        raise TypeError(f"terms of {name} must be a tuple of Terms(losses, number, nonzero), got {checks.what(terms)}")
    for each, value in zip(Terms._fields, terms, strict=True):
        if each != "nonzero" or value is not None:
            _of_rows(value, f"{each} in terms of {name}", count, device)


def _of_rows(value: Any, name: str, count: int, device: torch.device, *, boolean: bool = False) -> None:
    kind = "bool tensor" if boolean else "tensor"
    right = isinstance(value, Tensor) and value.shape == (count,)
    if not right or (value.dtype == torch.bool) < boolean:
        raise TypeError(f"{name} must be a {kind} of shape ({count},), one a row, got {checks.what(value)}")
    _on(value, device, name)


def _on(value: Tensor, device: torch.device, name: str) -> None:
    if value.device != device:
        raise ValueError(f"{name} must be on the device of embeddings, {device}, got {checks.what(value)}")


def checked_call(returned: Any, name: str) -> tuple[Any, Any]:
    """Checks what `rows` of the class `name` returned."""
    if not isinstance(returned, tuple) or len(returned) != 2:
        raise TypeError(
            f"rows of {name} must return a tuple of RowLosses and the pairs (or None), got {checks.what(returned)}"
        )
    return returned


def checked_extra(extra: Any, name: str, x: Tensor) -> Tensor | None:
    """Checks what `regularizer` of the class `name` returned, for embeddings x (N, D)."""
    if extra is not None and (not isinstance(extra, Tensor) or extra.dim() or not extra.dtype.is_floating_point):
        raise TypeError(
            f"regularizer of {name} must return None or a floating-point tensor of shape (), got {checks.what(extra)}"
        )
    if extra is not None:
        checks.like(extra, x, f"regularizer of {name}")
    return extra


def checked_penalty(penalty: Any, name: str) -> Penalty | None:
    """Checks what `penalty_of` of the class `name` returned."""
    if penalty is not None and not (isinstance(penalty, Penalty) and all(isinstance(t, Tensor) for t in penalty)):
        raise TypeError(
            f"penalty_of of {name} must return None or Penalty(total, number) of two tensors of shape (), got "
            f"{checks.what(penalty)}"
        )
    return penalty


def checked_prepared(rows: Any, given: Tensor, name: str) -> Tensor:
    """Checks what the function in `preparation` of the class `name` returned for rows (n, D)."""
    right = isinstance(rows, Tensor) and rows.dim() == 2 and rows.shape[0] == given.shape[0]
    if not right or not rows.dtype.is_floating_point:
        raise TypeError(
            f"preparation of {name} must return floating-point rows ({given.shape[0]}, D), got {checks.what(rows)}"
        )
    _on(rows, given.device, f"what preparation of {name} makes")
    return rows


def refuse_own(criterion: Any, methods: Iterable[str], where: str) -> None:
    """Raises TypeError if a user's class (or the criterion itself) overrides one of these methods.

    Args:
        criterion: the criterion.
        methods: names of methods.
        where: what does not call them.
    """
    for method in methods:
        function = vars(criterion).get(method, getattr(type(criterion), method))
        if not getattr(function, "__module__", "").startswith("flashpair."):
            raise TypeError(
                f"{type(criterion).__name__} overrides {method}, which {where} does not call: override row_losses, "
                "preparation or penalty_of instead"
            )
