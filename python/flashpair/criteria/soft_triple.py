"""SoftTriple loss (Qian et al., ICCV 2019)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .. import checks
from ..similarity import masked_logsumexp, normalize, softplus, upcast
from .base import RowLosses, average
from .classes import ClassCriterion

CHUNK_BYTES = 2**21  # of similarities at a time


class SoftTripleLoss(ClassCriterion):
    """SoftTriple loss (Qian et al., 2019): cross entropy of la (S_c - margin [c = y]) over classes c of several
    centres each, S_c = sum_k softmax_k(s_ck / gamma) s_ck, and tau times its regulariser (with 1e-5 under the root,
    as the authors have it): centres of a class that are not needed should fall together.

    The B x C x K similarities are not stored, unless `la` or `gamma` is a tensor: classes are taken some at a time, and
    once more by backward.

    Args:
        num_classes, embedding_size, centers_per_class: C, D and K of `weight` (C, K, D).
        la, gamma: above 0; gamma is a temperature. `margin`: delta. Numbers or learnable tensors ().
        tau: weight of the regulariser, at least 0 (the paper: 0.2).
        normalize, reduction, impl: see `Criterion`, with ``"auto"``, ``"tiled"`` (by chunks, in PyTorch on any device)
            and ``"reference"``. `normalize` is of embeddings; centres always are.

    Raises:
        ValueError: labels outside of [0, num_classes), embeddings of another width, or another `impl`.
    """

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

    def _loss(self, x: Tensor, labels: Tensor, y: Tensor | None, ref_labels: Tensor | None) -> Tensor:
        x, weight = upcast(x, self.weight)
        assert weight is not None
        x = normalize(x) if self.normalize else x
        w = normalize_centres(weight)
        own = self.la * (relaxed(torch.einsum("nd,nkd->nk", x, w[labels]), self.gamma) - self.margin)
        neg = others(x, w, labels, self.la, self.gamma, self.impl == "reference")
        losses = softplus(neg - own)
        if self.tau:
            losses = losses + self.tau * self._spread(w)
        rows = RowLosses(losses, torch.ones_like(losses, dtype=torch.bool), losses.shape[0])
        return losses if self.reduction == "none" else average(rows, self.reduction)

    def _spread(self, w: Tensor) -> Tensor:
        """The regulariser: the mean distance of a class's centres."""
        k = self.centers_per_class
        if k == 1:
            return w.new_zeros(())
        one, other = torch.triu_indices(k, k, 1, device=w.device)
        distance = (2 + 1e-5 - 2 * torch.bmm(w, w.transpose(1, 2))[:, one, other]).sqrt()
        return distance.sum() / (self.num_classes * k * (k - 1))


def normalize_centres(weight: Tensor) -> Tensor:  # (C, K, D)
    return normalize(weight.flatten(0, 1)).unflatten(0, weight.shape[:2])


def relaxed(s: Tensor, gamma: float | Tensor) -> Tensor:  # (..., K) -> (...)
    """The similarity to a class: the softmax-weighted mean of those to its centres."""
    return (torch.softmax(s / gamma, -1) * s).sum(-1)


def others(x: Tensor, w: Tensor, labels: Tensor, la: float | Tensor, gamma: float | Tensor, dense: bool) -> Tensor:
    """(B,): logsumexp of la S_c over all classes c but the row's own, of unit centres w (C, K, D)."""
    if dense or isinstance(la, Tensor) or isinstance(gamma, Tensor):
        logits = la * relaxed((x @ w.flatten(0, 1).T).unflatten(1, w.shape[:2]), gamma)
        return masked_logsumexp(logits, labels[:, None] != torch.arange(w.shape[0], device=x.device))
    found: Tensor = _Others.apply(x, w, labels, la, gamma)
    return found


class _Others(torch.autograd.Function):
    """`others` by chunks of classes, which backward computes again. Keeps (B,) numbers."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, labels: Tensor, la: float, gamma: float) -> Tensor:
        total = x.new_full(x.shape[:1], -torch.inf)
        for first, part in _chunks(x, w):
            _, _, logits = _of_chunk(x, part, first, labels, la, gamma)
            total = torch.logaddexp(total, torch.logsumexp(logits, 1))
        ctx.la, ctx.gamma = la, gamma
        ctx.save_for_backward(x, w, labels, total)
        return total

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, w, labels, total = ctx.saved_tensors
        if torch.is_grad_enabled():  # to be differentiated again
            dense = others(x, w, labels, ctx.la, ctx.gamma, True)
            return *torch.autograd.grad(dense, (x, w), g, create_graph=True), None, None, None
        dx, dw = torch.zeros_like(x), torch.empty_like(w)
        # of an only class nothing is left over: no gradient
        height, share = torch.where(total > -torch.inf, total, 0.0)[:, None], (ctx.la * g)[:, None]
        for first, part in _chunks(x, w):
            s, pi, logits = _of_chunk(x, part, first, labels, ctx.la, ctx.gamma)
            q = torch.exp(logits - height).mul_(share)
            mean = (pi * s).sum(1, keepdim=True)
            weight = s.sub_(mean).div_(ctx.gamma).add_(1).mul_(pi).mul_(q[:, None]).flatten(1)
            dx.addmm_(weight, part.flatten(0, 1))
            dw[first : first + part.shape[1]] = (weight.T @ x).unflatten(0, part.shape[:2]).transpose(0, 1)
        return dx, dw, None, None, None


def _chunks(x: Tensor, w: Tensor) -> Iterator[tuple[int, Tensor]]:
    """First class and centres (K, c, D) of each: softmaxes over K are then of whole vectors."""
    size = max(1, CHUNK_BYTES // (x.element_size() * w.shape[1] * max(x.shape[0], 1)))
    for first in range(0, w.shape[0], size):
        yield first, w[first : first + size].transpose(0, 1).contiguous()


def _of_chunk(
    x: Tensor, part: Tensor, first: int, labels: Tensor, la: float, gamma: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Similarities (B, K, c), their softmax over K, and la S_c (B, c), -inf where it is the row's own class."""
    s = (x @ part.flatten(0, 1).T).unflatten(1, part.shape[:2])
    pi = (s - s.amax(1, keepdim=True)).div_(gamma).exp_()
    pi /= pi.sum(1, keepdim=True)
    logits = (pi * s).sum(1).mul_(la)
    inside = (labels >= first) & (labels < first + part.shape[1])
    column = (labels - first).clamp(0, part.shape[1] - 1)[:, None]
    return s, pi, logits.scatter(1, column, torch.where(inside[:, None], -torch.inf, logits.gather(1, column)))
