"""What surrounds an example's training: processes, data, a number for retrieval."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

import flashpair
from flashpair.core.extras import extra


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
    leave()


def leave() -> None:
    """Ends the process group, of a process that has not failed: one that has would wait for the others.

    DistributedDataParallel keeps gloo's threads alive past destroy_process_group(). One that still lets go of a tensor
    while the interpreter ends aborts it, hence the barrier.
    """
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
    images, labels = (part.to(device) for part in _loaded())
    return Digits(images[:1024], labels[:1024], images[1024:], labels[1024:])


def turned_digits() -> Digits:
    """Classes apart: 0 to 4 to train on, in eight orientations that are a class each (40), and 5 to 9 to retrieve.

    All are moved by up to a pixel, those to train on in all nine ways and the others in one. Five classes would be
    told apart within a few steps, by what says nothing about other digits; by the pixels 84 % of neighbours are right.
    """
    images, labels = _loaded()
    padded = nn.functional.pad(images.view(-1, 8, 8), (1, 1, 1, 1))
    moved = padded.unfold(1, 8, 1).unfold(2, 8, 1).reshape(-1, 9, 8, 8)
    seen, unseen = moved[labels < 5], moved[labels >= 5]
    turned = torch.stack([x.rot90(k, (2, 3)) for x in (seen, seen.flip(3)) for k in range(4)])
    classes = labels[labels < 5] + 5 * torch.arange(8)[:, None]
    way = torch.randint(9, (len(unseen),), generator=torch.Generator().manual_seed(0))
    return Digits(
        turned.reshape(-1, 64),
        classes.reshape(-1).repeat_interleave(9),
        unseen[torch.arange(len(unseen)), way].reshape(-1, 64),
        labels[labels >= 5],
    )


def _loaded() -> tuple[Tensor, Tensor]:
    with extra("examples", "this example's data"):
        from sklearn.datasets import load_digits

    found = load_digits()
    return torch.tensor(found.data, dtype=torch.float32) / 16, torch.tensor(found.target, dtype=torch.int64)


def convolutional() -> nn.Module:
    """A network of images (B, 64) to embeddings (B, 32)."""
    return nn.Sequential(
        *(nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 32, 3, padding=1), nn.ReLU()),
        *(nn.MaxPool2d(2), nn.Conv2d(32, 64, 3, padding=1), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(64 * 4 * 4, 32)),
    )


def precision_at_10(embeddings: Tensor, labels: Tensor) -> float:
    """How many of an embedding's ten nearest others, (N, D) by cosine, have its label (N,)."""
    nearest = flashpair.nearest(embeddings, 10, normalize=True).indices
    return (labels[nearest] == labels[:, None]).double().mean().item()
