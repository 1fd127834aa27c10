"""Circle loss (Sun et al., CVPR 2020, eq. 6)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..core import checks
from ..core.reduction import Reduction
from ..core.similarity import softplus
from ..core.transforms import specialised
from .base import AnyPairs, Criterion, RowLosses
from .histogram import of_batch


def _paced(turn: float) -> str:
    """max(0, t) (t - turn) whose factor max(0, t), the pair's pace, is constant to autograd."""
    return specialised(f"circle {turn!r}", lambda t: t.relu().detach() * (t - turn))


_paced._dynamo_marked_constant = True  # type: ignore[attr-defined]  # as transforms.unsupported_reasons


class CircleLoss(Criterion):
    """Circle loss (Sun et al., 2020, eq. 6), with self-paced weights a_n = max(0, s + m), a_p = max(0, 1 + m - s):

    L_i = log(1 + sum_N e^(gamma a_n (s - m)) sum_P e^(-gamma a_p (s - 1 + m))).

    The weights are constants to autograd, as published: the gradient is not the derivative of the value, and second
    derivatives are those of the gradient with these weights held.

    Args:
        m: the margin, `gamma`: the scale, above 0; numbers (0.4, 80: fine-grained retrieval; 0.25, 256: faces).
        over: ``"anchors"``: one loss an anchor; ``"batch"``: one loss of all unordered pairs of the batch.
        normalize, reduction, impl: see `Criterion`; rows without a positive or a negative have no loss. Default:
            "mean_valid". With ``over="batch"`` every reduction but "none" gives the one number, of which each row has
            the same share.
    """

    differentiates = False
    shown = ("m", "gamma", "over")

    def __init__(
        self,
        m: float = 0.4,
        gamma: float = 80.0,
        over: str = "anchors",
        *,
        normalize: bool = True,
        reduction: str = "mean_valid",
        impl: str = "auto",
    ) -> None:
        super().__init__(normalize=normalize, reduction=reduction, impl=impl)
        self.m = checks.plain_number(m, "m")
        self.gamma = checks.plain_number(gamma, "gamma", above=0)
        self.over = checks.word(over, ("anchors", "batch"), "over")
        self._phi()  # known before anything is compiled

    def _phi(self) -> str:
        return _paced(2 * self.m * self.gamma**0.5)

    def row_losses(self, pairs: AnyPairs) -> RowLosses:
        root, phi = self.gamma**0.5, self._phi()
        pos, neg = pairs.reduce(
            Reduction("logsumexp", "positives", phi, scale=-root, offset=root * (1 + self.m)),
            Reduction("logsumexp", "negatives", phi, scale=root, offset=root * self.m),
        )
        if self.over == "batch":
            return self._of_batch(pairs, pos, neg)
        valid = (pairs.num_positives() > 0) & (pairs.num_negatives() > 0)
        total = torch.where(valid, pos, 0.0) + torch.where(valid, neg, 0.0)
        return RowLosses(torch.where(valid, softplus(total), 0.0), valid, valid.shape[0])

    def _of_batch(self, pairs: AnyPairs, pos: Tensor, neg: Tensor) -> RowLosses:
        twice = 2 * math.log(2) if pairs.square else 0.0  # each unordered pair is there from both of its ends
        some = (pairs.total(pairs.num_positives()) > 0) & (pairs.total(pairs.num_negatives()) > 0)
        both = [pairs.total_logsumexp(row) for row in (pos, neg)]
        loss = softplus((both[0] + both[1] - twice).masked_fill(~some, 0.0)).masked_fill(~some, 0.0)
        return of_batch(loss, some, pairs)
