"""Criteria: one small file a family."""

from .base import Criterion, RowLosses
from .lifted_structure import GeneralizedLiftedStructureLoss, LiftedStructureLoss, LiftedStructureStarLoss
from .multi_similarity import MultiSimilarityLoss
from .npairs import NPairsLoss

__all__ = [
    "Criterion",
    "GeneralizedLiftedStructureLoss",
    "LiftedStructureLoss",
    "LiftedStructureStarLoss",
    "MultiSimilarityLoss",
    "NPairsLoss",
    "RowLosses",
]
