"""Proxy losses: ProxyNCA (Movshovitz-Attias et al., ICCV 2017), Proxy Anchor (Kim et al., CVPR 2020, eq. 4)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..core import checks
from ..core.reduction import Reduction
from ..core.similarity import softplus
from .base import AnyPairs, RowLosses
from .class_loss import ClassCriterion


class ProxyNCALoss(ClassCriterion):
    """ProxyNCA (Movshovitz-Attias et al., 2017): scale D_iy^2 + log sum_{c != y} e^(-scale D_ic^2), D the
    distance of embedding i and proxy c.

    Args:
        num_classes, embedding_size: C and D of `weight` (C, D), the proxies.
        softmax_scale: above 0; a number or a learnable tensor ().
        include_positive: the own proxy is in the sum, too (ProxyNCA++, Teh et al., 2020), which makes it a cross
            entropy. Without it the loss may be negative, and is 0 with a single class.
        normalize, reduction, impl: see `Criterion`. `normalize` is of embeddings; proxies always are.

    Raises:
        ValueError: labels outside of [0, num_classes), or embeddings of another width.
    """

    shown = (*ClassCriterion.shown, "softmax_scale", "include_positive")

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        softmax_scale: float | Tensor = 1.0,
        include_positive: bool = False,
        *,
        normalize: bool = True,
        reduction: str = "mean",
        impl: str = "auto",
    ) -> None:
        super().__init__(num_classes, embedding_size, normalize=normalize, reduction=reduction, impl=impl)
        self.softmax_scale = checks.number(softmax_scale, "softmax_scale", above=0)
        self.include_positive = checks.flag(include_positive, "include_positive")

    def row_losses(self, pairs: AnyPairs) -> RowLosses:
        # D^2 = |x|^2 + 1 - 2 s, of which the first two cancel
        scale = 2 * self.softmax_scale
        own, neg = pairs.reduce(Reduction("sum", "positives"), Reduction("logsumexp", "negatives", scale=scale))
        if self.include_positive:
            losses = softplus(neg - scale * own)
        else:
            losses = neg - scale * own if self.num_classes > 1 else own * 0
        return RowLosses(losses, torch.ones_like(losses, dtype=torch.bool), losses.shape[0])


class ProxyAnchorLoss(ClassCriterion):
    """Proxy Anchor loss (Kim et al., 2020, eq. 4): proxies p are the anchors, and the batch their positives X+ and X-:

    mean over proxies with a positive of log(1 + sum_{X+} e^(-alpha (s - margin)))
    + mean over all proxies of log(1 + sum_{X-} e^(alpha (s + margin))).

    Args:
        num_classes, embedding_size: C and D of `weight` (C, D), the proxies.
        margin: delta; `alpha`: above 0; numbers or learnable tensors ().
        normalize, reduction, impl: see `Criterion`. `normalize` is of embeddings; proxies always are. A row is a proxy,
            (C,) with "none", which holds its share of the two means; every other reduction gives their sum.

    Raises:
        ValueError: labels outside of [0, num_classes), or embeddings of another width.
    """

    anchors = "proxies"
    shown = (*ClassCriterion.shown, "margin", "alpha")

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        margin: float | Tensor = 0.1,
        alpha: float | Tensor = 32.0,
        *,
        normalize: bool = True,
        reduction: str = "mean",
        impl: str = "auto",
    ) -> None:
        super().__init__(num_classes, embedding_size, normalize=normalize, reduction=reduction, impl=impl)
        self.margin = checks.number(margin, "margin")
        self.alpha = checks.number(alpha, "alpha", above=0)

    def reset_parameters(self) -> None:
        nn.init.kaiming_normal_(self.weight, mode="fan_out")

    def row_losses(self, pairs: AnyPairs) -> RowLosses:
        pos, neg = pairs.reduce(
            Reduction("logsumexp", "positives", scale=-self.alpha),
            Reduction("logsumexp", "negatives", scale=self.alpha),
        )
        shift = self.alpha * self.margin
        present = pairs.num_positives() > 0
        losses = softplus(pos + shift) / pairs.total(present).clamp_min(1) + softplus(neg + shift) / self.num_classes
        return RowLosses(losses, torch.ones_like(present), present.shape[0], shares=True)
