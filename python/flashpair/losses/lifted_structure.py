"""The lifted structure family: the original (Oh Song et al., CVPR 2016, eq. 4), its generalisation over all positives
(Hermans et al., 2017, "batch lifted"; Wang et al., 2019, eq. 6), and LiftedStruct* (Wang et al., 2019, eq. 16).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..core import checks
from ..core.pairs import PairAccess
from ..core.reduction import Reduction
from ..core.row_formula import RowFormula
from .base import Criterion, RowLosses
from .declaration import Range, Search, Source, loss
from .mining import logsumexps
from .papers import HERMANS_2017, OH_SONG_2016, WANG_2019


@loss(
    key="lifted_structure",
    group="pairs",
    sources=(Source(OH_SONG_2016, "eq. 4"),),
)
class LiftedStructureLoss(Criterion):
    """Lifted structured feature embedding, the original form (Oh Song et al., 2016, eq. 4).

    With Euclidean distances D, for each ordered positive pair (i, j):

        J_ij = log(sum_{k in N(i)} e^(margin - D_ik) + sum_{l in N(j)} e^(margin - D_jl)) + D_ij
        loss of the pair = max(0, J_ij)^2 / 2

    An anchor's loss is the sum of its positive pairs'. As published, embeddings are not normalised.

    Args:
        margin: the negatives' margin; a number or a learnable tensor ().
        normalize: L2-normalise the embeddings and references first; by default they are taken as they are.
        reduction: ``"mean"`` (the default) divides by the number of ordered positive pairs; those without any negative
            count as 0. Others: see `Criterion`.
        impl: ``"auto"`` (the default) or the name of an implementation; see `Criterion`.

    Shape:
        - embeddings: (N, D), float16 to float64. labels: (N,), integers. No references.
        - output: (), or (N,) with ``reduction="none"``; float32, or float64 for float64 inputs.

    Raises:
        TypeError: `margin` is not a number or tensor, `normalize` not a bool.
        ValueError: an unknown `reduction` or `impl`; in a call, `ref_emb` (the loss needs the negatives of both ends of
            a pair).

    Examples:
        >>> x = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0], [-0.8, 0.6]])
        >>> labels = torch.tensor([0, 0, 1, 1])
        >>> round(flashpair.LiftedStructureLoss()(x, labels).item(), 4)
        2.0998
    """

    distance = "euclidean"
    takes_references = False
    shown = ("margin",)

    def __init__(
        self, margin: float | Tensor = 1.0, *, normalize: bool = False, reduction: str = "mean", impl: str = "auto"
    ) -> None:
        super().__init__(normalize=normalize, reduction=reduction, impl=impl)
        self.margin = checks.number(margin, "margin")

    def row_losses(self, pairs: PairAccess) -> RowLosses:
        (neg,) = pairs.reduce(Reduction("logsumexp", "negatives", scale=-1.0))
        reach = neg + self.margin
        (squares,) = pairs.reduce(Reduction("sum", "positives", "lifted", offset=reach, ref_offset=reach))
        positives = pairs.num_positives()
        return RowLosses(squares / 2, positives > 0, positives.sum())


@loss(
    key="generalized_lifted_structure",
    group="pairs",
    sources=(
        Source(HERMANS_2017),
        Source(WANG_2019, "eq. 6"),
    ),
    forms={"": {}, "(distance='euclidean')": {"distance": "euclidean"}},
    searches={"": Search({"margin": Range(0.0, 2.0)}, {"distance": "euclidean"})},
)
class GeneralizedLiftedStructureLoss(Criterion):
    """Lifted structure over all positives and all negatives of an anchor (Hermans et al., 2017).

    LSE is the log-sum-exp over anchor i's positives P or negatives N:

        L_i = max(0, LSE_P(D_ip) + LSE_N(margin - D_in))    distance="euclidean" (Hermans et al., 2017)
        L_i = max(0, LSE_P(margin - s_ip) + LSE_N(s_in))    distance="cosine" (Wang et al., 2019, eq. 6)

    Anchors without a positive or without a negative have no loss.

    Args:
        margin: a number or a learnable tensor ().
        distance: ``"cosine"`` (the default; dot products if ``normalize=False``) or ``"euclidean"``.
        normalize: L2-normalise the embeddings and references first (the default).
        reduction: ``"mean"`` (the default) divides by N. Others: see `Criterion`.
        impl: ``"auto"`` (the default) or the name of an implementation; see `Criterion`.

    Shape:
        - embeddings: (N, D), float16 to float64. labels: (N,), integers.
        - ref_emb: (M, D) and ref_labels: (M,), optional.
        - output: (), or (N,) with ``reduction="none"``; float32, or float64 for float64 inputs.

    Raises:
        TypeError: `margin` is not a number or tensor, `normalize` not a bool.
        ValueError: an unknown `distance`, `reduction` or `impl`.

    Examples:
        >>> x = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0], [-0.8, 0.6]])
        >>> labels = torch.tensor([0, 0, 1, 1])
        >>> round(flashpair.GeneralizedLiftedStructureLoss()(x, labels).item(), 4)
        1.1711
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

    def row_losses(self, pairs: PairAccess) -> RowLosses:
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


