"""The base of every sampler: samples by class, an epoch's batches from a seed, and the share of one process."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import Sampler

from ..core import checks


class Classes:
    """Which samples (int64 places in the data set) each class has, sorted by label.

    Attributes:
        labels: (C,), each class's label.
        sizes: (C,), each class's number of samples.
    """

    def __init__(self, labels: Any, at_least: int = 1) -> None:
        """Of labels (N,), integers: a tensor, an array, a column of a table or a sequence.

        Classes of fewer samples than `at_least` are left out.
        """
        given = _tensor(labels)
        given = checks.labels(given, given.reshape(-1, 1), whose="samples").cpu()
        found, sizes = given.unique(return_counts=True)
        order = given.argsort(stable=True)
        firsts = sizes.cumsum(0) - sizes
        kept = sizes >= at_least
        self.labels, self.sizes, self._firsts, self._order = found[kept], sizes[kept], firsts[kept], order
        self.samples = int(self.sizes.sum())

    def __len__(self) -> int:
        return len(self.labels)

    def some(self, count: int, generator: torch.Generator) -> Tensor:
        """Indices of `count` different classes."""
        return torch.randperm(len(self), generator=generator, device="cpu")[:count]

    def draw(self, classes: Tensor, each: int, generator: torch.Generator) -> Tensor:
        """(len(classes), each) samples. A sample repeats only where its class has fewer than `each`."""
        drawn = []
        for first, size in zip(self._firsts[classes].tolist(), self.sizes[classes].tolist(), strict=True):
            rounds = [torch.randperm(size, generator=generator, device="cpu") for _ in range(-(-each // size))]
            drawn.append(first + torch.cat(rounds)[:each])
        return self._order[torch.stack(drawn)]


def _tensor(labels: Any) -> Tensor:
    """A column of a table, an array of any byte order, or a sequence of numbers or of one-number tensors."""
    given = labels.to_numpy() if callable(getattr(labels, "to_numpy", None)) else labels
    if getattr(getattr(given, "dtype", None), "kind", "") == "O":  # of whole numbers, as tables have them
        given = given.tolist()
    byte_order = getattr(getattr(given, "dtype", None), "byteorder", "=")
    given = given.astype(given.dtype.newbyteorder("=")) if byte_order in ("<", ">") else given
    try:
        return torch.as_tensor(given, device=given.device if isinstance(given, Tensor) else "cpu")
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise TypeError(
            f"labels must be integers, a tensor or a sequence of shape (N,), got {checks.what(labels)}: {error}; of "
            f"text {checks.NUMBERED}"
        ) from error


class ClassSampler(Sampler[list[int]]):
    """Base of the samplers: batches of indices for ``DataLoader(dataset, batch_sampler=...)``; a subclass draws them.

    The batches depend only on the seed and the epoch. Every new iteration is a new epoch. `set_epoch` sets the number
    of the next one, to continue a training that stopped. With several processes, each draws the same global batch and
    takes its own share of it, so all must iterate the same number of times.

    Args:
        classes: the samples by class.
        share: samples in a batch of one process.
        batches: batches in an epoch; None: as many as the data set fills.
        seed: from 0 to below 2^39.
        num_replicas: number of processes; None: torch.distributed's, or 1.
        rank: which one this is; None: torch.distributed's, or 0.

    Raises:
        TypeError: an argument of a wrong type, named.
        ValueError: an argument out of its range, named.

    Examples:
        >>> sampler = flashpair.samplers.NPairsSampler([0, 0, 1, 1], classes=2, batches=3)  # a subclass
        >>> isinstance(sampler, flashpair.samplers.ClassSampler), len(sampler), sampler.batch_size
        (True, 3, 4)
    """

    def __init__(
        self, classes: Classes, share: int, batches: int | None, seed: int, num_replicas: int | None, rank: int | None
    ) -> None:
        joined = dist.is_available() and dist.is_initialized()
        self.classes, self.share = classes, share
        self.num_replicas = (dist.get_world_size() if joined else 1) if num_replicas is None else num_replicas
        checks.integer(self.num_replicas, "num_replicas", at_least=1)
        self.rank = (dist.get_rank() if joined else 0) if rank is None else rank
        checks.integer(self.rank, "rank", range(self.num_replicas))
        self.seed, self.epoch = checks.integer(seed, "seed"), 0
        if seed >= 2**39:
            raise ValueError(f"seed must be below 2^39, which leaves room for epochs, got {seed}")
        self.batches = checks.most(batches, "batches") or max(1, classes.samples // (share * self.num_replicas))

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch of the next iteration, 0 or more."""
        self.epoch = checks.integer(epoch, "epoch")

    def __len__(self) -> int:
        """Batches of an epoch."""
        return self.batches

    @property
    def batch_size(self) -> int:
        """Samples of a batch, for frameworks that split it."""
        return self.share

    def __iter__(self) -> Iterator[list[int]]:
        if self.num_replicas > 1 and "accelerate" in sys.modules:
            _refuse_second_share(sys._getframe(1))
        return self._epoch()

    def _epoch(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed((self.seed << 24) + self.epoch)
        self.epoch += 1
        for _ in range(self.batches):
            yield self.draw(generator)

    def draw(self, generator: torch.Generator) -> list[int]:
        """This process's share of one global batch, as sample indices."""
        raise NotImplementedError

    def mine(self, drawn: Tensor, rows: int) -> Tensor:
        """This process's share of what was drawn for all processes.

        All processes must draw the same, or their generators go out of step.
        """
        return drawn[self.rank * rows :][:rows]

    def need(self, wanted: int, kind: str, asked: str) -> None:
        if wanted > len(self.classes):
            raise ValueError(f"labels must have {wanted} {kind} ({asked}, over all processes), got {len(self.classes)}")


def _refuse_second_share(frame: FrameType | None) -> None:
    """Accelerate wraps a batch sampler without telling it; only the class that iterates shows it."""
    for _ in range(4):  # a BatchSampler of `Flat` is between
        if frame is None:
            return
        if type(frame.f_locals.get("self")).__name__ == "BatchSamplerShard":
            raise RuntimeError(
                "this sampler already gives each process its share, which accelerate would split again: leave the "
                "loader out of prepare, or make global batches (num_replicas=1, rank=0) and prepare them with "
                "split_batches=True"
            )
        frame = frame.f_back


class Flat(Sampler[int]):
    """The samples of a `ClassSampler` one at a time, for frameworks that take no batch sampler.

    Use it as ``DataLoader(dataset, sampler=Flat(batches), batch_size=...)``. To keep the batches together, give the
    loader the batch size of the sampler.

    Args:
        batches: a `ClassSampler`.

    Examples:
        >>> batches = flashpair.samplers.NPairsSampler([0, 0, 1, 1], classes=2, batches=1)
        >>> sorted(flashpair.samplers.Flat(batches))
        [0, 1, 2, 3]
    """

    def __init__(self, batches: ClassSampler) -> None:
        self.batches = batches

    def set_epoch(self, epoch: int) -> None:
        self.batches.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.batches) * self.batches.share

    def __iter__(self) -> Iterator[int]:
        for batch in self.batches:
            yield from batch
