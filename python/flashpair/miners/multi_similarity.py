"""Multi-Similarity's mining (Wang et al., CVPR 2019, eq. 11-12).

negative n is kept if s_an > min_P s - epsilon,  positive p if s_ap < max_N s + epsilon
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ..core import checks
from .base import Block, MinedPairs, Miner


class MultiSimilarityMiner(Miner[MinedPairs]):
    """The pairs that `MultiSimilarityLoss` of the same epsilon weights, and no others (Wang et al., 2019, eq. 11-12).

    Comparisons are strict; an anchor without positives or without negatives has no pairs. Of an anchor either both
    kinds are mined or neither.

    Args:
        epsilon: the mining margin, at least 0.
        normalize: see `Miner`.
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
        # A highest negative that is not kept leaves nothing to mine: one comparison decides of both kinds.
        highest = torch.where(negatives, z, -torch.inf).amax(1, keepdim=True)
        positives = block.positives & (z < highest + self.epsilon)
        negatives &= positives.any(1, keepdim=True)
        a1, p = positives.nonzero(as_tuple=True)
        a2, n = negatives.nonzero(as_tuple=True)
        yield MinedPairs(a1 + block.first, p, a2 + block.first, n)
