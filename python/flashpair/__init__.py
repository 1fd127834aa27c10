"""flashpair: fused losses for deep metric learning that never store the similarity matrix.

criterion = flashpair.MultiSimilarityLoss()
loss = criterion(embeddings, labels)  # (N, D), (N,) -> scalar
"""

from . import distributed, functional, metrics, miners, samplers
from .criteria import (
    AngularLoss,
    ArcFaceLoss,
    BinLiftedLoss,
    BinomialDevianceLoss,
    CircleLoss,
    ClassCriterion,
    ContrastiveLoss,
    CosFaceLoss,
    Criterion,
    FastAPLoss,
    GeneralizedLiftedStructureLoss,
    HistogramLoss,
    IntraPairVarianceLoss,
    LiftedStructureLoss,
    LiftedStructureStarLoss,
    MarginLoss,
    MinedPairLoss,
    MultiSimilarityLoss,
    NCALoss,
    NormalizedSoftmaxLoss,
    NPairsLoss,
    NTXentLoss,
    ProxyAnchorLoss,
    ProxyNCALoss,
    RowLosses,
    SNRContrastiveLoss,
    SoftTripleLoss,
    SphereFaceLoss,
    SupConLoss,
    Terms,
    TripletMarginLoss,
    TupletMarginLoss,
)
from .cross_batch_memory import CrossBatchMemory
from .grad_cache import GradCache
from .neighbours import Nearest, nearest
from .pairs import Pairs, make_pairs
from .primitive import row_reduce
from .reduction import Bound, Reduction, histogram
from .references import References
from .screened import Screening, screening
from .stream import StreamedReferences
from .transforms import register_transform
from .weights import pair_weights

__version__ = "0.2.0"

__all__ = [
    "AngularLoss",
    "ArcFaceLoss",
    "BinLiftedLoss",
    "BinomialDevianceLoss",
    "Bound",
    "CircleLoss",
    "ClassCriterion",
    "ContrastiveLoss",
    "CosFaceLoss",
    "Criterion",
    "CrossBatchMemory",
    "FastAPLoss",
    "GeneralizedLiftedStructureLoss",
    "GradCache",
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
    "Nearest",
    "NormalizedSoftmaxLoss",
    "Pairs",
    "ProxyAnchorLoss",
    "ProxyNCALoss",
    "Reduction",
    "References",
    "RowLosses",
    "SNRContrastiveLoss",
    "Screening",
    "SoftTripleLoss",
    "SphereFaceLoss",
    "StreamedReferences",
    "SupConLoss",
    "Terms",
    "TripletMarginLoss",
    "TupletMarginLoss",
    "distributed",
    "functional",
    "histogram",
    "make_pairs",
    "metrics",
    "miners",
    "nearest",
    "pair_weights",
    "register_transform",
    "row_reduce",
    "samplers",
    "screening",
]
