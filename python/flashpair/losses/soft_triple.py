"""SoftTriple loss (Qian et al., ICCV 2019)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..core import checks
from ..core.class_pairs import ClassPairs
from ..core.pairs import DensePairs, PairAccess
from ..core.similarity import (
    inverse_norm,
    l2_normalize,
    masked_logsumexp,
    nan_unless_finite,
    no_autocast,
    softplus,
    through_normalize,
    upcast,
)
from ..engine.pairs import dense_pairs_of
from .base import Penalty, RowLosses
from .class_loss import ClassCriterion
from .declaration import MARGIN, POSITIVE, SCALE, Range, Search, Source, loss
from .papers import QIAN_2019

CHUNK_BYTES = 2**21  # of similarities at a time
MOST_EXPONENT = 40.0  # e^40 and e^-40, their squares, and sums of them are far from where float32 ends


@loss(
    key="soft_triple",
    group="classes",
    sources=(Source(QIAN_2019),),
    forms={"": {"centers_per_class": 3, "tau": 0.2}},
    searches={
        "": Search(
            {"centers_per_class": Range(1.0, 10.0, integer=True), "la": SCALE, "gamma": POSITIVE, "margin": MARGIN}
        )
    },
)
class SoftTripleLoss(ClassCriterion):
    """SoftTriple loss: cross entropy over classes of several centres each (Qian et al., 2019).

    With s_ick the cosine of embedding i and centre k of class c, y the embedding's class:

        S_ic = sum_k softmax_k(s_ick / gamma) s_ick
        L_i = -log(e^(la (S_iy - margin)) / (e^(la (S_iy - margin)) + sum_{c != y} e^(la S_ic)))

    To this is added tau times the mean distance of a class's centres (eq. 9, with 1e-5 under the root, as in the
    authors' code), which lets centres that a class does not need fall together.

    The N x C x K similarities are not stored, unless `la` or `gamma` is a tensor: forward and backward each go over the
    classes a chunk at a time.

    Args:
        num_classes: C, at least 1.
        embedding_size: D, the width of the embeddings, at least 1.
        centers_per_class: K, at least 1.
        la: the scale lambda, above 0; a number or a learnable tensor ().
        gamma: the temperature over a class's centres, above 0; a number or a learnable tensor ().
        margin: delta of the paper; a number or a learnable tensor ().
        tau: weight of the term on centres, at least 0 (the paper: 0.2); a number. The default 0 leaves it out.
        normalize: L2-normalise the embeddings first (the default). Centres are always normalised.
        reduction: ``"mean"`` (the default) divides by N. Others: see `Criterion`.
        impl: ``"auto"`` (the default), ``"tiled"`` (by chunks, in PyTorch, on any device) or ``"reference"``.

    Shape:
        - embeddings: (N, D), float16 to float64. labels: (N,), integers in [0, C). No references.
        - weight: (C, K, D), a Parameter, for C = num_classes, K = centers_per_class and D = embedding_size.
        - output: (), or (N,) with ``reduction="none"``; float32, or float64 for float64 inputs.

    Raises:
        TypeError: a size is not an int, `la`, `gamma` or `margin` not a number or tensor, `tau` not a number,
            `normalize` not a bool.
        ValueError: a size is below 1, `la` or `gamma` not above 0, `tau` below 0; an unknown `reduction`, or an `impl`
            that this loss does not have; in a call, labels outside of [0, num_classes), or embeddings of another width.

    Examples:
        >>> x = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0], [-0.8, 0.6]])
        >>> labels = torch.tensor([0, 0, 1, 1])
        >>> criterion = flashpair.SoftTripleLoss(num_classes=2, embedding_size=2, centers_per_class=2, la=4.0)
        >>> criterion.weight.data = torch.stack([torch.eye(2), -torch.eye(2)])
        >>> round(criterion(x, labels).item(), 4)
        1.116
    """

    anchors = "samples"  # said here, as `rows` is: a row is of one sample and all centres
    penalizes = "classes"
    shown = (*ClassCriterion.shown, "centers_per_class", "la", "gamma", "margin", "tau")

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        centers_per_class: int = 10,
        la: float | Tensor = 20.0,
        gamma: float | Tensor = 0.1,
        margin: float | Tensor = 0.01,
        tau: float = 0.0,
        *,
        normalize: bool = True,
        reduction: str = "mean",
        impl: str = "auto",
    ) -> None:
        super().__init__(num_classes, embedding_size, normalize=normalize, reduction=reduction, impl=impl)
        self.centers_per_class = checks.integer(centers_per_class, "centers_per_class", at_least=1)
        self.la = checks.number(la, "la", above=0)
        self.gamma = checks.number(gamma, "gamma", above=0)
        self.margin = checks.number(margin, "margin")
        self.tau = checks.plain_number(tau, "tau", at_least=0)
        self.weight = nn.Parameter(torch.empty(num_classes, centers_per_class, embedding_size))
        self.reset_parameters()
        if impl not in ("auto", "tiled", "reference"):
            raise ValueError(f"impl of SoftTripleLoss must be one of auto, tiled, reference, got {impl!r}")

    def pairs_of(self, x: Tensor, labels: Tensor, y: Tensor | None, ref_labels: Tensor | None, impl: str) -> PairAccess:
        """Pairs of embeddings and all C K centres, over the dense matrix."""
        x, weight = self._sides(x)
        classes = torch.arange(self.num_classes, device=x.device).repeat_interleave(self.centers_per_class)
        z = x @ unit(weight).flatten(0, 1).T
        return dense_pairs_of(z, labels, classes, nan_unless_finite(x, weight.flatten(0, 1)))

    def row_losses(self, pairs: PairAccess) -> RowLosses:
        assert isinstance(pairs, DensePairs)
        s = pairs.z.unflatten(1, (self.num_classes, self.centers_per_class))
        own, neg = of_similarities(s, pairs.labels, self.la, self.gamma)
        return self.row_losses_of(own + pairs.nonfinite, neg)

    def rows(
        self, x: Tensor, labels: Tensor, y: Tensor | None, ref_labels: Tensor | None, impl: str
    ) -> tuple[RowLosses, PairAccess | None]:
        if impl == "reference" or isinstance(self.la, Tensor) or isinstance(self.gamma, Tensor):
            return super().rows(x, labels, y, ref_labels, impl)
        return self.row_losses_of(*self.own_and_others(x, labels)), None

    def refuses_parts(self) -> str | None:
        if isinstance(self.la, Tensor) or isinstance(self.gamma, Tensor):
            return "la and gamma of SoftTripleLoss must be numbers where classes are split over processes, got a tensor"
        return None

    def rows_of_parts(
        self, x: Tensor, labels: Tensor, total: Callable[[Tensor], Tensor], logsumexp: Callable[[Tensor], Tensor]
    ) -> RowLosses | None:
        own, others = self.own_and_others(x, labels)
        return self.row_losses_of(total(own), logsumexp(others))

    def own_and_others(self, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """S of each row's own class (B,), and the logsumexp of la S over the other classes (B,).

        x: (B, D). labels: (B,) int64. A row whose class is not among these classes has an own S of 0.
        """
        bounded = self.normalize and 1 / self.gamma <= MOST_EXPONENT  # |s| is at most 1
        own, neg = _Chunked.apply(*self._sides(x), labels, self.la, self.gamma, bounded)
        return own, neg

    def _sides(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = upcast(x, self.weight)
        assert weight is not None
        return l2_normalize(x) if self.normalize else x, weight

    def row_losses_of(self, own: Tensor, neg: Tensor) -> RowLosses:
        losses = softplus(neg - self.la * (own - self.margin))
        return RowLosses(losses, torch.ones_like(losses, dtype=torch.bool), losses.shape[0])

    def penalty_of(
        self, x: Tensor, labels: Tensor, y: Tensor | None, ref_labels: Tensor | None, chosen: ClassPairs | None = None
    ) -> Penalty | None:
        """Eq. 9: the mean distance of a class's centres."""
        k = self.centers_per_class
        if not self.tau or k == 1:
            return None
        w = unit(self.weight)
        first, second = torch.triu_indices(k, k, 1, device=w.device)
        distance = (2 + 1e-5 - 2 * torch.bmm(w, w.transpose(1, 2))[:, first, second]).sqrt()
        mean = self.tau * distance.sum() / (self.num_classes * k * (k - 1))
        return Penalty(mean, torch.ones_like(mean))


