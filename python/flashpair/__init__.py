"""flashpair: fused losses for deep metric learning that never store the similarity matrix.

criterion = flashpair.MultiSimilarityLoss()
loss = criterion(embeddings, labels)  # (N, D), (N,) -> scalar

The examples in the docstrings start after ``import torch, flashpair``.
"""

from . import distributed, functional, losses, metrics, miners, samplers
from .backends.cpu.screened import Screening, screening
from .chunked.streamed_references import StreamedReferences
from .core.pairs import PairAccess, PairReducer
from .core.reduction import Bound, Reduction, histogram
from .core.transforms import register_transform
from .engine.cached_references import References
from .engine.nearest import Nearest, nearest
from .engine.pairs import Pairs, make_pairs
from .engine.row_reduce import row_reduce
from .losses import *  # noqa: F403
from .losses.pair_weights import pair_weights
from .memory.cross_batch_memory import CrossBatchMemory
from .memory.grad_cache import GradCache

__version__ = "0.2.0"

__all__ = [
    "Bound",
    "CrossBatchMemory",
    "GradCache",
    "Nearest",
    "PairAccess",
    "PairReducer",
    "Pairs",
    "Reduction",
    "References",
    "Screening",
    "StreamedReferences",
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
__all__ += losses.__all__
