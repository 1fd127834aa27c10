"""Warnings where pytorch-metric-learning 2.9 gives a number that flashpair does not reproduce.

A fused criterion has a hook, `Watch`, that tests each call for the cases of `corners`. It warns of a case once in a
process for each class of loss, and then stops testing for it. On a GPU a later call reads the results, so that nothing
waits.
"""

from __future__ import annotations

import sys
import warnings
from collections import deque
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..core.checks import Labelled
from ..core.similarity import autocasts, no_autocast
from .calls import Answer, Call
from .corners import CORNERS, Corner

REASONS = {
    "one pair": "pytorch-metric-learning gives 0 for at most one positive and one negative pair (an anchor against "
    "two references, or few mined pairs); the fused criterion gives the loss of these pairs",
    "same references": "pytorch-metric-learning leaves out the pair of embedding k and reference k if ref_labels is "
    "the same tensor as labels (NCALoss: if ref_emb is the same tensor as embeddings), even if the two are different "
    "towers; the fused criterion keeps that pair. Without references both leave out self-pairs",
    "euclidean duplicates": "pytorch-metric-learning has torch.cdist's rounding (5e-4 in float32) for the distance of "
    "equal embeddings in batches of more than 25, and counts it in averages of terms above 0; the fused criterion "
    "has 0",
    "lifted structure without a side": "pytorch-metric-learning gives GeneralizedLiftedStructureLoss of an anchor "
    "without positives or without negatives as if that side's logsumexp were 0; the fused criterion gives 0",
    "nt-xent clip": "pytorch-metric-learning clips each pair of NTXentLoss at -log(smallest normal number), 87.3 in "
    "float32 and 9.7 in float16, and gives clipped pairs no gradient; the fused criterion does not clip",
    "supcon without negatives": "pytorch-metric-learning gives SupConLoss of a batch without any negative pair as 0; "
    "the fused criterion gives the loss, with the positives in the denominator",
    "nca underflow": "pytorch-metric-learning drops the hardest anchors of NCALoss and ProxyNCALoss, whose "
    "probability underflows to 0, and gives NaN if no anchor is left; the fused criterion keeps them, and gives 0 "
    "for a batch without anchors",
    "tuplet duplicates": "pytorch-metric-learning gives TupletMarginLoss a gradient of NaN (or a value of NaN) if the "
    "cosine of a positive is 1, because of a duplicate or by rounding; the fused criterion gives a finite gradient, "
    "which leaves out the sine",
    "angular negatives": "pytorch-metric-learning does not normalise the negatives of AngularLoss; the fused "
    "criterion does. The two agree if the embeddings are normalised before",
    "arcface aligned": "pytorch-metric-learning gives ArcFaceLoss a gradient of inf or NaN if an embedding points "
    "along its class's weight or against it, up to rounding; the fused criterion gives a finite gradient, which "
    "leaves out the sine",
    "snr without variance": "pytorch-metric-learning gives inf or NaN for the signal-to-noise ratios of an embedding "
    "without variance; the fused criterion leaves that embedding out",
    "histogram pairs": "pytorch-metric-learning leaves negative pairs of two samples that have no positive out of "
    "HistogramLoss; the fused criterion takes all negative pairs (eq. 2 of the paper)",
    "histogram end": "pytorch-metric-learning raises an error for HistogramLoss of a batch with a cosine of 1, or, by "
    "rounding, below -1; the fused criterion counts it at the last or first node",
}
WAITING = 16  # calls whose results a GPU may still be computing
_said: set[tuple[str, str]] = set()


class Divergence(UserWarning):
    """Warning: a fused criterion differs from the loss it was made from, where that loss's number is wrong.

    The criteria that `flashpair.compat.pml.fuse` makes warn with it. `flashpair.compat.divergence.REASONS` lists the
    cases.
    """


