"""SoftTriple loss (Qian et al., ICCV 2019, eq. 7-8)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .. import checks
from ..similarity import logaddexp, masked_logsumexp, normalize, softplus, upcast
from .base import RowLosses, average
from .classes import ClassCriterion

CHUNK_BYTES = 2**24  # of similarities at a time


class SoftTripleLoss(ClassCriterion):
    """SoftTriple loss (Qian et al., 2019, eq. 8): cross entropy of la (S_c - margin [c = y]) over classes c of several
    centres each, S_c = sum_k softmax_k(s_ck / gamma) s_ck, and tau times the regulariser of eq. 9 (without its square
    root's gradient at 0): centres of a class that are not needed should fall together.

    The B x C x K similarities are never stored: classes are taken some at a time, and once more by backward.

    Args:
        num_classes, embedding_size, centers_per_class: C, D and K of `weight` (C, K, D).
        la, gamma: above 0; gamma is a temperature. `margin`: delta. Numbers or learnable tensors ().
        tau: weight of the regulariser, at least 0 (the paper: 0.2).
        normalize, reduction, impl: see `Criterion`, with ``"auto"``, ``"tiled"`` (by chunks, in PyTorch on any device)
            and ``"reference"``. `normalize` is of embeddings; centres always are.

    Raises:
        ValueError: labels outside of [0, num_classes), or embeddings of another width.
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
        dense = self.impl == "reference"
        each = x.element_size() * self.centers_per_class * max(x.shape[0], 1)
        size = self.num_classes if dense else max(1, CHUNK_BYTES // each)

        def others(first: int, x: Tensor, weight: Tensor) -> Tensor:
            """logsumexp over the classes first, first + 1, ... of `weight`, but for the row's own."""
            classes = torch.arange(first, first + weight.shape[0], device=x.device)
            return masked_logsumexp(self.la * self._similarity(x, weight), labels[:, None] != classes)

        own = self.la * (self._relaxed(torch.einsum("nd,nkd->nk", x, normalize_centres(weight[labels]))) - self.margin)
        neg = own.new_full(own.shape, -torch.inf)
        again = size < self.num_classes and torch.is_grad_enabled()
        for first, part in zip(range(0, self.num_classes, size), weight.split(size), strict=True):
            found = checkpoint(others, first, x, part, use_reentrant=False) if again else others(first, x, part)
            neg = logaddexp(neg, found)
        losses = softplus(neg - own)
        if self.tau:
            losses = losses + self.tau * self._spread(weight)
        rows = RowLosses(losses, torch.ones_like(losses, dtype=torch.bool), losses.shape[0])
        return losses if self.reduction == "none" else average(rows, self.reduction)

    def _similarity(self, x: Tensor, weight: Tensor) -> Tensor:  # (B, D), (c, K, D) -> (B, c)
        s = x @ normalize_centres(weight).flatten(0, 1).T
        return self._relaxed(s.unflatten(1, weight.shape[:2]))

    def _relaxed(self, s: Tensor) -> Tensor:  # (..., K) -> (...)
        return (torch.softmax(s / self.gamma, -1) * s).sum(-1)

    def _spread(self, weight: Tensor) -> Tensor:
        """Eq. 9: the mean distance of a class's centres."""
        k = self.centers_per_class
        if k == 1:
            return weight.new_zeros(())
        w = normalize_centres(weight)
        one, other = torch.triu_indices(k, k, 1, device=w.device)
        distance = (2 + 1e-5 - 2 * torch.bmm(w, w.transpose(1, 2))[:, one, other]).sqrt()
        return distance.sum() / (self.num_classes * k * (k - 1))


def normalize_centres(weight: Tensor) -> Tensor:  # (c, K, D)
    return normalize(weight.flatten(0, 1)).unflatten(0, weight.shape[:2])
