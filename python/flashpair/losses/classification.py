"""Classification losses on cosines: normalised softmax (Zhai and Wu, BMVC 2019), CosFace (Wang et al., CVPR 2018),
ArcFace (Deng et al., CVPR 2019) and SphereFace (Liu et al., CVPR 2017).

L_i = log(1 + e^(neg_i - t_i)), neg the logsumexp of the other classes' logits, t the own class's, margin and all.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..core import checks
from ..core.pairs import PairAccess
from ..core.reduction import Reduction
from ..core.similarity import softplus
from .base import RowLosses
from .class_loss import ClassCriterion
from .declaration import MARGIN, POSITIVE, Range, Search, Source, loss
from .papers import DENG_2019, LIU_2017, WANG_2018, ZHAI_2019


def _cross_entropy(pairs: PairAccess, scale: float | Tensor) -> tuple[Tensor, Tensor]:
    """Each row's cosine with its own class (N,), and the logsumexp of scale times its other cosines (N,)."""
    own, neg = pairs.reduce(Reduction("sum", "positives"), Reduction("logsumexp", "negatives", scale=scale))
    return own, neg


def _losses(neg: Tensor, own: Tensor) -> RowLosses:
    losses = softplus(neg - own)
    return RowLosses(losses, torch.ones_like(losses, dtype=torch.bool), losses.shape[0])


@loss(
    key="normalized_softmax",
    group="classes",
    sources=(Source(ZHAI_2019),),
    forms={"": {"temperature": 0.2}},
    searches={"": Search({"temperature": POSITIVE})},
)
class NormalizedSoftmaxLoss(ClassCriterion):
    """Normalised softmax: cross entropy of cosines over a temperature (Zhai and Wu, 2019).

    With cos_ic the cosine of embedding i and class c's weight, y the embedding's class:

        L_i = -log(e^(cos_iy / temperature) / sum_c e^(cos_ic / temperature))

    Args:
        num_classes: C, at least 1.
        embedding_size: D, the width of the embeddings, at least 1.
        temperature: above 0; a number or a learnable tensor ().
        normalize: L2-normalise the embeddings first (the default). Class weights are always normalised.
        reduction: ``"mean"`` (the default) divides by N. Others: see `Criterion`.
        impl: ``"auto"`` (the default) or the name of an implementation; see `Criterion`.

    Shape:
        - embeddings: (N, D), float16 to float64. labels: (N,), integers in [0, C). No references.
        - weight: (C, D), a Parameter, for C = num_classes and D = embedding_size.
        - output: (), or (N,) with ``reduction="none"``; float32, or float64 for float64 inputs.

    Raises:
        TypeError: a size is not an int, `temperature` not a number or tensor, `normalize` not a bool.
        ValueError: a size is below 1, `temperature` not above 0; an unknown `reduction` or `impl`; in a call, labels
            outside of [0, num_classes), or embeddings of another width.

    Examples:
        >>> x = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0], [-0.8, 0.6]])
        >>> labels = torch.tensor([0, 0, 1, 1])
        >>> criterion = flashpair.NormalizedSoftmaxLoss(num_classes=2, embedding_size=2, temperature=0.5)
        >>> criterion.weight.data = torch.eye(2)
        >>> round(criterion(x, labels).item(), 4)
        0.3065
    """

    shown = (*ClassCriterion.shown, "temperature")

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        temperature: float | Tensor = 0.05,
        *,
        normalize: bool = True,
        reduction: str = "mean",
        impl: str = "auto",
    ) -> None:
        super().__init__(num_classes, embedding_size, normalize=normalize, reduction=reduction, impl=impl)
        self.temperature = checks.number(temperature, "temperature", above=0)

    def row_losses(self, pairs: PairAccess) -> RowLosses:
        own, neg = _cross_entropy(pairs, 1 / self.temperature)
        return _losses(neg, own / self.temperature)