def announce(owner: str, reason: str) -> None:
    """Warns of a corner case of a class of loss, at the user's line: the last one outside torch and this package."""
    if (owner, reason) in _said:
        return
    _said.add((owner, reason))
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in ("torch", "flashpair"):
        level, frame = level + 1, frame.f_back
    warnings.warn(f"{owner}: {REASONS[reason]}", Divergence, stacklevel=level)


class Watch:
    """The forward hook of a fused criterion.

    Args:
        owner: the class of the library's loss; `reasons`: what may occur with it; `numbers`: of the loss.
    """

    def __init__(self, owner: str, reasons: tuple[str, ...], numbers: Mapping[str, float]) -> None:
        self.owner, self.reasons, self.numbers = owner, reasons, dict(numbers)
        self.waiting: deque[tuple[Any, Tensor, Call, str, bool]] = deque()

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "waiting": deque()}

    def __call__(self, criterion: Any, args: tuple[Any, ...], kwargs: dict[str, Any], loss: Tensor) -> None:
        if torch.compiler.is_compiling():
            return
        reasons = [each for each in self.reasons if (self.owner, each) not in _said]
        if not reasons:
            self.waiting.clear()
        if not reasons or loss.device.type == "meta" or _captured(loss):
            return
        kind = loss.device.type
        if autocasts(kind):
            dtype = torch.get_autocast_dtype(kind)
            with no_autocast(kind):
                self._look(reasons, criterion, *args, **kwargs, loss=loss, dtype=dtype)
        else:
            self._look(reasons, criterion, *args, **kwargs, loss=loss, dtype=None)

    @torch.no_grad()
    def _look(self, reasons: list[str], *args: Any, **kwargs: Any) -> None:
        self._answered()
        call = _call(*args, **kwargs, numbers=self.numbers)
        if call is not None:
            for each in reasons:
                self._ask(call, each, CORNERS[each].suspect(call), certain=False)

    def _ask(self, call: Call, reason: str, answer: Answer, *, certain: bool) -> None:
        if isinstance(answer, Tensor) and answer.device.type == "cuda":
            there = torch.empty((), dtype=torch.bool, pin_memory=True).copy_(answer, non_blocking=True)
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(answer.device))
            self.waiting.append((event, there, call, reason, certain))
        elif answer:
            corner: Corner = CORNERS[reason]
            if certain or corner.certain is None:
                announce(self.owner, reason)
            else:
                self._ask(call, reason, corner.certain(call), certain=True)

    def _answered(self) -> None:
        """Reads the results that a GPU has ready; waits for the oldest if too many are pending."""
        while self.waiting and (self.waiting[0][0].query() or len(self.waiting) > WAITING * len(self.reasons)):
            event, there, call, reason, certain = self.waiting.popleft()
            event.synchronize()
            if (self.owner, reason) not in _said:
                self._ask(call, reason, bool(there), certain=certain)


def _captured(loss: Tensor) -> bool:
    return loss.device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _call(
    criterion: Any, embeddings: Tensor, labels: Tensor, *, loss: Tensor, dtype: torch.dtype | None,
    numbers: dict[str, float], ref_emb: Any = None, ref_labels: Any = None,
) -> Call | None:  # fmt: skip
    """dtype: in which autocast multiplies, None where it is off. None of references that the library has no like of."""
    same = (ref_emb is embeddings, ref_labels is labels)
    if isinstance(ref_emb, Labelled):
        ref_emb, ref_labels = ref_emb.embeddings, ref_emb.labels
    if ref_emb is not None and not isinstance(ref_emb, Tensor):
        return None
    y = None if ref_emb is None else ref_emb.detach()
    y_labels = None if ref_labels is None else ref_labels.to(torch.int64)
    x = embeddings.detach()
    if dtype is None or x.dtype == torch.float64:  # which autocast leaves alone
        dtype = x.dtype
    return Call(criterion, x, labels.to(torch.int64), y, y_labels, loss.detach(), dtype, numbers, same)
