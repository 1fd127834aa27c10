"""flashpair: fused losses for deep metric learning that never store the similarity matrix.

criterion = flashpair.MultiSimilarityLoss()
loss = criterion(embeddings, labels)  # (N, D), (N,) -> scalar
"""

from . import functional
from .criteria import (
    Criterion,
    GeneralizedLiftedStructureLoss,
    LiftedStructureLoss,
    LiftedStructureStarLoss,
    MultiSimilarityLoss,
    NPairsLoss,
    RowLosses,
)
from .neighbours import Nearest, nearest
from .pairs import Pairs, make_pairs
from .primitive import row_reduce
from .reduction import Bound, Reduction
from .references import References
from .screened import Screening, screening
from .transforms import register_transform
from .weights import pair_weights

__version__ = "0.1.0"

__all__ = [
    "Bound",
    "Criterion",
    "GeneralizedLiftedStructureLoss",
    "LiftedStructureLoss",
    "LiftedStructureStarLoss",
    "MultiSimilarityLoss",
    "NPairsLoss",
    "Nearest",
    "Pairs",
    "Reduction",
    "References",
    "RowLosses",
    "Screening",
    "functional",
    "make_pairs",
    "nearest",
    "pair_weights",
    "register_transform",
    "row_reduce",
    "screening",
]
