"""Contrastive loss in all its forms (Hadsell et al., CVPR 2006; Wang et al., CVPR 2019, eq. 4; Musgrave et al., 2020),
and the same of signal-to-noise ratios (Yuan et al., CVPR 2019).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..core import checks
from ..core.class_pairs import ClassPairs
from ..core.problem import AVERAGINGS
from ..core.reduction import Reduction
from ..core.similarity import normalize, upcast
from .base import AnyPairs, Criterion, Penalty, RowLosses, Terms
from .distances import DISTANCES, similarity_of

COSINE_SLACK = 16  # roundings


def hinges(
    pairs: AnyPairs, positives: Reduction, negatives: Reduction, limits: Sequence[Reduction]
) -> tuple[Terms, Terms]:
    """The terms of two sums of hinges; two `limits` count those above 0, where they are to be counted."""
    pos, neg, *counts = pairs.reduce(positives, negatives, *limits)
    above: Sequence[Tensor | None] = counts or (None, None)
    return Terms(pos, pairs.num_positives(), above[0]), Terms(neg, pairs.num_negatives(), above[1])


class ContrastiveLoss(Criterion):
    """Contrastive loss of pairs.

    ``distance="euclidean"``: max(0, D - pos_margin)^power / power over positives + max(0, neg_margin - D)^power / power
    over negatives (Hadsell et al., 2006, eq. 4, with power 2); ``"cosine"``: the same of pos_margin - s and of
    s - neg_margin (Wang et al., 2019, eq. 4, has -s on positives: ``pos_margin=None``).

    Args:
        pos_margin, neg_margin: 0 and 1 suit distances; give cosines theirs, such as 1 and 0.5. Numbers or learnable
            tensors (); `pos_margin` may be None: no hinge, and no margin, on positives (power 1).
        distance: ``"euclidean"`` or ``"cosine"``.
        power: 1 or 2.
        normalize, reduction, impl: see `Criterion`. The loss averages pairs: "nonzero" (default) over positive pairs
            above 0 plus over negative pairs above 0, "mean_pairs" over all of each; "mean" divides by N. Of normalised
            rows' cosines a pair is above 0 that is so by more than rounding: a row and its copy are not under 1.

    Raises:
        ValueError: pos_margin None with power 2, or with reduction "nonzero" (its terms have any sign).
    """

    averagings = AVERAGINGS
    shown = ("pos_margin", "neg_margin", "distance", "power")

    def __init__(
        self,
        pos_margin: float | Tensor | None = 0.0,
        neg_margin: float | Tensor = 1.0,
        distance: str = "euclidean",
        power: int = 1,
        *,
        normalize: bool = True,
        reduction: str = "nonzero",
        impl: str = "auto",
    ) -> None:
        super().__init__(normalize=normalize, reduction=reduction, impl=impl)
        self.pos_margin = None if pos_margin is None else checks.number(pos_margin, "pos_margin")
        self.neg_margin = checks.number(neg_margin, "neg_margin")
        self.distance = DISTANCES[checks.word(distance, ("euclidean", "cosine"), "distance")]
        self.power = checks.integer(power, "power", (1, 2))
        if pos_margin is None and (power == 2 or reduction == "nonzero"):
            raise ValueError("pos_margin None goes with power 1 and a reduction other than 'nonzero'")

    def hyperparameters(self) -> dict[str, object]:
        return {**super().hyperparameters(), "distance": similarity_of(self.distance)}

    def row_losses(self, pairs: AnyPairs) -> RowLosses:
        sign = 1.0 if self.distance == "dot" else -1.0
        phi = "hinge" if self.power == 1 else "squared_hinge"
        if self.pos_margin is None:
            positives = Reduction("sum", "positives", scale=-sign)
        else:
            positives = Reduction("sum", "positives", phi, scale=-sign, offset=sign * self.pos_margin)
        negatives = Reduction("sum", "negatives", phi, scale=sign, offset=-sign * self.neg_margin)
        limits: tuple[Reduction, ...] = ()
        if self.reduction == "nonzero" and self.pos_margin is not None:
            pos_limit, neg_limit = _plain(self.pos_margin), _plain(self.neg_margin)
            if sign > 0:
                # Whether a row and its copy have a cosine of 1 or of a rounding less says nothing of them.
                slack = COSINE_SLACK * torch.finfo(pairs.dtype).eps if self.normalize else 0.0
                limits = (
                    Reduction("count", "positives", upper=pos_limit - slack),
                    Reduction("count", "negatives", lower=neg_limit + slack),
                )
            else:
                limits = (
                    Reduction("count", "positives", lower=pos_limit),
                    Reduction("count", "negatives", upper=neg_limit),
                )
        found = hinges(pairs, positives, negatives, limits)
        pos, neg = (Terms(t.losses / self.power, t.number, t.nonzero) for t in found)
        losses = pos.losses + neg.losses
        return RowLosses(losses, (pos.number + neg.number) > 0, losses.shape[0], (pos, neg))


def _plain(value: float | Tensor) -> float | Tensor:
    return value.detach() if isinstance(value, Tensor) else value


class SNRContrastiveLoss(Criterion):
    """Contrastive loss of signal-to-noise ratios, d_ij = Var(x_i - x_j) / Var(x_i) over features (Yuan et al., 2019).

    max(0, d - pos_margin) over positives + max(0, neg_margin - d) over negatives, and `regularizer_weight` times the
    mean over embeddings of |sum of their features|. d is asymmetric. An embedding without variance has no pairs.

    Args:
        pos_margin, neg_margin: numbers; `regularizer_weight`: at least 0.
        normalize, reduction, impl: see `Criterion`; averages as `ContrastiveLoss` does, "nonzero" by default.
    """

    averagings = AVERAGINGS
    distance = "squared_euclidean"
    shown = ("pos_margin", "neg_margin", "regularizer_weight")

    def __init__(
        self,
        pos_margin: float = 0.0,
        neg_margin: float = 1.0,
        regularizer_weight: float = 0.0,
        *,
        normalize: bool = True,
        reduction: str = "nonzero",
        impl: str = "auto",
    ) -> None:
        super().__init__(normalize=normalize, reduction=reduction, impl=impl)
        self.pos_margin = checks.plain_number(pos_margin, "pos_margin")
        self.neg_margin = checks.plain_number(neg_margin, "neg_margin")
        self.regularizer_weight = checks.plain_number(regularizer_weight, "regularizer_weight", at_least=0)

    @property
    def preparation(self) -> tuple[bool, Callable[[Tensor], Tensor] | None]:
        return False, self._centred

    def _centred(self, x: Tensor) -> Tensor:
        x = normalize(x) if self.normalize else x
        centred = x - x.mean(1, keepdim=True)
        noise = x.shape[1] ** 0.5 * torch.finfo(x.dtype).eps * x.detach().abs().amax(1, keepdim=True)
        constant = centred.detach().abs().amax(1, keepdim=True) <= noise  # but for rounding
        return centred.masked_fill(constant, 0.0)

    def row_losses(self, pairs: AnyPairs) -> RowLosses:
        noise = pairs.squares()  # (N,) |x_i - mean|^2, in whose units the margins are
        varies = noise > 0
        # What is over its margin by no more than rounding has no loss: a batch's and its processes' squared norms round
        # apart. So do equal rows' means.
        slack = 8 * torch.finfo(noise.dtype).eps
        least, most = noise * (self.pos_margin * (1 + slack)), noise * (self.neg_margin * (1 - slack))
        positives = Reduction("sum", "positives", "hinge", offset=-least)
        negatives = Reduction("sum", "negatives", "hinge", scale=-1.0, offset=most)
        limits: tuple[Reduction, ...] = ()
        if self.reduction == "nonzero":
            limits = (
                Reduction("count", "positives", lower=torch.maximum(least, noise * (8 * slack) ** 2).detach()),
                Reduction("count", "negatives", upper=most.detach()),
            )
        some = torch.where(varies, noise, 1.0)  # divided by, for its reciprocal's slope overflows where it does not
        terms = tuple(
            Terms(
                torch.where(varies, t.losses / some, 0.0),
                t.number * varies,
                None if t.nonzero is None else torch.where(varies, t.nonzero, 0.0),
            )
            for t in hinges(pairs, positives, negatives, limits)
        )
        losses = terms[0].losses + terms[1].losses
        return RowLosses(losses, (terms[0].number + terms[1].number) > 0, losses.shape[0], terms)

    def penalty_of(
        self, x: Tensor, labels: Tensor, y: Tensor | None, ref_labels: Tensor | None, drawn: ClassPairs | None = None
    ) -> Penalty | None:
        if self.regularizer_weight == 0:
            return None
        x, _ = upcast(x, None)
        x = normalize(x) if self.normalize else x
        total = self.regularizer_weight * x.sum(1).abs().sum()
        return Penalty(total, torch.full_like(total, x.shape[0]))
