"""CrossBatchMemory's oracle: a batch against itself and a list of the entries before it, by dense matrices."""

from __future__ import annotations

import pytest
import torch

from flashpair import CrossBatchMemory
from flashpair.backends.cpu import screened
from flashpair.backends.reference import ReferencePairs
from flashpair.core.class_pairs import ClassPairs
from flashpair.core.similarity import dense_pairs, l2_normalize, nan_unless_finite
from flashpair.memory import queue

D, SIZE, CLASSES = 6, 23, 4
RAGGED = (7, 9, 1, 6, 9, 12, 23, 3, 0, 5, 8)  # not filled, filled by parts of a batch, all of it displaced, and on


@pytest.fixture(params=["small segments", "one segment", "screened"])
def segment(request, monkeypatch):
    monkeypatch.setattr(queue, "RUN_ROWS", 64 if request.param == "one segment" else 4)
    if request.param == "screened":
        screen_everything(monkeypatch)


def screen_everything(monkeypatch):
    monkeypatch.setattr(screened, "WORTH_PAIRS", -1)
    monkeypatch.setattr(screened, "WORTH_DEPTH", 1)


def batches(sizes=RAGGED, d=D, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(CLASSES, d, generator=generator, dtype=torch.float64)
    for n in sizes:
        labels = torch.randint(CLASSES, (n,), generator=generator) * 7 - 5
        x = centres[(labels + 5) // 7] + torch.randn(n, d, generator=generator, dtype=torch.float64)
        yield x.to(dtype), labels


class DensePairs(ReferencePairs):
    """Anchors (N, D) against themselves, each but for itself, and constants (M, D)."""

    def __init__(self, x, labels, memory, memory_labels, distance):
        z = dense_pairs(x, torch.cat([x, memory]), distance)
        super().__init__(
            z, labels, torch.cat([labels, memory_labels]), square=False, nonfinite=nan_unless_finite(x, memory)
        )
        other = ~torch.eye(*z.shape, dtype=torch.bool)
        self.masks = {side: mask & other for side, mask in self.masks.items()}
        self.embeddings, self.square = x, True

    def class_pairs(self):
        """By hand: of each class the first anchor and the first reference that is another."""
        anchors, positives = [], []
        for c in self.labels.unique():
            i = int((self.labels == c).nonzero()[0])
            others = self.masks["positives"][i].nonzero()
            if len(others):
                anchors.append(i)
                positives.append(int(others[0]))
        place = torch.arange(len(anchors))
        long = {"dtype": torch.int64}
        return ClassPairs(
            torch.tensor(anchors, **long), torch.tensor(positives, **long), place, torch.tensor(len(anchors))
        )


class Oracle:
    """The same as a CrossBatchMemory with a list of all that has come."""

    def __init__(self, criterion, size, d=D):
        self.criterion, self.size = criterion, size
        self.rows, self.labels = torch.zeros(0, d, dtype=torch.float64), torch.zeros(0, dtype=torch.int64)

    def __call__(self, x, labels, enqueue=True):
        unit, prepare = self.criterion.preparation
        own = prepare(x) if prepare is not None else l2_normalize(x) if unit else x
        keep = min(len(self.rows), self.size - len(x) if enqueue else self.size)
        memory, memory_labels = self.rows[len(self.rows) - keep :], self.labels[len(self.rows) - keep :]
        pairs = DensePairs(own, labels, memory, memory_labels, self.criterion.distance)
        loss = self.criterion.of_chunks(x, labels, pairs)
        if enqueue:
            self.rows, self.labels = torch.cat([memory, own.detach()]), torch.cat([memory_labels, labels])
        return loss


def step(loss_of, x, labels, more=(), **options):
    """Loss and gradients of x and of the criterion's parameters, under an upstream gradient that is not 1."""
    a = x.clone().requires_grad_()
    loss = loss_of(a, labels, **options)
    upstream = torch.randn(loss.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    found = torch.autograd.grad(loss, [a, *more], upstream.to(loss.dtype), allow_unused=True)
    return [loss.detach(), *(torch.zeros_like(a) if g is None else g for g in found)]


def both(make, size=SIZE, **options):
    memory = CrossBatchMemory(make(**options).double(), D, size, dtype=torch.float64)
    return memory, Oracle(memory.criterion, size)


def assert_equal_states(found, truth):
    assert found.keys() == truth.keys()
    for name in truth:
        same = torch.equal if isinstance(truth[name], torch.Tensor) else lambda a, b: a == b
        assert same(found[name], truth[name]), name
