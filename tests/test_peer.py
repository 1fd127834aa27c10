"""Against pytorch-metric-learning, where its number is right: the same loss from another hand."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_same, batch

import flashpair

peers = pytest.importorskip("pytorch_metric_learning")
from pytorch_metric_learning import distances, losses, miners  # noqa: E402

RAW = {"normalize_embeddings": False}
CASES = {
    "multi-similarity and miner": (
        flashpair.MultiSimilarityLoss(2.0, 50.0, 0.5, 0.1),
        lambda x, y: losses.MultiSimilarityLoss(2.0, 50.0, 0.5)(x, y, miners.MultiSimilarityMiner(0.1)(x, y)),
    ),
    "multi-similarity": (
        flashpair.MultiSimilarityLoss(2.0, 50.0, 0.5, None),
        lambda x, y: losses.MultiSimilarityLoss(2.0, 50.0, 0.5)(x, y),
    ),
    "lifted structure": (
        flashpair.LiftedStructureLoss(1.0),
        lambda x, y: losses.LiftedStructureLoss(1.0, 0.0, distance=distances.LpDistance(**RAW))(x, y),
    ),
    "generalized lifted structure": (
        flashpair.GeneralizedLiftedStructureLoss(1.0, "euclidean"),
        lambda x, y: losses.GeneralizedLiftedStructureLoss(1.0, 0.0)(x, y),
    ),
    "n-pairs": (
        flashpair.NPairsLoss(),
        lambda x, y: losses.NPairsLoss(distance=distances.DotProductSimilarity(**RAW))(x, y),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_same_value_and_gradient(name):
    ours, theirs = CASES[name]
    x, labels = batch(60, 7, 4, torch.float64)
    results = []
    for loss in (ours, theirs):
        a = x.clone().requires_grad_()
        value = loss(a, labels)
        results.append((value.detach(), torch.autograd.grad(value, a)[0]))
    for found, truth in zip(*results, strict=True):
        assert_same(found, truth)
