"""Multi-Similarity loss (Wang et al., CVPR 2019, eq. 15).

    L_i = 1/alpha log(1 + sum_P e^(-alpha (s_ip - base))) + 1/beta log(1 + sum_N e^(beta (s_in - base)))

over mined positives P and negatives N (eq. 11-12).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..core import checks
from ..core.row_formula import RowFormula
from ..core.similarity import softplus
from .base import AnyPairs, Criterion, RowLosses
from .mining import logsumexps


class MultiSimilarityLoss(Criterion):
    """Multi-Similarity loss with its mining (Wang et al., 2019, eq. 11-15).

    Args:
        alpha, beta: the positives' and the negatives' weight, above 0; numbers or learnable tensors ().
        base: lambda, the similarity around which pairs are weighted (the paper's text says 1, its code 0.5).
        epsilon: the mining margin, at least 0; None: no mining.
        normalize, reduction, impl: see `Criterion`; "mean" divides by the batch size N, unmined rows counting as 0.
    """

    shown = ("alpha", "beta", "base", "epsilon")

    def __init__(
        self,
        alpha: float | Tensor = 2.0,
        beta: float | Tensor = 50.0,
        base: float | Tensor = 0.5,
        epsilon: float | None = 0.1,
        *,
        normalize: bool = True,
        reduction: str = "mean",
        impl: str = "auto",
    ) -> None:
        super().__init__(normalize=normalize, reduction=reduction, impl=impl)
        self.alpha = checks.number(alpha, "alpha", above=0)
        self.beta = checks.number(beta, "beta", above=0)
        self.base = checks.number(base, "base")
        self.epsilon = None if epsilon is None else checks.constant(epsilon, "epsilon", at_least=0)

    def row_losses(self, pairs: AnyPairs) -> RowLosses:
        pos, neg = logsumexps(pairs, self.alpha, self.beta, self.epsilon)
        losses = softplus(pos + self.alpha * self.base) / self.alpha + softplus(neg - self.beta * self.base) / self.beta
        return RowLosses(losses, torch.maximum(pos.detach(), neg.detach()) != -torch.inf, losses.shape[0])

    def row_formula(self) -> RowFormula:
        shifts = self.alpha * self.base, -self.beta * self.base
        return RowFormula("multi_similarity", (-self.alpha, self.beta), shifts, self.epsilon)
