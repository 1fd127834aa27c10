"""What the miners' tests share: one of every kind, batches, and indices as lists."""

from __future__ import annotations

import torch
from helpers import batch

from flashpair import miners

TRIPLET_KINDS = ["semihard", "semihard_all", "hard_all", "violating"]
EVERY = {
    "multi_similarity": miners.MultiSimilarityMiner,
    "batch_hard": miners.BatchHardMiner,
    **{kind: lambda kind=kind: miners.TripletMarginMiner(0.2, triplets=kind) for kind in TRIPLET_KINDS},
    "distance_weighted": lambda: miners.DistanceWeightedMiner(generator=torch.Generator().manual_seed(5)),
}


def listed(*indices):
    return torch.stack(indices).T.tolist()


def with_references(references, n=60, dtype=torch.float64):
    """A batch, or its first third against all of it with one class that nobody else has."""
    x, labels = batch(n, 6, 5, dtype)
    return (x[: n // 3], labels[: n // 3], x + 0.1, labels % 7) if references else (x, labels)
