"""Losses against class weights of which each process holds a part."""

from __future__ import annotations

from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..classes import class_pairs
from ..criteria.base import AnyPairs, Penalty, RowLosses
from ..criteria.classes import ClassCriterion
from ..criteria.proxies import ProxyAnchorLoss
from ..criteria.soft_triple import SoftTripleLoss
from ..reduction import Reduction
from . import pairs as shared
from .loss import GlobalCriterion, Place, slice_of
from .ranks import Gathered, Ranks, Total, merged


def shard_classes(
    criterion: ClassCriterion,
    *,
    schedule: str = "all_gather",
    gradients: str = "mean",
    group: dist.ProcessGroup | None = None,
) -> ShardedClasses:
    """A loss against class weights over the global batch, of whose C classes each of W processes holds C / W.

    Every process calls it with its own embeddings (n, D) and labels (n,), n as it likes, and gets the loss of all, as
    with `gather`. Embeddings are gathered, each process computes the logits of all rows against its own classes, and
    one number a row and reduction is merged, so that neither weights nor their gradient nor optimizer state is held
    twice. (Of ProxyAnchorLoss, whose anchors are the proxies, embeddings pass by as `schedule` says.)

    Args:
        criterion: any loss of class weights; it is taken over: its `weight` becomes this process's part, classes
            [first, last) of the same weights on every process (give them the same seed, or load them before).
        schedule, gradients, group: see `gather`. The weights' gradient is that of one process, whole, of this part;
            it belongs to no other process, so leave the criterion out of DistributedDataParallel.

    Raises:
        TypeError: a criterion without class weights. ValueError: SoftTripleLoss with a learned `la` or `gamma`.
    """
    if not isinstance(criterion, ClassCriterion):
        raise TypeError(f"criterion must be a loss against class weights, got {type(criterion).__name__}")
    if isinstance(criterion, SoftTripleLoss) and (
        isinstance(criterion.la, Tensor) or isinstance(criterion.gamma, Tensor)
    ):
        raise ValueError("SoftTripleLoss shares its classes out with numbers as la and gamma, got a tensor")
    return ShardedClasses(criterion, schedule, gradients, group)


class ShardedClasses(GlobalCriterion):
    """What `shard_classes` returns.

    Attributes:
        first, last: the classes whose weights are `criterion.weight` here.
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
        """The weights of all classes, on every process, without a graph: for a checkpoint. All must call it."""
        weight = self.criterion.weight.detach()
        if not (dist.is_available() and dist.is_initialized()):
            return weight.clone()
        ranks, count = Ranks(self.group), self.criterion.num_classes
        ends = [slice_of(count, ranks.world, rank) for rank in range(ranks.world)]
        return torch.cat(ranks.gather(weight, [last - first for first, last in ends]))

    def _shared(self, place: Place) -> bool:
        return not (place.module is self.criterion and place.name == "weight")

    def _rows(
        self, ranks: Ranks, x: Tensor, labels: Tensor, y: Tensor | None, ref_labels: Tensor | None, sizes: list[int],
        ref_sizes: list[int],
    ) -> tuple[RowLosses, AnyPairs | None]:  # fmt: skip
        criterion = self.criterion
        if isinstance(criterion, ProxyAnchorLoss):
            return super()._rows(ranks, x, labels, y, ref_labels, sizes, ref_sizes)
        every: Tensor = Gathered.apply(ranks, x, sizes)
        own = torch.cat(ranks.gather(labels, sizes)) - self.first  # of other processes' classes: outside of all here
        if isinstance(criterion, SoftTripleLoss):
            mine, others = criterion.own_and_others(every, own)
            rows, pairs = criterion.row_losses_of(Total.apply(ranks, mine), merged(ranks, others)), None
        else:
            pairs = class_pairs(every, own, criterion.weight, criterion.normalize, criterion.impl)
            rows = criterion.row_losses(cast(AnyPairs, MergedPairs(pairs, ranks)))
        first = sum(sizes[: ranks.rank])
        here = slice(first, first + sizes[ranks.rank])
        losses, valid = (t if pairs is None else pairs.restore(t) for t in (rows.losses, rows.valid))
        return RowLosses(losses[here], valid[here], sizes[ranks.rank]), None

    def _proxies(self, how: tuple[Ranks, str, str], x: Tensor, labels: Tensor, sizes: list[int]) -> shared.SharedPairs:
        return shared.of_proxies(self.criterion, self.criterion.weight, how, x, labels, sizes)

    def _number(self, ranks: Ranks, penalty: Penalty) -> Tensor:
        """The penalty is a mean over all classes, of which each process has its own's part."""
        return penalty.number.detach()


class MergedPairs:
    """Pairs of all rows with this process's classes, whose row values are those of all classes."""

    def __init__(self, pairs: AnyPairs, ranks: Ranks) -> None:
        self.pairs, self.ranks = pairs, ranks

    def __getattr__(self, name: str) -> object:
        return getattr(self.pairs, name)

    def reduce(self, *reductions: Reduction) -> tuple[Tensor, ...]:
        found = []
        for row, r in zip(self.pairs.reduce(*reductions), reductions, strict=True):
            if r.op not in ("sum", "logsumexp"):
                raise ValueError(f"classes that are shared out take sums and logsumexps, got op {r.op!r}")
            found.append(Total.apply(self.ranks, row) if r.op == "sum" else merged(self.ranks, row))
        return tuple(found)
