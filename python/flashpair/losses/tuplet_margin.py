"""Tuplet margin loss and intra-pair variance (Yu and Tao, ICCV 2019)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..core import checks
from ..core.pairs import PairAccess
from ..core.reduction import Reduction
from ..core.similarity import softplus
from ..core.transforms import specialised
from .base import Criterion, RowLosses
from .declaration import SCALE, Range, Search, Source, loss
from .papers import YU_2019


def _slack(scale: float, margin: float) -> str:
    """The transform softplus(offset - scale cos(theta - margin)) of s = cos(theta); at |s| = 1 sin has gradient 0."""
    a, b = scale * math.cos(margin), scale * math.sin(margin)

    def dense(s: Tensor, offset: Tensor) -> Tensor:
        rest = 1 - s * s
        inside = rest > 0
        return softplus(offset - a * s - b * torch.where(inside, torch.sqrt(torch.where(inside, rest, 1.0)), 0.0))

    return specialised(f"tuplet {a!r} {b!r}", dense)


_slack._dynamo_marked_constant = True  # type: ignore[attr-defined]  # as transforms.unsupported_reasons


@loss(
    key="tuplet_margin",
    group="rows",
    sources=(Source(YU_2019),),
    forms={"": {"scale": 16.0}},
    searches={"": Search({"margin": Range(0.0, 30.0), "scale": SCALE})},
)
class TupletMarginLoss(Criterion):
    """Tuplet margin loss: one positive against all negatives, with a margin on the positive's angle (Yu and Tao, 2019).

    With cosines s and theta_ip the angle of anchor i and positive p, for each ordered positive pair:

        L_ip = log(1 + sum_N e^(scale (s_in - cos(theta_ip - margin))))

    An anchor's loss is the sum of its positive pairs'.

    Args:
        margin: in degrees; a number.
        scale: above 0; a number.
        normalize: L2-normalise the embeddings and references first (the default); False: they must be unit vectors
            already.
        reduction: ``"mean"`` (the default) divides by the number of ordered positive pairs. Others: see `Criterion`.
        impl: ``"auto"`` (the default) or the name of an implementation; see `Criterion`.

    Shape:
        - embeddings: (N, D), float16 to float64. labels: (N,), integers.
        - ref_emb: (M, D) and ref_labels: (M,), optional.
        - output: (), or (N,) with ``reduction="none"``; float32, or float64 for float64 inputs.

    Raises:
        TypeError: `margin` or `scale` is not a number (tensors are not taken), `normalize` not a bool.
        ValueError: `scale` is not above 0; an unknown `reduction` or `impl`.

    Examples:
        >>> x = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0], [-0.8, 0.6]])
        >>> labels = torch.tensor([0, 0, 1, 1])
        >>> round(flashpair.TupletMarginLoss(scale=8.0)(x, labels).item(), 4)
        0.654
    """

    shown = ("margin", "scale")

    def __init__(
        self,
        margin: float = 5.73,
        scale: float = 64.0,
        *,
        normalize: bool = True,
        reduction: str = "mean",
        impl: str = "auto",
    ) -> None:
        super().__init__(normalize=normalize, reduction=reduction, impl=impl)
        self.margin = checks.plain_number(margin, "margin")
        self.scale = checks.plain_number(scale, "scale", above=0)
        self._phi()  # registers the transform before anything is compiled

    def _phi(self) -> str:
        return _slack(self.scale, math.radians(self.margin))

    def row_losses(self, pairs: PairAccess) -> RowLosses:
        (neg,) = pairs.reduce(Reduction("logsumexp", "negatives", scale=self.scale))
        (losses,) = pairs.reduce(Reduction("sum", "positives", self._phi(), offset=neg))
        positives = pairs.num_positives()
        return RowLosses(losses, positives > 0, positives.sum())


@loss(
    key="intra_pair_variance",
    group="pairs",
    sources=(Source(YU_2019, "to be added to another loss"),),
)
class IntraPairVarianceLoss(Criterion):
    """Intra-pair variance: keeps the similarities of each kind of pair near their mean (Yu and Tao, 2019).

    It is meant to be added to another loss. With cosines s, and mu_P, mu_N their means over all positive and all
    negative pairs of the batch:

        L = mean_P max(0, (1 - pos_eps) mu_P - s)^2 + mean_N max(0, s - (1 + neg_eps) mu_N)^2

    The gradient flows through the means, too.

    Args:
        pos_eps: a number; positives below (1 - pos_eps) mu_P have a loss.
        neg_eps: a number; negatives above (1 + neg_eps) mu_N have a loss.
        normalize: L2-normalise the embeddings and references first (the default).
        reduction: every reduction but ``"none"`` gives the one number L; ``"none"`` gives each row its pairs' share of
            it.
        impl: ``"auto"`` (the default) or the name of an implementation; see `Criterion`.

    Shape:
        - embeddings: (N, D), float16 to float64. labels: (N,), integers.
        - ref_emb: (M, D) and ref_labels: (M,), optional.
        - output: (), or (N,) with ``reduction="none"``; float32, or float64 for float64 inputs.

    Raises:
        TypeError: `pos_eps` or `neg_eps` is not a number (tensors are not taken), `normalize` not a bool.
        ValueError: an unknown `reduction` or `impl`.

    Examples:
        >>> x = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0], [-0.8, 0.6]])
        >>> labels = torch.tensor([0, 0, 1, 1])
        >>> round(flashpair.IntraPairVarianceLoss()(x, labels).item(), 4)
        0.16
    """

    shown = ("pos_eps", "neg_eps")

    def __init__(
        self,
        pos_eps: float = 0.01,
        neg_eps: float = 0.01,
        *,
        normalize: bool = True,
        reduction: str = "mean",
        impl: str = "auto",
    ) -> None:
        super().__init__(normalize=normalize, reduction=reduction, impl=impl)
        self.pos_eps = checks.plain_number(pos_eps, "pos_eps")
        self.neg_eps = checks.plain_number(neg_eps, "neg_eps")

    def row_losses(self, pairs: PairAccess) -> RowLosses:
        pos, neg = pairs.reduce(Reduction("sum", "positives"), Reduction("sum", "negatives"))
        num_pos, num_neg = (pairs.batch_sum(c).clamp_min(1) for c in (pairs.num_positives(), pairs.num_negatives()))
        low = (1 - self.pos_eps) * pairs.batch_sum(pos) / num_pos
        high = (1 + self.neg_eps) * pairs.batch_sum(neg) / num_neg
        pos, neg = pairs.reduce(
            Reduction("sum", "positives", "squared_hinge", scale=-1.0, offset=low),
            Reduction("sum", "negatives", "squared_hinge", offset=-high),
        )
        valid = (pairs.num_positives() + pairs.num_negatives()) > 0
        return RowLosses(pos / num_pos + neg / num_neg, valid, valid.shape[0], shares=True)
