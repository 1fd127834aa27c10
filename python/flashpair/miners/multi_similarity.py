"""Multi-Similarity's mining (Wang et al., CVPR 2019, eq. 11-12).

negative n is kept if s_an > min_P s - epsilon,  positive p if s_ap < max_N s + epsilon
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ..core import checks
from .base import Block, MinedPairs, Miner


class MultiSimilarityMiner(Miner[MinedPairs]):
    """Multi-Similarity's mining: the pairs that `MultiSimilarityLoss` weights, and no others (Wang et al., 2019, eq.
    11-12).

    With cosines s, P and N the positives and negatives of anchor a:

        negative n is mined if  s_an > min_P s - epsilon
        positive p is mined if  s_ap < max_N s + epsilon

    Comparisons are strict. An anchor without positives or without negatives has no pairs; of any anchor either both
    kinds are mined or neither.

    Args:
        epsilon: the mining margin, at least 0.
        normalize: L2-normalise embeddings and references first (the default).

    Shape:
        - embeddings: (N, D), float16 to float64. labels: (N,), integers.
        - ref_emb: (M, D) and ref_labels: (M,), optional.
        - output: `MinedPairs`, indices (P,), (P,), (Q,), (Q,).

    Raises:
        TypeError: `epsilon` is not a number, or `normalize` not a bool.
        ValueError: `epsilon` is below 0.

    Examples:
        >>> x = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0], [-0.8, 0.6]])
        >>> labels = torch.tensor([0, 0, 1, 1])
        >>> pairs = flashpair.miners.MultiSimilarityMiner()(x, labels)
        >>> pairs.a1.tolist(), pairs.p.tolist(), pairs.a2.tolist(), pairs.n.tolist()
        ([1, 2], [0, 3], [1, 2], [2, 1])
    """

    shown = ("epsilon",)
    mined = MinedPairs

    def __init__(self, epsilon: float = 0.1, *, normalize: bool = True) -> None:
        super().__init__(normalize=normalize)
        self.epsilon = checks.constant(epsilon, "epsilon", at_least=0)

    def mine(self, block: Block) -> Iterator[MinedPairs]:
        z = block.z
        lowest = torch.where(block.positives, z, torch.inf).amin(1, keepdim=True)
        negatives = block.negatives & (z > lowest - self.epsilon)
        # If the highest negative is not mined, nothing is: the maximum over mined negatives serves both sides.
        highest = torch.where(negatives, z, -torch.inf).amax(1, keepdim=True)
        positives = block.positives & (z < highest + self.epsilon)
        negatives &= positives.any(1, keepdim=True)
        a1, p = positives.nonzero(as_tuple=True)
        a2, n = negatives.nonzero(as_tuple=True)
        yield MinedPairs(a1 + block.first, p, a2 + block.first, n)
