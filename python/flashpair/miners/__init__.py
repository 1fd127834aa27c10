"""Miners: indices of the pairs and triplets that are worth a loss, one small file for each family.

The losses mine inside their own passes and need none of these. Use them to see the indices, or to pass them to a loss
of another package: the tuples are those that pytorch-metric-learning's losses take.
"""

from .base import MinedPairs, Miner, Triplets
from .distance_weighted import DistanceWeightedMiner
from .hard_classes import hard_classes
from .multi_similarity import MultiSimilarityMiner
from .triplet import BatchHardMiner, TripletMarginMiner

__all__ = [
    "BatchHardMiner",
    "DistanceWeightedMiner",
    "MinedPairs",
    "Miner",
    "MultiSimilarityMiner",
    "TripletMarginMiner",
    "Triplets",
    "hard_classes",
]
