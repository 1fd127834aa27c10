"""Multi-Similarity loss (Wang et al., CVPR 2019, eq. 15).

    L_i = 1/alpha log(1 + sum_P e^(-alpha (s_ip - base))) + 1/beta log(1 + sum_N e^(beta (s_in - base)))

over mined positives P and negatives N (eq. 11-12).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..core import checks
from ..core.pairs import PairAccess
from ..core.row_formula import RowFormula
from ..core.similarity import softplus
from .base import Criterion, RowLosses
from .declaration import MARGIN, SCALE, Range, Search, Source, loss
from .mining import logsumexps
from .papers import WANG_2019


@loss(
    key="multi_similarity",
    group="pairs",
    sources=(Source(WANG_2019, "eq. 11-15"),),
    note="`epsilon=None`: no mining",
    forms={"": {}, "(epsilon=None)": {"epsilon": None}},
    searches={
        "": Search({"alpha": Range(0.5, 50.0, log=True), "beta": SCALE, "base": MARGIN, "epsilon": MARGIN}),
        "_unmined": Search({"alpha": Range(0.5, 50.0, log=True), "beta": SCALE, "base": MARGIN}, {"epsilon": None}),
    },
)
class MultiSimilarityLoss(Criterion):
    """Multi-Similarity loss with its pair mining (Wang et al., 2019, eq. 11-15).

    With cosines s, over the mined positives P and negatives N of anchor i:

        L_i = 1/alpha log(1 + sum_P e^(-alpha (s_ip - base))) + 1/beta log(1 + sum_N e^(beta (s_in - base)))

    A negative is mined if s_in > (lowest positive) - epsilon, a positive if s_ip < (highest negative) + epsilon.

    Args:
        alpha: scale of the positives, above 0; a number or a learnable tensor ().
        beta: scale of the negatives, above 0; a number or a learnable tensor ().
        base: the similarity around which pairs are weighted, lambda in the paper (its text says 1, its code 0.5); a
            number or a learnable tensor ().
        epsilon: the mining margin, at least 0; None: no mining.
        normalize: L2-normalise the embeddings and references first (the default).
        reduction: ``"mean"`` (the default) divides by N; anchors without mined pairs count as 0. Others: see
            `Criterion`.
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
        >>> round(flashpair.MultiSimilarityLoss()(x, labels).item(), 4)
        0.2995
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

    def row_losses(self, pairs: PairAccess) -> RowLosses:
        pos, neg = logsumexps(pairs, self.alpha, self.beta, self.epsilon)
        losses = softplus(pos + self.alpha * self.base) / self.alpha + softplus(neg - self.beta * self.base) / self.beta
        return RowLosses(losses, torch.maximum(pos.detach(), neg.detach()) != -torch.inf, losses.shape[0])

    def row_formula(self) -> RowFormula:
        shifts = self.alpha * self.base, -self.beta * self.base
        return RowFormula("multi_similarity", (-self.alpha, self.beta), shifts, self.epsilon)