@loss(
    key="lifted_structure_star",
    group="pairs",
    sources=(Source(WANG_2019, "eq. 16"),),
    forms={"": {}, "(epsilon=0.1)": {"epsilon": 0.1}},
)
class LiftedStructureStarLoss(Criterion):
    """LiftedStruct*: lifted structure with scales and without a hinge (Wang et al., 2019, eq. 16).

    With cosines s, and LSE the log-sum-exp over anchor i's positives P or negatives N:

        L_i = 1/alpha LSE_P(-alpha s_ip) + 1/beta LSE_N(beta s_in)

    The loss can be negative. If `epsilon` is given, P and N are the pairs that Multi-Similarity's mining keeps (eq.
    11-12). Anchors without a (mined) positive or negative have no loss.

    Args:
        alpha: scale of the positives, above 0; a number or a learnable tensor ().
        beta: scale of the negatives, above 0; a number or a learnable tensor ().
        epsilon: the mining margin, at least 0; None (the default): no mining.
        normalize: L2-normalise the embeddings and references first (the default).
        reduction: ``"mean"`` (the default) divides by N. Others: see `Criterion`.
        impl: ``"auto"`` (the default) or the name of an implementation; see `Criterion`.

    Shape:
        - embeddings: (N, D), float16 to float64. labels: (N,), integers.
        - ref_emb: (M, D) and ref_labels: (M,), optional.
        - output: (), or (N,) with ``reduction="none"``; float32, or float64 for float64 inputs.

    Raises:
        TypeError: `alpha` or `beta` is not a number or tensor, `epsilon` not a number, `normalize` not a bool.
        ValueError: `alpha` or `beta` is not above 0, `epsilon` is below 0; an unknown `reduction` or `impl`.

    Examples:
        >>> x = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0], [-0.8, 0.6]])
        >>> labels = torch.tensor([0, 0, 1, 1])
        >>> round(flashpair.LiftedStructureStarLoss()(x, labels).item(), 4)
        -0.2
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

    def row_losses(self, pairs: PairAccess) -> RowLosses:
        pos, neg = logsumexps(pairs, self.alpha, self.beta, self.epsilon)
        valid = torch.minimum(pos.detach(), neg.detach()) != -torch.inf
        losses = torch.where(valid, pos, 0.0) / self.alpha + torch.where(valid, neg, 0.0) / self.beta
        return RowLosses(losses, valid, valid.shape[0])

    def row_formula(self) -> RowFormula:
        return RowFormula("lifted_star", (-self.alpha, self.beta), epsilon=self.epsilon)
