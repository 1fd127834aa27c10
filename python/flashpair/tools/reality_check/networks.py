"""Networks small enough to be trained from scratch in a comparison."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

HIDDEN = 256


class Standardized(nn.Module):
    """A network whose samples are standardized: minus the mean, over the standard deviation, by feature or channel."""

    mean: Tensor
    inverse: Tensor

    def __init__(self, network: nn.Module, samples: Tensor) -> None:
        super().__init__()
        self.network = network
        over = [axis for axis in range(samples.dim()) if axis != 1]
        spread, mean = torch.std_mean(samples.double(), dim=over, keepdim=True, correction=0)
        self.register_buffer("mean", mean.float())
        self.register_buffer("inverse", torch.where(spread > 0, 1 / spread, 0.0).float())

    def forward(self, x: Tensor) -> Tensor:
        embeddings: Tensor = self.network((x - self.mean) * self.inverse)
        return embeddings


def network(shape: Sequence[int], embedding_size: int) -> nn.Module:
    """Two linear layers for features (F,); for images (C, H, W) convolutions, halved until they are about 4 x 4."""
    if len(shape) == 1:
        return nn.Sequential(nn.Linear(shape[0], HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, embedding_size))
    channels, height, width = shape
    layers: list[nn.Module] = []
    wide = 32
    while min(height, width) > 4:
        layers += [nn.Conv2d(channels, wide, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
        channels, height, width, wide = wide, height // 2, width // 2, min(2 * wide, HIDDEN)
    layers += [nn.Conv2d(channels, wide, 3, padding=1), nn.ReLU(), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(wide * height * width, embedding_size))
