"""The lifted structure family: the original (Oh Song et al., CVPR 2016, eq. 4), its generalisation over all positives
(Hermans et al., 2017, "batch lifted"; Wang et al., 2019, eq. 6), and LiftedStruct* (Wang et al., 2019, eq. 16).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..core import checks
from ..core.reduction import Reduction
from ..core.row_formula import RowFormula
from .base import AnyPairs, Criterion, RowLosses
from .mining import logsumexps


class LiftedStructureLoss(Criterion):
    """Lifted structured feature embedding (Oh Song et al., 2016, eq. 4), over Euclidean distances D.

    J_ij = log(sum_{N(i)} e^(margin - D_ik) + sum_{N(j)} e^(margin - D_jl)) + D_ij for each positive pair; the loss is
    max(0, J_ij)^2 / 2, averaged over the pairs. A row's loss is its positive pairs' sum.

    Args:
        margin: the negatives' margin, a number or a learnable tensor ().
        normalize, reduction, impl: see `Criterion`; "mean" divides by the number of ordered positive pairs, those
            without any negative counting as 0. As published, embeddings are not normalised.

    Raises:
        ValueError: with `ref_emb`: the loss needs the negatives of both ends of a pair.
    """

    distance = "euclidean"
    takes_references = False
    shown = ("margin",)

    def __init__(
        self, margin: float | Tensor = 1.0, *, normalize: bool = False, reduction: str = "mean", impl: str = "auto"
    ) -> None:
        super().__init__(normalize=normalize, reduction=reduction, impl=impl)
        self.margin = checks.number(margin, "margin")

    def row_losses(self, pairs: AnyPairs) -> RowLosses:
        (neg,) = pairs.reduce(Reduction("logsumexp", "negatives", scale=-1.0))
        reach = neg + self.margin
        (squares,) = pairs.reduce(Reduction("sum", "positives", "lifted", offset=reach, ref_offset=reach))
        positives = pairs.num_positives()
        return RowLosses(squares / 2, positives > 0, positives.sum())


class GeneralizedLiftedStructureLoss(Criterion):
    """Lifted structure over all positives and negatives of an anchor.

    ``distance="cosine"``: max(0, LSE_P(margin - s) + LSE_N(s)) (Wang et al., 2019, eq. 6);
    ``"euclidean"``: max(0, LSE_P(D) + LSE_N(margin - D)) (Hermans et al., 2017).

    Args:
        margin: a number or a learnable tensor ().
        distance: ``"cosine"`` (dot products; cosines when normalised) or ``"euclidean"``.
        normalize, reduction, impl: see `Criterion`; rows without a positive or without a negative have no loss.
    """

    shown = ("margin", "distance")

    def __init__(
        self,
        margin: float | Tensor = 1.0,
        distance: str = "cosine",
        *,
        normalize: bool = True,
        reduction: str = "mean",
        impl: str = "auto",
    ) -> None:
        super().__init__(normalize=normalize, reduction=reduction, impl=impl)
        self.margin = checks.number(margin, "margin")
        checks.word(distance, ("cosine", "euclidean"), "distance")
        self.distance = "dot" if distance == "cosine" else distance

    def hyperparameters(self) -> dict[str, object]:
        return {"margin": self.margin, "distance": "cosine" if self.distance == "dot" else self.distance}

    def row_losses(self, pairs: AnyPairs) -> RowLosses:
        sign = -1.0 if self.distance == "dot" else 1.0
        pos, neg = pairs.reduce(
            Reduction("logsumexp", "positives", scale=sign), Reduction("logsumexp", "negatives", scale=-sign)
        )
        valid = (pairs.num_positives() > 0) & (pairs.num_negatives() > 0)
        total = torch.where(valid, pos, 0.0) + torch.where(valid, neg, 0.0) + self.margin
        return RowLosses(torch.where(valid, total.relu(), 0.0), valid, valid.shape[0])

    def row_formula(self) -> RowFormula:
        sign = -1.0 if self.distance == "dot" else 1.0
        return RowFormula("lifted", (sign, -sign), (self.margin, 0.0))


class LiftedStructureStarLoss(Criterion):
    """LiftedStruct* (Wang et al., 2019, eq. 16), with Multi-Similarity's mining if `epsilon` is given.

    L_i = 1/alpha LSE_P(-alpha s) + 1/beta LSE_N(beta s), without a hinge: it may be negative.

    Args:
        alpha, beta: above 0; numbers or learnable tensors ().
        epsilon: the mining margin of eq. 11-12, at least 0; None: no mining.
        normalize, reduction, impl: see `Criterion`; "mean" divides by the batch size N. Rows without a (mined) positive
            or negative have no loss.
    """

    shown = ("alpha", "beta", "epsilon")

    def __init__(
        self,
        alpha: float | Tensor = 2.0,
        beta: float | Tensor = 50.0,
        epsilon: float | None = None,
        *,
        normalize: bool = True,
        reduction: str = "mean",
        impl: str = "auto",
    ) -> None:
        super().__init__(normalize=normalize, reduction=reduction, impl=impl)
        self.alpha = checks.number(alpha, "alpha", above=0)
        self.beta = checks.number(beta, "beta", above=0)
        self.epsilon = None if epsilon is None else checks.constant(epsilon, "epsilon", at_least=0)

    def row_losses(self, pairs: AnyPairs) -> RowLosses:
        pos, neg = logsumexps(pairs, self.alpha, self.beta, self.epsilon)
        valid = torch.minimum(pos.detach(), neg.detach()) != -torch.inf
        losses = torch.where(valid, pos, 0.0) / self.alpha + torch.where(valid, neg, 0.0) / self.beta
        return RowLosses(losses, valid, valid.shape[0])

    def row_formula(self) -> RowFormula:
        return RowFormula("lifted_star", (-self.alpha, self.beta), epsilon=self.epsilon)
