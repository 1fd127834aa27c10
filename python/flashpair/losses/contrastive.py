"""Contrastive loss in all its forms (Hadsell et al., CVPR 2006; Wang et al., CVPR 2019, eq. 4; Musgrave et al., 2020),
and the same of signal-to-noise ratios (Yuan et al., CVPR 2019).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..core import checks
from ..core.class_pairs import ClassPairs
from ..core.distances import ENGINE_WORDS, argument_word
from ..core.pairs import PairAccess
from ..core.problem import AVERAGINGS
from ..core.reduction import Reduction
from ..core.similarity import l2_normalize, upcast
from .base import Criterion, Penalty, RowLosses, Terms
from .declaration import MARGIN, Range, Search, Source, loss
from .papers import HADSELL_2006, WANG_2019, YUAN_2019

COSINE_SLACK = 16  # a cosine this many roundings from its margin counts as at the margin


def hinges(
    pairs: PairAccess, positives: Reduction, negatives: Reduction, limits: Sequence[Reduction]
) -> tuple[Terms, Terms]:
    """The terms of two sums of hinges; two `limits` count those above 0, where they are to be counted."""
    pos, neg, *counts = pairs.reduce(positives, negatives, *limits)
    above: Sequence[Tensor | None] = counts or (None, None)
    return Terms(pos, pairs.num_positives(), above[0]), Terms(neg, pairs.num_negatives(), above[1])


@loss(
    key="contrastive",
    group="pairs",
    sources=(
        Source(HADSELL_2006, "eq. 4"),
        Source(WANG_2019),
    ),
    forms={
        "": {},
        "(0.9, 0.2, 'cosine')": {"pos_margin": 0.9, "neg_margin": 0.2, "distance": "cosine"},
        "(power=2)": {"power": 2},
    },
    searches={"": Search({"pos_margin": MARGIN, "neg_margin": Range(0.2, 1.8)})},
)
class ContrastiveLoss(Criterion):
    """Contrastive loss: positives within one margin, negatives beyond another (Hadsell et al., 2006).

    With Euclidean distances D (Hadsell et al., 2006, eq. 4, with power 2):

        L_i = sum_P max(0, D_ip - pos_margin)^power / power + sum_N max(0, neg_margin - D_in)^power / power

    With cosines s (Wang et al., 2019, eq. 4, has no margin on positives, ``pos_margin=None``):

        L_i = sum_P max(0, pos_margin - s_ip)^power / power + sum_N max(0, s_in - neg_margin)^power / power

    P and N are anchor i's positives and negatives. A pair of equal rows whose cosine is below 1 only by rounding counts
    as having cosine 1.

    Args:
        pos_margin: a number, a learnable tensor () or None. None means -s (or D) on positives, without hinge or margin.
            The default 0 suits distances; for cosines use a value such as 1.
        neg_margin: a number or a learnable tensor (). The default 1 suits distances; for cosines use a value such as
            0.5.
        distance: ``"euclidean"`` (the default) or ``"cosine"``.
        power: 1 (the default) or 2.
        normalize: L2-normalise the embeddings and references first (the default).
        reduction: ``"nonzero"`` (the default): mean over positive pairs with a loss above 0 plus mean over negative
            pairs with a loss above 0; ``"mean_pairs"``: mean over all positive plus mean over all negative pairs;
            ``"mean"``: divides by N. Others: see `Criterion`.
        impl: ``"auto"`` (the default) or the name of an implementation; see `Criterion`.

    Shape:
        - embeddings: (N, D), float16 to float64. labels: (N,), integers.
        - ref_emb: (M, D) and ref_labels: (M,), optional.
        - output: (), or (N,) with ``reduction="none"``; float32, or float64 for float64 inputs.

    Raises:
        TypeError: a margin is not a number or tensor, `power` not an int, `normalize` not a bool.
        ValueError: ``pos_margin=None`` with power 2 or with reduction "nonzero"; an unknown `distance`, `power`,
            `reduction` or `impl`.

    Examples:
        >>> x = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0], [-0.8, 0.6]])
        >>> labels = torch.tensor([0, 0, 1, 1])
        >>> round(flashpair.ContrastiveLoss(0.9, 0.5, "cosine")(x, labels).item(), 4)
        0.6
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
        self.distance = ENGINE_WORDS[checks.word(distance, ("euclidean", "cosine"), "distance")]
        self.power = checks.integer(power, "power", (1, 2))
        if pos_margin is None and (power == 2 or reduction == "nonzero"):
            raise ValueError(
                f"pos_margin=None needs power 1 and a reduction but 'nonzero', got power {power} and {reduction!r}"
            )

    def hyperparameters(self) -> dict[str, object]:
        return {**super().hyperparameters(), "distance": argument_word(self.distance)}

    def row_losses(self, pairs: PairAccess) -> RowLosses:
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
                # The cosine of a row and its copy is 1 or a rounding less; which of the two must not matter.
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
        sides = hinges(pairs, positives, negatives, limits)
        pos, neg = (Terms(t.losses / self.power, t.number, t.nonzero) for t in sides)
        losses = pos.losses + neg.losses
        return RowLosses(losses, (pos.number + neg.number) > 0, losses.shape[0], (pos, neg))


