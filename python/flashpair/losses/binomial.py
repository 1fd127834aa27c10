"""Losses of pairs without a softmax, mined or not: binomial deviance (Yi et al., 2014; Wang et al., CVPR 2019, eq. 9),
BinLifted (ibid., supplement, eq. 10), and Multi-Similarity's mining with equal weights (ibid., Table 2).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..core import checks
from ..core.pairs import PairAccess
from ..core.reduction import Reduction
from .base import Criterion, RowLosses
from .declaration import MARGIN, SCALE, Search, Source, loss
from .mining import logsumexps, mined_sums
from .papers import WANG_2019, YI_2014


def _mean(total: Tensor, count: Tensor) -> Tensor:
    return total / count.clamp_min(1)


@loss(
    key="binomial_deviance",
    group="pairs",
    sources=(
        Source(YI_2014),
        Source(WANG_2019, "eq. 9"),
    ),
    forms={"": {}, "(epsilon=0.1)": {"epsilon": 0.1}},
    searches={"": Search({"alpha": SCALE, "beta": SCALE, "base": MARGIN})},
)
class BinomialDevianceLoss(Criterion):
    """Binomial deviance: a logistic loss on each pair (Yi et al., 2014; Wang et al., 2019, eq. 9).

    With cosines s, and means over anchor i's positives P and negatives N:

        L_i = mean_P log(1 + e^(alpha (base - s_ip))) + mean_N log(1 + e^(beta (s_in - base)))

    If `epsilon` is given, P and N are the pairs that Multi-Similarity's mining keeps (eq. 11-12). An anchor without
    positives (negatives) has the other term alone.

    Args:
        alpha: scale of the positives, above 0; a number or a learnable tensor ().
        beta: scale of the negatives, above 0; a number or a learnable tensor ().
        base: the similarity at which pairs are split, lambda in the paper (its text says 1, its code 0.5); a number or
            a learnable tensor ().
        epsilon: the mining margin, at least 0; None (the default): no mining.
        normalize: L2-normalise the embeddings and references first (the default).
        reduction: ``"mean"`` (the default) divides by N (eq. 9 sums). Others: see `Criterion`.
        impl: ``"auto"`` (the default) or the name of an implementation; see `Criterion`.

    Shape:
        - embeddings: (N, D), float16 to float64. labels: (N,), integers.
        - ref_emb: (M, D) and ref_labels: (M,), optional.
        - output: (), or (N,) with ``reduction="none"``; float32, or float64 for float64 inputs.

    Raises:
        TypeError: `alpha`, `beta` or `base` is not a number or tensor, `epsilon` not a number, `normalize` not a bool.
        ValueError: `alpha` or `beta` is not above 0, `epsilon` is below 0; an unknown `reduction` or `impl`.

    Examples:
        >>> x = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0], [-0.8, 0.6]])
        >>> labels = torch.tensor([0, 0, 1, 1])
        >>> round(flashpair.BinomialDevianceLoss(beta=10.0)(x, labels).item(), 4)
        1.3636
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

    def row_losses(self, pairs: PairAccess) -> RowLosses:
        positives = {"transform": "softplus", "scale": -self.alpha, "offset": self.alpha * self.base}
        negatives = {"transform": "softplus", "scale": self.beta, "offset": -self.beta * self.base}
        pos, neg, kept_pos, kept_neg = mined_sums(pairs, positives, negatives, self.epsilon)
        losses = _mean(pos, kept_pos) + _mean(neg, kept_neg)
        return RowLosses(losses, torch.maximum(kept_pos, kept_neg) > 0, losses.shape[0])