def unit(weight: Tensor) -> Tensor:
    """The centres (C, K, D), each divided by its norm."""
    return l2_normalize(weight.flatten(0, 1)).unflatten(0, weight.shape[:2])


def of_similarities(s: Tensor, labels: Tensor, la: float | Tensor, gamma: float | Tensor) -> tuple[Tensor, Tensor]:
    """S of each row's own class (B,), and the logsumexp of la S over the other classes (B,).

    Args:
        s: (B, C, K), the similarities with all centres.
        labels: (B,) int64.
        la: a number or a tensor ().
        gamma: a number or a tensor ().
    """
    relaxed = (torch.softmax(s / gamma, 2) * s).sum(2)
    others = labels[:, None] != torch.arange(s.shape[1], device=s.device)
    return relaxed.gather(1, labels[:, None])[:, 0], masked_logsumexp(la * relaxed, others)


class _Chunked(torch.autograd.Function):
    """`of_similarities` of x (B, D) and centres (C, K, D), by chunks of classes.

    It keeps numbers (B,) for backward, which computes each chunk again. Second derivatives use the dense form.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, labels: Tensor, la: float, gamma: float, bounded: bool
    ) -> tuple[Tensor, Tensor]:
        # The logsumexp is kept as its largest term and the rest. Their sum would lose the rest: log 2 of a tie at 1e8.
        own, top, total = x.new_zeros(x.shape[0]), x.new_full(x.shape[:1], -torch.inf), x.new_zeros(x.shape[0])
        for chunk in _chunks(x, weight, labels, gamma, bounded):
            at_label = chunk.mean.gather(1, chunk.column)
            # not in place: torch.compile of torch 2.11 would lose its gradient
            own = own + torch.where(chunk.inside, at_label, 0.0)[:, 0]
            logits = (la * chunk.mean).scatter(1, chunk.column, torch.where(chunk.inside, -torch.inf, la * at_label))
            high = torch.maximum(top, logits.amax(1))
            base = high.masked_fill(~high.isfinite(), 0.0)
            total = total * (top - base).exp() + (logits - base[:, None]).exp().sum(1)
            top = high
        top, rest = top.masked_fill(~top.isfinite(), 0.0), total.log()
        ctx.la, ctx.gamma, ctx.bounded = la, gamma, bounded
        # with a single class there are no other classes, and so no gradient
        ctx.save_for_backward(x, weight, labels, top, rest.masked_fill(total == 0, 0.0))
        return own, top + rest

    @staticmethod
    def backward(ctx: Any, g_own: Tensor, g_neg: Tensor) -> tuple[Tensor | None, ...]:
        with no_autocast(g_own.device.type):
            return _Chunked.gradient(ctx, g_own, g_neg)

    @staticmethod
    def gradient(ctx: Any, g_own: Tensor, g_neg: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, labels, top, rest = ctx.saved_tensors
        if torch.is_grad_enabled():  # to be differentiated again
            x, weight = x.view_as(x), weight.view_as(weight)  # one may be a function of the other
            s = (x @ unit(weight).flatten(0, 1).T).unflatten(1, weight.shape[:2])
            values = of_similarities(s, labels, ctx.la, ctx.gamma)
            return *torch.autograd.grad(values, (x, weight), (g_own, g_neg), create_graph=True), *(None,) * 4
        dx, dweight = torch.zeros_like(x), torch.empty_like(weight)
        share = (ctx.la * g_neg)[:, None]
        for chunk in _chunks(x, weight, labels, ctx.gamma, ctx.bounded):
            q = torch.exp(ctx.la * chunk.mean - top[:, None] - rest[:, None]).mul_(share)
            q.scatter_(1, chunk.column, torch.where(chunk.inside, g_own[:, None], q.gather(1, chunk.column)))
            # dS/ds_k = pi_k (1 + (s_k - S) / gamma)
            w = chunk.t.sub_((chunk.inner - 1)[:, None]).mul_(chunk.e).mul_(q.div_(chunk.total)[:, None])
            w = w.flatten(1)
            dx.addmm_(w, chunk.unit)
            part = through_normalize(w.T @ x, chunk.unit, chunk.inverse)
            shape = chunk.e.shape[1:]
            dweight[chunk.first : chunk.first + shape[1]] = part.unflatten(0, shape).transpose(0, 1)
        return dx, dweight, None, None, None, None


class _Chunk(NamedTuple):
    """A chunk of c classes.

    Attributes:
        first: the number of the first class.
        unit: (K c, D), the unit centres; k comes before c, so that a softmax over K works on whole vectors.
        inverse: (K c, 1), the reciprocals of the centres' norms.
        t: (B, K, c), s / gamma, less the largest of its class unless `bounded`.
        e: (B, K, c), the exponentials of t.
        total: (B, c), the sums of e over K.
        inner: (B, c), the softmax means of t.
        mean: (B, c), the softmax means S of s.
        inside: (B, 1) bool, whether the row's own class is in the chunk.
        column: (B, 1) int64, where the row's own class stands in the chunk; any place if it is not `inside`.
    """

    first: int
    unit: Tensor
    inverse: Tensor
    t: Tensor
    e: Tensor
    total: Tensor
    inner: Tensor
    mean: Tensor
    inside: Tensor
    column: Tensor


def _chunks(x: Tensor, weight: Tensor, labels: Tensor, gamma: float, bounded: bool) -> Iterator[_Chunk]:
    """The classes in chunks. bounded: exponentials of s / gamma cannot overflow."""
    x = x / gamma  # divides B D numbers, not B K c similarities
    size = max(1, CHUNK_BYTES // (x.element_size() * weight.shape[1] * max(x.shape[0], 1)))
    for first in range(0, weight.shape[0], size):
        part = weight[first : first + size].transpose(0, 1)
        shape = part.shape[:2]
        part = part.flatten(0, 1)
        inverse = inverse_norm(part)
        centres = part * inverse
        t = (x @ centres.T).unflatten(1, shape)
        top = None if bounded else t.amax(1)
        if top is not None:
            t -= top[:, None]
        e = t.exp()
        total = e.sum(1)
        inner = (e * t).sum(1).div_(total)
        mean = (inner if top is None else inner + top) * gamma
        inside = (labels >= first) & (labels < first + shape[1])
        column = (labels - first).clamp(0, shape[1] - 1)
        yield _Chunk(first, centres, inverse, t, e, total, inner, mean, inside[:, None], column[:, None])
