"""Margin loss with pytorch-metric-learning's penalty on its one boundary."""

from __future__ import annotations

import torch
from torch import Tensor

from ..losses.margin import MarginLoss


class MarginLossWithPenalty(MarginLoss):
    """`flashpair.MarginLoss` plus ``penalty * beta``, which nothing divides, in batches with a triplet.

    Args:
        penalty: above 0. The others: `flashpair.MarginLoss`, with ``mode="triplets"``, ``reduction="nonzero"`` and one
            learned boundary.
    """

    shown: tuple[str, ...] = (*MarginLoss.shown, "penalty")

    def __init__(self, margin: float, beta: Tensor, penalty: float, *, normalize: bool, impl: str) -> None:
        super().__init__(margin, 0.0, beta, "triplets", True, normalize=normalize, reduction="nonzero", impl=impl)
        self.penalty = penalty

    def regularizer(self, x: Tensor, labels: Tensor, y: Tensor | None, ref_labels: Tensor | None) -> Tensor | None:
        others = labels if ref_labels is None else ref_labels
        if 0 in (labels.shape[0], others.shape[0]):
            return None
        if ref_labels is None:
            ordered = labels.sort().values
            some = (ordered[1:] == ordered[:-1]).any()
        else:
            some = torch.isin(labels, others).any()
        some = some & (others.min() != others.max())
        return torch.where(some, self.penalty * self.beta, 0.0)