@loss(
    key="bin_lifted",
    group="pairs",
    sources=(Source(WANG_2019, "supplement, eq. 10"),),
    forms={"": {"normalized": True}},
)
class BinLiftedLoss(Criterion):
    """BinLifted: the average of binomial deviance and LiftedStruct* (Wang et al., 2019, supplement, eq. 10).

    With cosines s, LSE = log-sum-exp, and sums over anchor i's positives P and negatives N:

        L_i = 1/2 (1/alpha sum_P log(1 + e^(alpha (base - s_ip))) + 1/alpha LSE_P(-alpha s_ip)
                 + 1/beta sum_N log(1 + e^(beta (s_in - base))) + 1/beta LSE_N(beta s_in))

    The paper's eq. 10 gives the pair weights; this is a loss with these weights. An anchor without positives
    (negatives) has the other terms alone.

    Args:
        alpha: scale of the positives, above 0; a number or a learnable tensor ().
        beta: scale of the negatives, above 0; a number or a learnable tensor ().
        base: lambda of the paper; a number or a learnable tensor ().
        normalized: take the binomial terms as means over pairs, as in the paper's main text, instead of 1/alpha
            (1/beta) times their sums.
        normalize: L2-normalise the embeddings and references first (the default).
        reduction: ``"mean"`` (the default) divides by N. Others: see `Criterion`.
        impl: ``"auto"`` (the default) or the name of an implementation; see `Criterion`.

    Shape:
        - embeddings: (N, D), float16 to float64. labels: (N,), integers.
        - ref_emb: (M, D) and ref_labels: (M,), optional.
        - output: (), or (N,) with ``reduction="none"``; float32, or float64 for float64 inputs.

    Raises:
        TypeError: `alpha`, `beta` or `base` is not a number or tensor, `normalized` or `normalize` not a bool.
        ValueError: `alpha` or `beta` is not above 0; an unknown `reduction` or `impl`.

    Examples:
        >>> x = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0], [-0.8, 0.6]])
        >>> labels = torch.tensor([0, 0, 1, 1])
        >>> round(flashpair.BinLiftedLoss(beta=10.0)(x, labels).item(), 4)
        0.1261
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

    def row_losses(self, pairs: PairAccess) -> RowLosses:
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


@loss(
    key="mined_pair",
    group="pairs",
    sources=(Source(WANG_2019, "Table 2: mining alone"),),
    forms={"": {"weights": "row_mean"}},
)
class MinedPairLoss(Criterion):
    """Multi-Similarity's mining with equal weights for all mined pairs (Wang et al., 2019, Table 2).

    With cosines s, and the positives P and negatives N that the mining of `MultiSimilarityLoss` keeps:

        L_i = sum_P (1 - s_ip) + sum_N s_in

    Args:
        epsilon: the mining margin of eq. 11-12, at least 0.
        weights: ``"unit"`` (the default), or ``"row_mean"``: means in place of sums.
        normalize: L2-normalise the embeddings and references first (the default).
        reduction: ``"mean"`` (the default) divides by N; anchors without mined pairs count as 0. Others: see
            `Criterion`.
        impl: ``"auto"`` (the default) or the name of an implementation; see `Criterion`.

    Shape:
        - embeddings: (N, D), float16 to float64. labels: (N,), integers.
        - ref_emb: (M, D) and ref_labels: (M,), optional.
        - output: (), or (N,) with ``reduction="none"``; float32, or float64 for float64 inputs.

    Raises:
        TypeError: `epsilon` is not a number, `normalize` not a bool.
        ValueError: `epsilon` is below 0; an unknown `weights`, `reduction` or `impl`.

    Examples:
        >>> x = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0], [-0.8, 0.6]])
        >>> labels = torch.tensor([0, 0, 1, 1])
        >>> round(flashpair.MinedPairLoss()(x, labels).item(), 4)
        0.6
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

    def row_losses(self, pairs: PairAccess) -> RowLosses:
        pos, neg, kept_pos, kept_neg = mined_sums(pairs, {"scale": -1.0, "offset": 1.0}, {}, self.epsilon)
        losses = pos + neg if self.weights == "unit" else _mean(pos, kept_pos) + _mean(neg, kept_neg)
        return RowLosses(losses, kept_pos > 0, losses.shape[0])
