"""Circle loss (Sun et al., CVPR 2020, eq. 6)."""

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
from .declaration import MARGIN, Range, Search, Source, loss
from .histogram import of_batch
from .papers import SUN_2020


def _paced(turn: float) -> str:
    """The transform max(0, t) (t - turn). Its factor max(0, t), the pair's weight, gets no gradient."""
    return specialised(f"circle {turn!r}", lambda t: t.relu().detach() * (t - turn))


_paced._dynamo_marked_constant = True  # type: ignore[attr-defined]  # as transforms.unsupported_reasons


@loss(
    key="circle",
    group="pairs",
    sources=(Source(SUN_2020, "eq. 6"),),
    forms={"": {"gamma": 20.0}, "(over='batch')": {"gamma": 20.0, "over": "batch"}},
    searches={"": Search({"m": MARGIN, "gamma": Range(1.0, 256.0, log=True)})},
)
class CircleLoss(Criterion):
    """Circle loss: each pair weighted by how far it is from its optimum (Sun et al., 2020, eq. 6).

    With cosines s and the self-paced weights a_n = max(0, s + m), a_p = max(0, 1 + m - s):

        L_i = log(1 + sum_N e^(gamma a_n (s_in - m)) sum_P e^(-gamma a_p (s_ip - 1 + m)))

    The weights are constants to autograd, as published: the gradient is not the derivative of the value, and second
    derivatives hold the weights fixed. Anchors without a positive or without a negative have no loss.

    Args:
        m: the margin; a number (0.4 for fine-grained retrieval, 0.25 for faces).
        gamma: the scale, above 0; a number (80 for fine-grained retrieval, 256 for faces).
        over: ``"anchors"`` (the default): one loss for each anchor; ``"batch"``: one loss over all unordered pairs of
            the batch.
        normalize: L2-normalise the embeddings and references first (the default).
        reduction: ``"mean_valid"`` (the default): mean over anchors with a loss. With ``over="batch"`` every reduction
            but "none" gives the same number, and "none" an equal share for each row. Others: see `Criterion`.
        impl: ``"auto"`` (the default) or the name of an implementation; see `Criterion`.

    Shape:
        - embeddings: (N, D), float16 to float64. labels: (N,), integers.
        - ref_emb: (M, D) and ref_labels: (M,), optional.
        - output: (), or (N,) with ``reduction="none"``; float32, or float64 for float64 inputs.

    Raises:
        TypeError: `m` or `gamma` is not a number (tensors are not taken), `normalize` not a bool.
        ValueError: `gamma` is not above 0; an unknown `over`, `reduction` or `impl`.

    Examples:
        >>> x = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0], [-0.8, 0.6]])
        >>> labels = torch.tensor([0, 0, 1, 1])
        >>> round(flashpair.CircleLoss(gamma=10.0)(x, labels).item(), 4)
        2.7996
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

    def row_losses(self, pairs: PairAccess) -> RowLosses:
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

    def _of_batch(self, pairs: PairAccess, pos: Tensor, neg: Tensor) -> RowLosses:
        twice = 2 * math.log(2) if pairs.square else 0.0  # each unordered pair is there from both of its ends
        some = (pairs.batch_sum(pairs.num_positives()) > 0) & (pairs.batch_sum(pairs.num_negatives()) > 0)
        both = [pairs.batch_logsumexp(row) for row in (pos, neg)]
        loss = softplus((both[0] + both[1] - twice).masked_fill(~some, 0.0)).masked_fill(~some, 0.0)
        return of_batch(loss, some, pairs)
