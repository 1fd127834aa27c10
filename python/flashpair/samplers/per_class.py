"""Batches of several samples of each of some classes: M of each, or N-pairs."""

from __future__ import annotations

from typing import Any

import torch

from ..core import checks
from .base import Classes, ClassSampler


class MPerClassSampler(ClassSampler):
    """Batches of `m` samples of each of ``batch_size / m`` classes, for every loss of pairs.

    Classes are drawn uniformly, whatever their sizes, and none twice in a batch. The samples of a class are drawn the
    same way; they repeat only if the class has fewer than `m`. A batch lists its samples class by class.

    Args:
        labels: (N,) integers, of the data set's samples.
        m: samples of a class, at least 1.
        batch_size: of one process. Times the number of processes, it must be a multiple of `m`. Processes have
            different classes, except that two of them may share a class that does not fit into one.
        batches: batches of an epoch; None: as many as the data set fills.
        seed: from 0 to below 2^39.
        num_replicas: number of processes; None: torch.distributed's, or 1.
        rank: which process this is; None: torch.distributed's, or 0.

    Raises:
        TypeError: an argument of a wrong type, named.
        ValueError: an argument out of its range, or fewer classes than a batch needs.

    Examples:
        >>> sampler = flashpair.samplers.MPerClassSampler([0, 0, 0, 1, 1, 1], m=3, batch_size=6, batches=1)
        >>> sorted(next(iter(sampler)))
        [0, 1, 2, 3, 4, 5]
    """

    def __init__(
        self, labels: Any, m: int, batch_size: int, *, batches: int | None = None, seed: int = 0,
        num_replicas: int | None = None, rank: int | None = None,
    ) -> None:  # fmt: skip
        self.m = checks.integer(m, "m", at_least=1)
        share = checks.integer(batch_size, "batch_size", at_least=1)
        super().__init__(Classes(labels), share, batches, seed, num_replicas, rank)
        whole = share * self.num_replicas
        if whole % m:
            raise ValueError(f"batch_size times the number of processes must be a multiple of m = {m}, got {whole}")
        self.need(whole // m, "classes", f"batch_size / m = {whole} / {m}")

    def draw(self, generator: torch.Generator) -> list[int]:
        classes = self.classes.some(self.share * self.num_replicas // self.m, generator)
        drawn = self.classes.draw(classes, self.m, generator).flatten()
        return self.mine(drawn, self.share).tolist()


class NPairsSampler(ClassSampler):
    """N-pair batches: two different samples of each of N classes (Sohn, 2016).

    A batch has one sample of each class, the anchors, and then, in the same order of classes, the positives.
    ``x.chunk(2)`` separates them. Classes of one sample are never drawn.

    Args:
        labels: (N,) integers, of the data set's samples.
        classes: classes in a batch of one process; processes have different ones.
        batches: batches of an epoch; None: as many as the data set fills.
        seed: from 0 to below 2^39.
        num_replicas: number of processes; None: torch.distributed's, or 1.
        rank: which process this is; None: torch.distributed's, or 0.

    Raises:
        TypeError: an argument of a wrong type, named.
        ValueError: an argument out of its range, or fewer classes of two samples than a batch needs.

    Examples:
        >>> sampler = flashpair.samplers.NPairsSampler([0, 0, 1, 1], classes=2, batches=1)
        >>> sorted(next(iter(sampler)))
        [0, 1, 2, 3]
    """

    def __init__(
        self, labels: Any, classes: int, *, batches: int | None = None, seed: int = 0, num_replicas: int | None = None,
        rank: int | None = None,
    ) -> None:  # fmt: skip
        self.count = checks.integer(classes, "classes", at_least=1)
        super().__init__(Classes(labels, at_least=2), 2 * classes, batches, seed, num_replicas, rank)
        self.need(classes * self.num_replicas, "classes of two samples or more", "classes")

    def draw(self, generator: torch.Generator) -> list[int]:
        chosen = self.classes.some(self.count * self.num_replicas, generator)
        drawn = self.classes.draw(chosen, 2, generator)
        return self.mine(drawn, self.count).T.flatten().tolist()
