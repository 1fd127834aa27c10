"""What tests of the reality check share: a small protocol, made-up features, a run that stops."""

from __future__ import annotations

import torch

from flashpair.tools.reality_check import (
    Data,
    Protocol,
)
from flashpair.tools.reality_check.study import Progress

SMALL = Protocol(
    trials=3,
    repeats=2,
    embedding_size=6,
    batch_size=16,
    iterations=6,
    evaluate_every=1,
    patience=1,
    max_epochs=4,
    learning_rate=1e-3,
)


def features(classes=18, each=12, seed=0):
    """Classes that differ in four of sixteen features, under noise in all: a network that learns which finds them."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(classes).repeat_interleave(each)
    centres = torch.zeros(classes, 16)
    centres[:, :4] = 2 * torch.randn(classes, 4, generator=generator)
    noise = torch.randn(len(labels), 16, generator=generator) * torch.tensor([1.0] * 4 + [3.0] * 12)
    return Data("made", centres[labels] + noise, labels)


class Trainings(Progress):
    """Counts trainings, and stops the run in the middle of the n-th."""

    def __init__(self, stop=None):
        self.begun, self.stop, self.losses = 0, stop, []

    def at(self, level, done, of, what=""):
        self.losses += [what] if level == "losses" else []
        if level == "epochs" and done == 1:
            self.begun += 1
            if self.begun == self.stop:
                raise KeyboardInterrupt
