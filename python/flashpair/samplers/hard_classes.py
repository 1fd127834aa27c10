"""Batches of classes that the network confuses with one another."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..core import checks
from ..miners.hard_classes import AGGREGATES, hard_classes
from .base import Classes, ClassSampler

EMBEDDED = 1024  # samples that `embed` is given at a time


class HardClassSampler(ClassSampler):
    """Hard negative class mining before each batch (Sohn, 2016, section 3.2.3).

    For each batch, the sampler embeds two samples of each of `candidates` random classes. It chooses one of these
    classes at random, and then the classes that violate the triplet constraint most (`flashpair.miners.hard_classes`).
    The batch has new samples of the chosen classes. Memory holds the candidates' embeddings. A DataLoader with workers
    asks for batches ahead of time, so the network that mines is some steps old.

    Args:
        labels: (N,) integers, of the data set's samples; classes of one sample are never drawn.
        embed: a function from sample indices, int64 (n,) with n up to 1,024, to embeddings (n, D), float16 to float64,
            on any device. It is called without gradients, and does not change the network's mode.
        classes: classes in a batch of one process; processes have different ones.
        m: samples of a class. With 2 the anchors come first, then the positives, as in `NPairsSampler`.
        candidates: how many classes to choose from; None: ten times the number chosen, or all.
        aggregate: ``"max"`` (the default) or ``"sum"``, over the classes already chosen, of a class's violations.
        batches: batches of an epoch; None: as many as the data set fills.
        seed: from 0 to below 2^39.
        num_replicas: number of processes; None: torch.distributed's, or 1. All embed the same candidates, and choose
            the same classes as long as their networks compute the same numbers.
        rank: which process this is; None: torch.distributed's, or 0.

    Raises:
        TypeError: an argument of a wrong type, named.
        ValueError: an argument out of its range, or fewer classes of two samples than a batch needs.

    Examples:
        >>> points = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0], [0.6, 0.8], [0.6, 0.8]])
        >>> sampler = flashpair.samplers.HardClassSampler(
        ...     [0, 0, 1, 1, 2, 2], lambda places: points[places], classes=3, batches=1
        ... )
        >>> sorted(next(iter(sampler)))
        [0, 1, 2, 3, 4, 5]
    """

    def __init__(
        self, labels: Any, embed: Callable[[Tensor], Tensor], classes: int, *, m: int = 2,
        candidates: int | None = None, aggregate: str = "max", batches: int | None = None, seed: int = 0,
        num_replicas: int | None = None, rank: int | None = None,
    ) -> None:  # fmt: skip
        self.count, self.m = checks.integer(classes, "classes", at_least=1), checks.integer(m, "m", at_least=1)
        self.embed, self.aggregate = embed, checks.word(aggregate, AGGREGATES, "aggregate")
        super().__init__(Classes(labels, at_least=2), classes * m, batches, seed, num_replicas, rank)
        chosen = classes * self.num_replicas
        self.need(chosen, "classes of two samples or more", "classes")
        self.candidates = min(checks.most(candidates, "candidates") or 10 * chosen, len(self.classes))
        if self.candidates < chosen:
            raise ValueError(f"candidates must be at least the classes of all processes, {chosen}, got {candidates}")

    def draw(self, generator: torch.Generator) -> list[int]:
        candidates = self.classes.some(self.candidates, generator)
        places = self.classes.draw(candidates, 2, generator).T.flatten()
        with torch.no_grad():
            found = [self._embedded(some) for some in places.split(EMBEDDED)]
            anchors, positives = torch.cat(found).chunk(2)
            chosen = hard_classes(
                anchors, positives, self.count * self.num_replicas, aggregate=self.aggregate, generator=generator
            ).cpu()
        drawn = self.classes.draw(candidates[chosen], self.m, generator)
        return self.mine(drawn, self.count).T.flatten().tolist()

    def _embedded(self, places: Tensor) -> Tensor:
        found = self.embed(places)
        if not isinstance(found, Tensor) or found.dtype not in checks.FLOATS:
            takes = f"floating-point embeddings ({len(places)}, D) of as many places"
            raise TypeError(f"embed must return {takes}, got {checks.what(found)}{checks.to_tensor(found)}")
        if found.dim() != 2 or found.shape[0] != len(places) or found.shape[1] == 0:
            raise ValueError(f"embed must return embeddings ({len(places)}, D), D > 0, got {checks.what(found)}")
        return found
