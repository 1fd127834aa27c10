"""Losses against class weights that are split over processes."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..chunked.class_weights import class_pairs
from ..core.pairs import PairReducer
from ..losses.base import Penalty, RowLosses, Terms
from ..losses.class_loss import ClassCriterion
from . import pairs as shared
from .agreement import Described
from .claims import check_parts
from .collectives import AllGatherRows, AllReduceSum, Ranks, all_logsumexp
from .global_loss import GlobalCriterion, ParameterSlot, slice_of
from .local_pairs import MergedPairs


def shard_classes(
    criterion: ClassCriterion,
    *,
    schedule: str = "all_gather",
    gradients: str = "mean",
    group: dist.ProcessGroup | None = None,
) -> ShardedClasses:
    """A loss against class weights over the global batch, with the C classes split over the W processes of a group.

    Each process calls the result with its own embeddings (n, D) and labels (n,), n as it likes, and gets the loss of
    the whole batch, as with `gather`. Embeddings are gathered, each process computes the logits of all rows against its
    own classes, and one number a row and reduction is merged. So weights, their gradient and the optimizer state are
    each held once. (Where proxies are the anchors, as in ProxyAnchorLoss, embeddings are exchanged as `schedule` says.)

    Args:
        criterion: a loss against class weights; your own, too, if its `row_losses` uses only sums and logsumexps
            without mining windows. It is modified: its `weight` becomes this process's classes [first, last) of the
            weights, which must be the same on every process before (the same seed, or loaded).
        schedule: see `gather`.
        gradients: see `gather`. The weights' gradient is whole for this process's classes and belongs to no other
            process, so leave the criterion out of DistributedDataParallel.
        group: the processes; None: all.

    Returns:
        A `ShardedClasses`.

    Raises:
        TypeError: a criterion without class weights, or your own that overrides `rows`, `pairs_of` or `penalty_of`
            without declaring how they combine from parts.
        ValueError: SoftTripleLoss with a learned `la` or `gamma`; in a call, on every process, what `gather` refuses,
            also for different classes.

    Examples:
        >>> x = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0], [-0.8, 0.6]])
        >>> labels = torch.tensor([0, 0, 1, 1])
        >>> criterion = flashpair.distributed.shard_classes(flashpair.CosFaceLoss(num_classes=2, embedding_size=2))
        >>> criterion.first, criterion.last  # one process holds all classes
        (0, 2)
    """
    if not isinstance(criterion, ClassCriterion):
        raise TypeError(f"criterion must be a loss against class weights, got {type(criterion).__name__}")
    check_parts(criterion)
    return ShardedClasses(criterion, schedule, gradients, group)


class ShardedClasses(GlobalCriterion):
    """A loss against class weights that are split over processes; `shard_classes` returns it.

    Attributes:
        first: the first class whose weights are `criterion.weight` on this process.
        last: one past the last of them.

    Args:
        criterion: see `shard_classes`.
        schedule: see `gather`.
        gradients: see `gather`.
        group: see `gather`.

    Raises:
        ValueError: an unknown word.
    """

    criterion: ClassCriterion

    def __init__(
        self, criterion: ClassCriterion, schedule: str, gradients: str, group: dist.ProcessGroup | None
    ) -> None:
        super().__init__(criterion, schedule, gradients, group)
        self.first, self.last = 0, criterion.num_classes
        if dist.is_available() and dist.is_initialized():
            ranks = Ranks(group)
            self.first, self.last = slice_of(criterion.num_classes, ranks.world, ranks.rank)
            criterion.weight = nn.Parameter(criterion.weight.detach()[self.first : self.last].clone())

    def whole_weight(self) -> Tensor:
        """The weights of all classes, on every process, without a graph, for a checkpoint. All processes call it."""
        weight = self.criterion.weight.detach()
        if not (dist.is_available() and dist.is_initialized()):
            return weight.clone()
        ranks, count = Ranks(self.group), self.criterion.num_classes
        ends = [slice_of(count, ranks.world, rank) for rank in range(ranks.world)]
        return torch.cat(ranks.gather(weight, [last - first for first, last in ends]))

    def _described(self) -> Described:
        words = (f"call: {type(self).__name__}", f"schedule: {self.schedule}", f"gradients: {self.gradients}")
        return Described(self.criterion, words, ("weight",))

    def _shared(self, place: ParameterSlot) -> bool:
        return not (place.module is self.criterion and place.name == "weight")

    def _rows(
        self, ranks: Ranks, x: Tensor, labels: Tensor, y: Tensor | None, ref_labels: Tensor | None, sizes: list[int],
        ref_sizes: list[int],
    ) -> tuple[RowLosses, PairReducer | None]:  # fmt: skip
        criterion = self.criterion
        if criterion.anchors == "proxies":
            return super()._rows(ranks, x, labels, y, ref_labels, sizes, ref_sizes)
        every: Tensor = AllGatherRows.apply(ranks, x, sizes)
        local = torch.cat(ranks.gather(labels, sizes)) - self.first  # out of range for classes of other processes
        rows = criterion.rows_of_parts(
            every, local, lambda t: AllReduceSum.apply(ranks, t), lambda t: all_logsumexp(ranks, t)
        )
        pairs = None
        if rows is None:
            pairs = class_pairs(every, local, criterion.weight, criterion.normalize, criterion.impl)
            part = MergedPairs(pairs, ranks, self.first, criterion.num_classes)
            rows = criterion.checked_row_losses(part)
        first = sum(sizes[: ranks.rank])
        here = slice(first, first + sizes[ranks.rank])

        def own_rows(values: Tensor | None) -> Tensor | None:
            if values is None:
                return None
            return (values if pairs is None else pairs.restore(values))[here]

        losses, valid = own_rows(rows.losses), own_rows(rows.valid)
        terms = tuple(Terms(*(own_rows(values) for values in term)) for term in rows.terms)  # type: ignore[arg-type]
        by = rows.denominator * int(ranks.rank == 0)  # every process counts all rows, and the counts are summed
        assert losses is not None and valid is not None
        return RowLosses(losses, valid, by, terms, rows.shares), None

    def _proxies(self, how: tuple[Ranks, str, str], x: Tensor, labels: Tensor, sizes: list[int]) -> shared.SharedPairs:
        return shared.of_proxies(self.criterion, self.criterion.weight, how, x, labels, sizes)

    def _number(self, ranks: Ranks, penalty: Penalty) -> Tensor:
        """The number () that the penalty is a mean over; for a mean over classes each process has it already."""
        if self.criterion.penalizes == "classes":
            return penalty.number.detach()
        return super()._number(ranks, penalty)