@loss(
    key="cosface",
    group="classes",
    sources=(Source(WANG_2018, "eq. 4"),),
    forms={"": {"scale": 8.0}},
    searches={"": Search({"margin": MARGIN, "scale": Range(1.0, 256.0, log=True)})},
)
class CosFaceLoss(ClassCriterion):
    """CosFace, the large-margin cosine loss (Wang et al., 2018, eq. 4).

    Cross entropy of these logits, with cos_ic the cosine of embedding i and class c's weight, y the embedding's class:

        logit_ic = scale cos_ic                 for c != y
        logit_iy = scale (cos_iy - margin)

    Args:
        num_classes: C, at least 1.
        embedding_size: D, the width of the embeddings, at least 1.
        margin: subtracted from the own class's cosine; a number or a learnable tensor ().
        scale: above 0; a number or a learnable tensor ().
        normalize: L2-normalise the embeddings first (the default). Class weights are always normalised.
        reduction: ``"mean"`` (the default) divides by N. Others: see `Criterion`.
        impl: ``"auto"`` (the default) or the name of an implementation; see `Criterion`.

    Shape:
        - embeddings: (N, D), float16 to float64. labels: (N,), integers in [0, C). No references.
        - weight: (C, D), a Parameter, for C = num_classes and D = embedding_size.
        - output: (), or (N,) with ``reduction="none"``; float32, or float64 for float64 inputs.

    Raises:
        TypeError: a size is not an int, `margin` or `scale` not a number or tensor, `normalize` not a bool.
        ValueError: a size is below 1, `scale` not above 0; an unknown `reduction` or `impl`; in a call, labels outside
            of [0, num_classes), or embeddings of another width.

    Examples:
        >>> x = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0], [-0.8, 0.6]])
        >>> labels = torch.tensor([0, 0, 1, 1])
        >>> criterion = flashpair.CosFaceLoss(num_classes=2, embedding_size=2, scale=4.0)
        >>> criterion.weight.data = torch.eye(2)
        >>> round(criterion(x, labels).item(), 4)
        0.6158
    """

    shown = (*ClassCriterion.shown, "margin", "scale")

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        margin: float | Tensor = 0.35,
        scale: float | Tensor = 64.0,
        *,
        normalize: bool = True,
        reduction: str = "mean",
        impl: str = "auto",
    ) -> None:
        super().__init__(num_classes, embedding_size, normalize=normalize, reduction=reduction, impl=impl)
        self.margin = checks.number(margin, "margin")
        self.scale = checks.number(scale, "scale", above=0)

    def row_losses(self, pairs: PairAccess) -> RowLosses:
        own, neg = _cross_entropy(pairs, self.scale)
        return _losses(neg, self.scale * (own - self.margin))


@loss(
    key="arcface",
    group="classes",
    sources=(Source(DENG_2019, "eq. 3"),),
    note="margin in degrees",
    forms={"": {"scale": 8.0}},
    searches={"": Search({"margin": Range(0.0, 57.0), "scale": Range(1.0, 256.0, log=True)})},
)
class ArcFaceLoss(ClassCriterion):
    """ArcFace, the additive angular margin loss (Deng et al., 2019, eq. 3).

    Cross entropy of these logits, with theta_ic the angle of embedding i and class c's weight, y the embedding's
    class:

        logit_ic = scale cos(theta_ic)              for c != y
        logit_iy = scale cos(theta_iy + margin)

    Args:
        num_classes: C, at least 1.
        embedding_size: D, the width of the embeddings, at least 1.
        margin: in degrees, from 0 to 180 (28.65 is 0.5 rad); a number.
        scale: above 0; a number or a learnable tensor ().
        fallback: where theta + margin is over 180 degrees, use cos(theta) - margin sin(margin) (margin in radians), so
            that the logit goes on falling. False: cos(theta + margin) everywhere.
        normalize: L2-normalise the embeddings first (the default); False: they must be unit vectors already. Class
            weights are always normalised.
        reduction: ``"mean"`` (the default) divides by N. Others: see `Criterion`.
        impl: ``"auto"`` (the default) or the name of an implementation; see `Criterion`.

    Shape:
        - embeddings: (N, D), float16 to float64. labels: (N,), integers in [0, C). No references.
        - weight: (C, D), a Parameter, for C = num_classes and D = embedding_size.
        - output: (), or (N,) with ``reduction="none"``; float32, or float64 for float64 inputs.

    Raises:
        TypeError: a size is not an int, `margin` not a number, `scale` not a number or tensor, a flag not a bool.
        ValueError: a size is below 1, `margin` not in [0, 180], `scale` not above 0; an unknown `reduction` or `impl`;
            in a call, labels outside of [0, num_classes), or embeddings of another width.

    Examples:
        >>> x = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0], [-0.8, 0.6]])
        >>> labels = torch.tensor([0, 0, 1, 1])
        >>> criterion = flashpair.ArcFaceLoss(num_classes=2, embedding_size=2, scale=4.0)
        >>> criterion.weight.data = torch.eye(2)
        >>> round(criterion(x, labels).item(), 4)
        0.694
    """

    shown = (*ClassCriterion.shown, "margin", "scale", "fallback")

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        margin: float = 28.6,
        scale: float | Tensor = 64.0,
        fallback: bool = True,
        *,
        normalize: bool = True,
        reduction: str = "mean",
        impl: str = "auto",
    ) -> None:
        super().__init__(num_classes, embedding_size, normalize=normalize, reduction=reduction, impl=impl)
        self.margin = checks.plain_number(margin, "margin", at_least=0)
        if self.margin > 180:
            raise ValueError(f"margin must be at most 180 degrees, got {margin!r}")
        self.scale = checks.number(scale, "scale", above=0)
        self.fallback = checks.flag(fallback, "fallback")

    def row_losses(self, pairs: PairAccess) -> RowLosses:
        own, neg = _cross_entropy(pairs, self.scale)
        m = math.radians(self.margin)
        target = own * math.cos(m) - sine(own) * math.sin(m)
        if self.fallback:
            target = torch.where(own >= -math.cos(m), target, own - m * math.sin(m))
        return _losses(neg, self.scale * target)


