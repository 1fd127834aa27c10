"""What surrounds an example's training: processes, data, a number for retrieval."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

import flashpair


class Process(NamedTuple):
    """One of `world` processes, the `rank`-th, and the device it computes on."""

    device: torch.device
    rank: int
    world: int

    def say(self, words: str) -> None:
        """Once, not once a process."""
        if self.rank == 0:
            print(words, flush=True)


@contextmanager
def started() -> Iterator[Process]:
    """Under torchrun its process group, of GPUs (nccl) or CPUs (gloo); without torchrun one process."""
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    if "RANK" not in os.environ:
        yield Process(device, 0, 1)
        return
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    yield Process(device, dist.get_rank(), dist.get_world_size())
    # One that fails goes without this, or it would wait for the others. DistributedDataParallel keeps gloo's threads
    # alive past destroy_process_group(): one that still lets go of a tensor while the interpreter ends aborts it.
    dist.barrier()
    dist.destroy_process_group()


class Digits(NamedTuple):
    """Images (N, 64) float32, 0 to 1, and their labels (N,); the same to retrieve, which no training sees."""

    images: Tensor
    labels: Tensor
    unseen_images: Tensor
    unseen_labels: Tensor


def digits(device: torch.device) -> Digits:
    """scikit-learn's 1,797 handwritten digits: 1,024 to train on, the others to retrieve."""
    from sklearn.datasets import load_digits

    found = load_digits()
    images = torch.tensor(found.data, dtype=torch.float32, device=device) / 16
    labels = torch.tensor(found.target, dtype=torch.int64, device=device)
    return Digits(images[:1024], labels[:1024], images[1024:], labels[1024:])


def precision_at_10(embeddings: Tensor, labels: Tensor) -> float:
    """How many of an embedding's ten nearest others, (N, D) by cosine, have its label (N,)."""
    nearest = flashpair.nearest(embeddings, 10, unit=True).indices
    return (labels[nearest] == labels[:, None]).double().mean().item()
