"""Whether a criterion can be computed by many processes, which its declarations say, and its rows on one of them."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..losses.base import Criterion, RowLosses
from ..losses.class_loss import ClassCriterion
from .collectives import Ranks

ANCHORS = ("samples", "proxies")
WHOLE_CALLS = ("forward", "_loss", "_by_rows")  # methods that see the batch of one process only


def overrides(criterion: Criterion, name: str) -> bool:
    """Whether a criterion's class overrides the method `name` of `Criterion` and `ClassCriterion`."""
    method = getattr(type(criterion), name)
    return method is not getattr(Criterion, name, None) and method is not getattr(ClassCriterion, name, None)


def declared_with(criterion: Criterion, word: str, name: str) -> bool:
    """Whether the class that defines the method `name`, or a subclass of it, sets the attribute `word`.

    What a parent class declares is about the parent's own method.
    """
    for kind in type(criterion).__mro__:
        if word in vars(kind):
            return True
        if name in vars(kind):
            return False
    return False


def check_claims(criterion: Criterion) -> None:
    """Raises TypeError for a class whose loss cannot be computed from `row_losses` on each process."""
    name = type(criterion).__name__
    if overrides(criterion, "regularizer"):
        raise TypeError(f"{name} overrides regularizer, which sees one process only: override penalty_of instead")
    for call in WHOLE_CALLS:
        if overrides(criterion, call):
            raise TypeError(f"{name} overrides {call}, which sees one process only: override row_losses instead")
    if criterion.anchors not in ANCHORS:
        raise TypeError(f"{name}.anchors must be one of {', '.join(ANCHORS)}, got {criterion.anchors!r}")
    of_classes = isinstance(criterion, ClassCriterion)
    if criterion.anchors == "proxies" and not of_classes:
        raise TypeError(
            f'{name}.anchors = "proxies" needs class weights: make it a subclass of flashpair.ClassCriterion'
        )
    for call in ("pairs_of", "rows"):
        if not overrides(criterion, call):
            continue
        if not of_classes:
            raise TypeError(f"{name} overrides {call}, which sees one process only: override row_losses instead")
        if criterion.anchors == "proxies" or not declared_with(criterion, "anchors", call):
            raise TypeError(
                f"{name} overrides {call} without declaring what its rows are: set the class attribute anchors = "
                '"samples" if each row is one sample of the batch against the weights alone; if rows are proxies, set '
                f'anchors = "proxies" and do not override {call}'
            )


def check_parts(criterion: ClassCriterion) -> None:
    """Raises TypeError or ValueError for a class whose rows or penalty cannot be computed from parts of the classes."""
    check_claims(criterion)
    name = type(criterion).__name__
    if why := criterion.refuses_parts():
        raise ValueError(why)
    for call in ("pairs_of", "rows"):
        if overrides(criterion, call) and not declared_with(criterion, "rows_of_parts", call):
            raise TypeError(f"{name} overrides {call} without rows_of_parts, which split classes need")
    if overrides(criterion, "penalty_of") and not declared_with(criterion, "penalizes", "penalty_of"):
        raise TypeError(
            f"{name} overrides penalty_of without declaring what it is a mean over: set the attribute penalizes = "
            '"samples" or, if each process returns the part of its own classes, "classes"'
        )


class Totals(TorchFunctionMode):
    """Tracks which tensors are sums over all processes: results of `batch_sum`, and what is computed from them alone.

    A count that a loss divides by is summed over the processes. If it is such a sum already, it would be summed twice.
    """

    def __init__(self) -> None:
        super().__init__()
        self.tensors: dict[int, Tensor] = {}

    def add(self, tensor: Tensor) -> Tensor:
        self.tensors[id(tensor)] = tensor
        return tensor

    def __contains__(self, value: object) -> bool:
        return id(value) in self.tensors

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if self.tensors and isinstance(out, Tensor):
            given = [t for t in (*args, *(kwargs or {}).values()) if isinstance(t, Tensor)]
            if any(t in self for t in given) and all(t in self or not t.dim() for t in given):
                self.add(out)
        return out


def rows_of(criterion: Criterion, pairs: Any, ranks: Ranks) -> RowLosses:
    """`row_losses` of a criterion, for the rows of this process.

    Args:
        criterion: a loss of this package, or a user's own, whose denominators are checked.
        pairs: this process's pairs.
        ranks: the processes.

    Raises:
        ValueError: on every process, if any process divides by something else than a count of its own rows.
    """
    if type(criterion).row_losses.__module__.startswith("flashpair."):
        losses: RowLosses = criterion.row_losses(pairs)
        return losses
    totals = Totals()
    total = pairs.batch_sum
    pairs.batch_sum = lambda values: totals.add(total(values))
    try:
        with totals:
            rows = criterion.checked_row_losses(pairs)
    finally:
        del pairs.batch_sum
    wrong = criterion.reduction != "none" and not rows.shares and not _own_counts(criterion.reduction, rows, totals)
    refused = [str(rank) for rank, (bad,) in enumerate(ranks.all_gather_ints([int(wrong)], rows.losses.device)) if bad]
    if refused:
        raise ValueError(
            f"the denominator, and the numbers of terms, of {type(criterion).__name__}.row_losses must count this "
            "process's rows, since they are summed over the processes: use losses.shape[0] or a tensor summed over "
            f"rows, not another int or a pairs.batch_sum; they are wrong on process {', '.join(refused)}"
        )
    return rows


def _own_counts(reduction: str, rows: RowLosses, totals: Totals) -> bool:
    """Whether the numbers that the loss divides by count rows of this process."""
    if reduction == "mean_pairs" or (reduction == "nonzero" and rows.terms):
        return not any(t.number in totals or t.nonzero in totals for t in rows.terms)
    if reduction != "mean":
        return True
    by = rows.denominator
    return by not in totals if isinstance(by, Tensor) else by == rows.losses.shape[0]
