"""Tuplet margin loss and intra-pair variance (Yu and Tao, ICCV 2019)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..core import checks
from ..core.reduction import Reduction
from ..core.similarity import softplus
from ..core.transforms import specialised
from .base import AnyPairs, Criterion, RowLosses


def _slack(scale: float, margin: float) -> str:
    """softplus(offset - scale cos(theta - margin)), cos(theta) = s; where |s| = 1 the sine has gradient 0."""
    a, b = scale * math.cos(margin), scale * math.sin(margin)

    def dense(s: Tensor, offset: Tensor) -> Tensor:
        rest = 1 - s * s
        inside = rest > 0
        return softplus(offset - a * s - b * torch.where(inside, torch.sqrt(torch.where(inside, rest, 1.0)), 0.0))

    return specialised(f"tuplet {a!r} {b!r}", dense)


_slack._dynamo_marked_constant = True  # type: ignore[attr-defined]  # as transforms.unsupported_reasons


class TupletMarginLoss(Criterion):
    """Tuplet margin loss (Yu and Tao, 2019), one term for each ordered positive pair, theta the angle between
    anchor and positive: log(1 + sum_N e^(scale (s_in - cos(theta_ip - margin)))).

    Args:
        margin: degrees; `scale`: above 0; numbers.
        normalize, reduction, impl: see `Criterion`; "mean" divides by the number of ordered positive pairs. A row's
            loss is the sum of its pairs'. Without `normalize` embeddings are taken for unit vectors as they are.
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
        self._phi()  # known before anything is compiled

    def _phi(self) -> str:
        return _slack(self.scale, math.radians(self.margin))

    def row_losses(self, pairs: AnyPairs) -> RowLosses:
        (neg,) = pairs.reduce(Reduction("logsumexp", "negatives", scale=self.scale))
        (losses,) = pairs.reduce(Reduction("sum", "positives", self._phi(), offset=neg))
        positives = pairs.num_positives()
        return RowLosses(losses, positives > 0, positives.sum())


class IntraPairVarianceLoss(Criterion):
    """Intra-pair variance (Yu and Tao, 2019), to be added to another loss: the mean over positive pairs of
    max(0, (1 - pos_eps) mu - s)^2, mu their mean, plus that over negative pairs of max(0, s - (1 + neg_eps) mu)^2.

    Args:
        pos_eps, neg_eps: numbers.
        normalize, reduction, impl: see `Criterion`; every reduction but "none" gives the one number, of which each row
            has its pairs' share.
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

    def row_losses(self, pairs: AnyPairs) -> RowLosses:
        pos, neg = pairs.reduce(Reduction("sum", "positives"), Reduction("sum", "negatives"))
        num_pos, num_neg = (pairs.total(c).clamp_min(1) for c in (pairs.num_positives(), pairs.num_negatives()))
        low = (1 - self.pos_eps) * pairs.total(pos) / num_pos
        high = (1 + self.neg_eps) * pairs.total(neg) / num_neg
        pos, neg = pairs.reduce(
            Reduction("sum", "positives", "squared_hinge", scale=-1.0, offset=low),
            Reduction("sum", "negatives", "squared_hinge", offset=-high),
        )
        valid = (pairs.num_positives() + pairs.num_negatives()) > 0
        return RowLosses(pos / num_pos + neg / num_neg, valid, valid.shape[0], shares=True)