def _plain(value: float | Tensor) -> float | Tensor:
    return value.detach() if isinstance(value, Tensor) else value


@loss(
    key="snr_contrastive",
    group="pairs",
    sources=(Source(YUAN_2019),),
    forms={"": {"pos_margin": 0.1, "neg_margin": 1.2, "regularizer_weight": 0.1}},
    searches={
        "": Search(
            {"pos_margin": Range(0.0, 0.5), "neg_margin": MARGIN, "regularizer_weight": Range(1e-3, 1.0, log=True)}
        )
    },
)
class SNRContrastiveLoss(Criterion):
    """Contrastive loss of signal-to-noise ratios instead of distances (Yuan et al., 2019).

    The ratio compares variances over the D features; it is not symmetric:

        d_ij = Var(x_j - x_i) / Var(x_i)
        L_i = sum_P max(0, d_ip - pos_margin) + sum_N max(0, neg_margin - d_in)

    To this is added regularizer_weight * mean_i |sum_k x_ik|, which keeps each embedding's mean near 0. An embedding
    whose features are all equal (variance 0) has no pairs.

    Args:
        pos_margin: a number; positives should have a ratio below it.
        neg_margin: a number; negatives should have a ratio above it.
        regularizer_weight: weight of the zero-mean term, at least 0; the default 0 leaves it out.
        normalize: L2-normalise the embeddings and references first (the default).
        reduction: ``"nonzero"`` (the default): mean over positive pairs with a loss above 0 plus mean over negative
            pairs with a loss above 0; ``"mean_pairs"``: over all pairs of each kind. Others: see `Criterion`.
        impl: ``"auto"`` (the default) or the name of an implementation; see `Criterion`.

    Shape:
        - embeddings: (N, D), float16 to float64. labels: (N,), integers.
        - ref_emb: (M, D) and ref_labels: (M,), optional.
        - output: (), or (N,) with ``reduction="none"``; float32, or float64 for float64 inputs.

    Raises:
        TypeError: a margin or the weight is not a number (tensors are not taken), `normalize` not a bool.
        ValueError: `regularizer_weight` is below 0; an unknown `reduction` or `impl`.

    Examples:
        >>> x = torch.tensor([[1.0, -1.0], [1.0, -0.5], [-1.0, 1.0], [-0.5, 1.0]])
        >>> labels = torch.tensor([0, 0, 1, 1])
        >>> criterion = flashpair.SNRContrastiveLoss(normalize=False, reduction="mean_pairs")
        >>> round(criterion(x, labels).item(), 4)
        0.0868
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
        x = l2_normalize(x) if self.normalize else x
        centred = x - x.mean(1, keepdim=True)
        noise = x.shape[1] ** 0.5 * torch.finfo(x.dtype).eps * x.detach().abs().amax(1, keepdim=True)
        constant = centred.detach().abs().amax(1, keepdim=True) <= noise  # the entries differ by rounding only
        return centred.masked_fill(constant, 0.0)

    def row_losses(self, pairs: PairAccess) -> RowLosses:
        noise = pairs.squared_norms()  # (N,) |x_i - mean|^2; the margins are multiples of it
        varies = noise > 0
        # A pair that exceeds its margin by rounding only has no loss. Rounding of squared norms differs between one
        # process and many, and rounding of means differs between equal rows.
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
        some = torch.where(varies, noise, 1.0)  # a divisor whose reciprocal has a finite gradient
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
        self, x: Tensor, labels: Tensor, y: Tensor | None, ref_labels: Tensor | None, chosen: ClassPairs | None = None
    ) -> Penalty | None:
        if self.regularizer_weight == 0:
            return None
        x, _ = upcast(x, None)
        x = l2_normalize(x) if self.normalize else x
        total = self.regularizer_weight * x.sum(1).abs().sum()
        return Penalty(total, torch.full_like(total, x.shape[0]))
