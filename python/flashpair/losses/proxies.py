"""Proxy losses: ProxyNCA (Movshovitz-Attias et al., ICCV 2017), Proxy Anchor (Kim et al., CVPR 2020, eq. 4)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..core import checks
from ..core.pairs import PairAccess
from ..core.reduction import Reduction
from ..core.similarity import softplus
from .base import RowLosses
from .class_loss import ClassCriterion
from .declaration import MARGIN, SCALE, Search, Source, loss
from .papers import KIM_2020, MOVSHOVITZ_ATTIAS_2017, TEH_2020


@loss(
    key="proxy_nca",
    group="classes",
    sources=(
        Source(MOVSHOVITZ_ATTIAS_2017),
        Source(TEH_2020),
    ),
    searches={"": Search({"softmax_scale": SCALE})},
)
class ProxyNCALoss(ClassCriterion):
    """ProxyNCA: neighbourhood components analysis against learned proxies (Movshovitz-Attias et al., 2017).

    With D_ic the Euclidean distance of embedding i and proxy c, y the embedding's class:

        L_i = softmax_scale D_iy^2 + log sum_{c != y} e^(-softmax_scale D_ic^2)

    Without `include_positive` the loss can be negative, and is 0 with a single class.

    Args:
        num_classes: C, at least 1.
        embedding_size: D, the width of the embeddings, at least 1.
        softmax_scale: above 0; a number or a learnable tensor ().
        include_positive: put the own class's proxy into the sum, too, which makes the loss a cross entropy (ProxyNCA++,
            Teh et al., 2020).
        normalize: L2-normalise the embeddings first (the default). Proxies are always normalised.
        reduction: ``"mean"`` (the default) divides by N. Others: see `Criterion`.
        impl: ``"auto"`` (the default) or the name of an implementation; see `Criterion`.

    Shape:
        - embeddings: (N, D), float16 to float64. labels: (N,), integers in [0, C). No references.
        - weight: (C, D), a Parameter, for C = num_classes and D = embedding_size.
        - output: (), or (N,) with ``reduction="none"``; float32, or float64 for float64 inputs.

    Raises:
        TypeError: a size is not an int, `softmax_scale` not a number or tensor, a flag not a bool.
        ValueError: a size is below 1, `softmax_scale` not above 0; an unknown `reduction` or `impl`; in a call, labels
            outside of [0, num_classes), or embeddings of another width.

    Examples:
        >>> x = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0], [-0.8, 0.6]])
        >>> labels = torch.tensor([0, 0, 1, 1])
        >>> criterion = flashpair.ProxyNCALoss(num_classes=2, embedding_size=2)
        >>> criterion.weight.data = torch.eye(2)
        >>> round(criterion(x, labels).item(), 4)
        -1.6
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

    def row_losses(self, pairs: PairAccess) -> RowLosses:
        # D^2 = |x|^2 + 1 - 2 s. In the loss |x|^2 + 1 cancels, so s is enough.
        scale = 2 * self.softmax_scale
        own, neg = pairs.reduce(Reduction("sum", "positives"), Reduction("logsumexp", "negatives", scale=scale))
        if self.include_positive:
            losses = softplus(neg - scale * own)
        else:
            losses = neg - scale * own if self.num_classes > 1 else own * 0
        return RowLosses(losses, torch.ones_like(losses, dtype=torch.bool), losses.shape[0])


@loss(
    key="proxy_anchor",
    group="classes",
    sources=(Source(KIM_2020, "eq. 4"),),
    searches={"": Search({"margin": MARGIN, "alpha": SCALE})},
)
class ProxyAnchorLoss(ClassCriterion):
    """Proxy Anchor loss: proxies are the anchors, the batch their positives and negatives (Kim et al., 2020, eq. 4).

    With s the cosine of a proxy and an embedding, X+ and X- the embeddings of the proxy's class and of other classes:

        L = mean over proxies with a positive of log(1 + sum_{X+} e^(-alpha (s - margin)))
          + mean over all proxies of             log(1 + sum_{X-} e^(alpha (s + margin)))

    Args:
        num_classes: C, at least 1.
        embedding_size: D, the width of the embeddings, at least 1.
        margin: delta of the paper; a number or a learnable tensor ().
        alpha: the scale, above 0; a number or a learnable tensor ().
        normalize: L2-normalise the embeddings first (the default). Proxies are always normalised.
        reduction: every reduction but ``"none"`` gives the one number L; ``"none"`` gives each proxy's share of it,
            (C,).
        impl: ``"auto"`` (the default) or the name of an implementation; see `Criterion`.

    Shape:
        - embeddings: (N, D), float16 to float64. labels: (N,), integers in [0, C). No references.
        - weight: (C, D), a Parameter, for C = num_classes and D = embedding_size.
        - output: (), or (C,) with ``reduction="none"``; float32, or float64 for float64 inputs.

    Raises:
        TypeError: a size is not an int, `margin` or `alpha` not a number or tensor, `normalize` not a bool.
        ValueError: a size is below 1, `alpha` not above 0; an unknown `reduction` or `impl`; in a call, labels outside
            of [0, num_classes), or embeddings of another width.

    Examples:
        >>> x = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0], [-0.8, 0.6]])
        >>> labels = torch.tensor([0, 0, 1, 1])
        >>> criterion = flashpair.ProxyAnchorLoss(num_classes=2, embedding_size=2, alpha=4.0)
        >>> criterion.weight.data = torch.eye(2)
        >>> round(criterion(x, labels).item(), 4)
        2.4522
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

    def row_losses(self, pairs: PairAccess) -> RowLosses:
        pos, neg = pairs.reduce(
            Reduction("logsumexp", "positives", scale=-self.alpha),
            Reduction("logsumexp", "negatives", scale=self.alpha),
        )
        shift = self.alpha * self.margin
        present = pairs.num_positives() > 0
        losses = (
            softplus(pos + shift) / pairs.batch_sum(present).clamp_min(1) + softplus(neg + shift) / self.num_classes
        )
        return RowLosses(losses, torch.ones_like(present), present.shape[0], shares=True)
