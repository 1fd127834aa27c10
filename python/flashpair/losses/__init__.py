"""Losses, one small file for each family. Made by tests/support/generated.py."""

from .angular import AngularLoss
from .base import Criterion, RowLosses, Terms
from .binomial import BinLiftedLoss, BinomialDevianceLoss, MinedPairLoss
from .circle import CircleLoss
from .class_loss import ClassCriterion
from .classification import ArcFaceLoss, CosFaceLoss, NormalizedSoftmaxLoss, SphereFaceLoss
from .contrastive import ContrastiveLoss, SNRContrastiveLoss
from .histogram import FastAPLoss, HistogramLoss
from .lifted_structure import GeneralizedLiftedStructureLoss, LiftedStructureLoss, LiftedStructureStarLoss
from .margin import MarginLoss
from .multi_similarity import MultiSimilarityLoss
from .npairs import NPairsLoss
from .proxies import ProxyAnchorLoss, ProxyNCALoss
from .soft_triple import SoftTripleLoss
from .softmax import NCALoss, NTXentLoss, SupConLoss
from .triplet import TripletMarginLoss
from .tuplet_margin import IntraPairVarianceLoss, TupletMarginLoss

__all__ = [
    "AngularLoss",
    "ArcFaceLoss",
    "BinLiftedLoss",
    "BinomialDevianceLoss",
    "CircleLoss",
    "ClassCriterion",
    "ContrastiveLoss",
    "CosFaceLoss",
    "Criterion",
    "FastAPLoss",
    "GeneralizedLiftedStructureLoss",
    "HistogramLoss",
    "IntraPairVarianceLoss",
    "LiftedStructureLoss",
    "LiftedStructureStarLoss",
    "MarginLoss",
    "MinedPairLoss",
    "MultiSimilarityLoss",
    "NCALoss",
    "NPairsLoss",
    "NTXentLoss",
    "NormalizedSoftmaxLoss",
    "ProxyAnchorLoss",
    "ProxyNCALoss",
    "RowLosses",
    "SNRContrastiveLoss",
    "SoftTripleLoss",
    "SphereFaceLoss",
    "SupConLoss",
    "Terms",
    "TripletMarginLoss",
    "TupletMarginLoss",
]
