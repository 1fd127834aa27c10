"""DistanceWeightedMiner: how often each negative is drawn, and the probabilities."""

from __future__ import annotations

import pytest
import torch
from helpers import batch
from miner_cases import EVERY

from flashpair import miners
from flashpair.miners import base


def draws(several_positives, count=40000):
    """Draws for one anchor of `count` positive pairs, its negatives at 0.2 to 1.5 from it, and P(n | a)."""
    angles = torch.tensor([0.2, 0.5, 0.7, 0.9, 1.1, 1.3, 1.55, 2.0])
    negatives = torch.stack([angles.cos(), angles.sin(), *torch.zeros(4, 8)], 1)
    anchor, labels = torch.eye(1, 6), torch.arange(1, 9)
    positives = count if several_positives else 1
    refs = torch.cat([negatives, anchor.expand(positives, 6)])
    ref_labels = torch.cat([labels, torch.zeros(positives, dtype=torch.int64)])
    anchors = anchor.expand(count // positives, 6)
    miner = miners.DistanceWeightedMiner(generator=torch.Generator().manual_seed(1))
    args = (anchors, torch.zeros(count // positives, dtype=torch.int64), refs, ref_labels)
    assert miner.probabilities(*args)[:, 8:].eq(0).all()
    return miner(*args), miner.probabilities(*args)[0, :8].double()


@pytest.mark.parametrize("several_positives", [False, True])
def test_draws_are_as_frequent_as_they_are_probable(several_positives):
    (a, p, n), probabilities = draws(several_positives)
    assert len(n) == 40000 and (p >= 8).all() and n.max() < 8
    assert torch.unique(torch.stack([a, p]), dim=1).shape[1] == 40000
    counts, expected = n.bincount(minlength=8), 40000 * probabilities
    assert counts[-1] == 0 and expected[-1] == 0, "too far to be drawn"
    counts, expected = counts[:-1], expected[:-1]
    assert expected.min() > 50 and expected.max() > 4 * expected.min()
    assert ((counts - expected) ** 2 / expected).sum() < 22.5, "chi squared of 6 degrees of freedom: 1 in 1000"
    pairs = torch.bincount(n[:-1] * 8 + n[1:], minlength=64).reshape(8, 8)[:7, :7]
    alone = 39999 * probabilities[:7, None] * probabilities[:7]
    assert ((pairs - alone) ** 2 / alone).sum() < 85.4, "draws do not depend on each other: 48 degrees of freedom"


@pytest.mark.parametrize(("number", "drawn"), [(0.0, 2), (1 - 2**-53, 4)])
def test_the_least_and_the_greatest_random_number(monkeypatch, number, drawn):
    """The first and the last negative that have a weight: no self, no positive, none that is too far."""
    x = torch.tensor([[1.0, 0, 0], [1, 0, 0], [0.8, 0.6, 0], [0.6, 0.8, 0], [0.8, -0.6, 0], [-1, 0, 0], [0.9, 0, 0.1]])
    labels = torch.tensor([0, 0, 1, 2, 3, 4, 0])
    monkeypatch.setattr(torch, "rand", lambda shape, **options: torch.full(shape, number, dtype=options["dtype"]))
    found = miners.DistanceWeightedMiner()(x, labels)
    assert len(found.n) == 6 and (found.n == drawn).all()


def test_negatives_that_are_all_too_far_are_equally_likely():
    x = torch.tensor([[1.0, 0, 0], [1, 0, 0], [-1, 0, 0], [-1, 0, 0], [0, 0, 0]])
    labels = torch.tensor([0, 0, 1, 2, 3])
    found = miners.DistanceWeightedMiner(nonzero_loss_cutoff=0.99).probabilities(x, labels)
    third = 1 / 3
    assert torch.allclose(found[:2], torch.tensor([0, 0, third, third, third]).expand(2, 5))
    open_ended = miners.DistanceWeightedMiner(nonzero_loss_cutoff=2.5).probabilities(x, labels)
    assert torch.allclose(open_ended[0], torch.tensor([0, 0, 0.25, 0.25, 0.5])), "1 / d in three dimensions, to d = 2"


def test_probabilities_of_some_rows(monkeypatch):
    x, labels = batch(40, 5, 4, torch.float32)
    miner = miners.DistanceWeightedMiner()
    whole = miner.probabilities(x, labels)
    monkeypatch.setattr(base, "BLOCK_BYTES", 3 * 40 * 4)
    for first, rows in ((0, 40), (7, 11), (38, 9), (39, None), (40, 3), (50, None), (0, 0)):
        found, truth = miner.probabilities(x, labels, first=first, rows=rows), whole[first:][:rows]
        assert found.shape == truth.shape and torch.allclose(found, truth, rtol=1e-4), (first, rows)


def test_same_generator_same_draws():
    x, labels = batch(40, 5, 4, torch.float32)
    found, again = (EVERY["distance_weighted"]()(x, labels) for _ in range(2))
    assert torch.equal(found.n, again.n)
    miner = EVERY["distance_weighted"]()
    assert not torch.equal(miner(x, labels).n, miner(x, labels).n)
    assert (labels[found.a] == labels[found.p]).all() and (labels[found.a] != labels[found.n]).all()
    assert len(found.a) == 40 * 3
