"""Losses of pairs without a softmax, mined or not: binomial deviance (Yi et al., 2014; Wang et al., CVPR 2019, eq. 9),
BinLifted (ibid., supplement, eq. 10), and Multi-Similarity's mining with equal weights (ibid., Table 2).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..core import checks
from ..core.reduction import Reduction
from .base import AnyPairs, Criterion, RowLosses
from .mining import logsumexps, mined_sums


def _mean(total: Tensor, count: Tensor) -> Tensor:
    return total / count.clamp_min(1)


class BinomialDevianceLoss(Criterion):
    """Binomial deviance (Wang et al., 2019, eq. 9), with Multi-Similarity's mining if `epsilon` is given.

    L_i = mean_P log(1 + e^(alpha (base - s))) + mean_N log(1 + e^(beta (s - base))).

    Args:
        alpha, beta: above 0; `base`: lambda (the paper's text says 1, its code 0.5); numbers or learnable tensors ().
        epsilon: the mining margin of eq. 11-12, at least 0; None: no mining. Means are over the mined pairs.
        normalize, reduction, impl: see `Criterion`; "mean" divides by the batch size N (eq. 9 sums). Without a positive
            (negative) pair a row has the other part alone.
    """

    shown = ("alpha", "beta", "base", "epsilon")

    def __init__(
        self,
        alpha: float | Tensor = 2.0,
        beta: float | Tensor = 50.0,
        base: float | Tensor = 0.5,
        epsilon: float | None = None,
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
        positives = {"transform": "softplus", "scale": -self.alpha, "offset": self.alpha * self.base}
        negatives = {"transform": "softplus", "scale": self.beta, "offset": -self.beta * self.base}
        pos, neg, kept_pos, kept_neg = mined_sums(pairs, positives, negatives, self.epsilon)
        losses = _mean(pos, kept_pos) + _mean(neg, kept_neg)
        return RowLosses(losses, torch.maximum(kept_pos, kept_neg) > 0, losses.shape[0])


class BinLiftedLoss(Criterion):
    """BinLifted: half binomial deviance, half LiftedStruct* (Wang et al., 2019, supplement, eq. 10).

    L_i = 1/2 (1/beta sum_N log(1 + e^(beta (s - base))) + 1/beta LSE_N(beta s)
             + 1/alpha sum_P log(1 + e^(alpha (base - s))) + 1/alpha LSE_P(-alpha s)), whose weights eq. 10 gives.

    Args:
        alpha, beta: above 0; `base`: lambda; numbers or learnable tensors ().
        normalized: the binomial halves are means over pairs, as the paper's main text has it, not sums / alpha, beta.
        normalize, reduction, impl: see `Criterion`; "mean" divides by the batch size N. Without a positive (negative)
            pair a row has the other part alone.
    """

    shown = ("alpha", "beta", "base", "normalized")

    def __init__(
        self,
        alpha: float | Tensor = 2.0,
        beta: float | Tensor = 50.0,
        base: float | Tensor = 0.5,
        normalized: bool = False,
        *,
        normalize: bool = True,
        reduction: str = "mean",
        impl: str = "auto",
    ) -> None:
        super().__init__(normalize=normalize, reduction=reduction, impl=impl)
        self.alpha = checks.number(alpha, "alpha", above=0)
        self.beta = checks.number(beta, "beta", above=0)
        self.base = checks.number(base, "base")
        self.normalized = checks.flag(normalized, "normalized")

    def row_losses(self, pairs: AnyPairs) -> RowLosses:
        lse_pos, lse_neg = logsumexps(pairs, self.alpha, self.beta, None)
        pos, neg = pairs.reduce(
            Reduction("sum", "positives", "softplus", scale=-self.alpha, offset=self.alpha * self.base),
            Reduction("sum", "negatives", "softplus", scale=self.beta, offset=-self.beta * self.base),
        )
        some_pos, some_neg = pairs.num_positives(), pairs.num_negatives()
        pos = _mean(pos, some_pos) if self.normalized else pos / self.alpha
        neg = _mean(neg, some_neg) if self.normalized else neg / self.beta
        lifted_pos = torch.where(some_pos > 0, lse_pos, 0.0) / self.alpha
        lifted_neg = torch.where(some_neg > 0, lse_neg, 0.0) / self.beta
        losses = (pos + neg + lifted_pos + lifted_neg) / 2
        return RowLosses(losses, (some_pos + some_neg) > 0, losses.shape[0])


class MinedPairLoss(Criterion):
    """Multi-Similarity's mining with equal weights (Wang et al., 2019, Table 2): L_i = sum_P (1 - s) + sum_N s.

    Args:
        epsilon: the mining margin of eq. 11-12, at least 0.
        weights: ``"unit"``, or ``"row_mean"``: means in place of sums.
        normalize, reduction, impl: see `Criterion`; "mean" divides by the batch size N, unmined rows counting as 0.
    """

    shown = ("epsilon", "weights")

    def __init__(
        self,
        epsilon: float = 0.1,
        weights: str = "unit",
        *,
        normalize: bool = True,
        reduction: str = "mean",
        impl: str = "auto",
    ) -> None:
        super().__init__(normalize=normalize, reduction=reduction, impl=impl)
        self.epsilon = checks.constant(epsilon, "epsilon", at_least=0)
        self.weights = checks.word(weights, ("unit", "row_mean"), "weights")

    def row_losses(self, pairs: AnyPairs) -> RowLosses:
        pos, neg, kept_pos, kept_neg = mined_sums(pairs, {"scale": -1.0, "offset": 1.0}, {}, self.epsilon)
        losses = pos + neg if self.weights == "unit" else _mean(pos, kept_pos) + _mean(neg, kept_neg)
        return RowLosses(losses, kept_pos > 0, losses.shape[0])
