"""The two trainings: network, data and evaluation. Nothing here is timed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..demo import train as demo

CLASSES, UNSEEN = 2000, 500
LATENT, INPUTS, HIDDEN, D = 64, 256, 512, 128
PER_CLASS = 4
WITHIN = 0.4  # standard deviation of a latent coordinate within a class, where that of centres is 1


class Training(NamedTuple):
    """One training.

    Args:
        title: for table and picture.
        net: from inputs (N, ...) to embeddings (N, d).
        batches: endless: inputs, and labels (N,), `per_class` of each class.
        evaluate: measures retrieval of classes that are not trained on.
    """

    title: str
    net: nn.Module
    batches: Iterator[tuple[Tensor, Tensor]]
    n: int
    d: int
    per_class: int
    learning_rate: float
    evaluate: Callable[[nn.Module], dict[str, float]]


def digits(steps: int, seed: int) -> Training:
    """demo.py's: a small convolutional network, digits 0-4 in eight orientations, judged on 5-9."""
    data = demo.load()
    n = len(data.classes) * demo.PER_CLASS
    return Training(
        "scikit-learn's digits",
        demo.network(seed),
        demo.batches(data.classes, steps, seed),
        n,
        64,
        demo.PER_CLASS,
        demo.LEARNING_RATE,
        lambda net: demo.evaluate(net, data),
    )


def synthetic(n: int, seed: int) -> Training:
    """Classes around centres of a latent space, mapped by a fixed random network, and a perceptron to train on them."""
    generator = torch.Generator().manual_seed(seed)
    first = torch.randn(LATENT, INPUTS, generator=generator) / LATENT**0.5
    second = 2 * torch.randn(INPUTS, INPUTS, generator=generator) / INPUTS**0.5
    centres = torch.randn(CLASSES + UNSEEN, LATENT, generator=generator)

    def draw(classes: Tensor) -> tuple[Tensor, Tensor]:  # (K,) -> (4 K, INPUTS), (4 K,)
        labels = classes.repeat_interleave(PER_CLASS)
        latent = centres[labels] + WITHIN * torch.randn(len(labels), LATENT, generator=generator)
        return torch.sin(1.5 * torch.tanh(latent @ first) @ second), labels

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            yield draw(torch.randperm(CLASSES, generator=generator)[: n // PER_CLASS])

    images, labels = draw(torch.arange(CLASSES, CLASSES + UNSEEN))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = nn.Sequential(
            *(nn.Linear(INPUTS, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, D))
        )

    @torch.no_grad()
    def evaluate(net: nn.Module) -> dict[str, float]:
        return demo.judged(net(images), labels)

    title = f"synthetic, {CLASSES:,} classes"
    return Training(title, net, batches(), n, D, PER_CLASS, 1e-3, evaluate)