def sine(cosine: Tensor) -> Tensor:
    """sqrt(1 - cosine^2), with gradient 0 at cosines of -1 and 1."""
    rest = 1 - cosine * cosine
    inside = rest > 0
    return torch.where(inside, torch.where(inside, rest, 1.0).sqrt(), 0.0)


@loss(
    key="sphereface",
    group="classes",
    sources=(Source(LIU_2017, "eq. 7"),),
)
class SphereFaceLoss(ClassCriterion):
    """SphereFace: a multiplicative angular margin (Liu et al., 2017, eq. 7).

    Cross entropy of these logits, with theta_ic the angle of embedding x_i and class c's weight, y the embedding's
    class:

        logit_ic = scale |x_i| cos(theta_ic)                                      for c != y
        logit_iy = scale |x_i| (lam cos(theta_iy) + psi(theta_iy)) / (1 + lam)
        psi(theta) = (-1)^k cos(margin theta) - 2 k    for theta in [k, k + 1] pi / margin

    Args:
        num_classes: C, at least 1.
        embedding_size: D, the width of the embeddings, at least 1.
        margin: m of the paper, an int of at least 1.
        scale: of all logits, above 0; a number or a learnable tensor ().
        lam: the annealing weight, at least 0; a number. Change the attribute ``lam`` as training goes on (the authors:
            max(5, 1000 / (1 + 0.12 iteration))).
        normalize: L2-normalise the embeddings first; by default, as published, they are taken as they are. Class
            weights are always normalised.
        reduction: ``"mean"`` (the default) divides by N. Others: see `Criterion`.
        impl: ``"auto"`` (the default) or the name of an implementation; see `Criterion`.

    Shape:
        - embeddings: (N, D), float16 to float64. labels: (N,), integers in [0, C). No references.
        - weight: (C, D), a Parameter, for C = num_classes and D = embedding_size.
        - output: (), or (N,) with ``reduction="none"``; float32, or float64 for float64 inputs.

    Raises:
        TypeError: a size or `margin` is not an int, `scale` not a number or tensor, `lam` not a number, `normalize` not
            a bool.
        ValueError: a size or `margin` is below 1, `scale` not above 0, `lam` below 0; an unknown `reduction` or `impl`;
            in a call, labels outside of [0, num_classes), or embeddings of another width.

    Examples:
        >>> x = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0], [-0.8, 0.6]])
        >>> labels = torch.tensor([0, 0, 1, 1])
        >>> criterion = flashpair.SphereFaceLoss(num_classes=2, embedding_size=2)
        >>> criterion.weight.data = torch.eye(2)
        >>> round(criterion(x, labels).item(), 4)
        0.9007
    """

    shown = (*ClassCriterion.shown, "margin", "scale", "lam")

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        margin: int = 4,
        scale: float | Tensor = 1.0,
        lam: float = 0.0,
        *,
        normalize: bool = False,
        reduction: str = "mean",
        impl: str = "auto",
    ) -> None:
        super().__init__(num_classes, embedding_size, normalize=normalize, reduction=reduction, impl=impl)
        self.margin = checks.integer(margin, "margin", at_least=1)
        self.scale = checks.number(scale, "scale", above=0)
        self.lam = checks.plain_number(lam, "lam", at_least=0)

    def row_losses(self, pairs: PairAccess) -> RowLosses:
        own, neg = _cross_entropy(pairs, self.scale)
        squares = pairs.squared_norms()
        some = squares > 0
        norm = torch.where(some, torch.where(some, squares, 1.0).sqrt(), 0.0)
        cosine = torch.where(some, own / torch.where(some, norm, 1.0), 0.0).clamp(-1, 1)
        theta = torch.acos(cosine.detach())
        k = (self.margin * theta / math.pi).floor().clamp_max(self.margin - 1)
        psi = (1 - 2 * (k % 2)) * _chebyshev(cosine, self.margin) - 2 * k
        target = norm * (self.lam * cosine + psi) / (1 + self.lam)
        return _losses(neg, self.scale * target)


def _chebyshev(cosine: Tensor, order: int) -> Tensor:
    """cos(order theta) as a polynomial of cos theta. It is smooth at -1 and 1, where acos is not."""
    before, now = torch.ones_like(cosine), cosine
    for _ in range(order - 1):
        before, now = now, 2 * cosine * now - before
    return now
