"""Where the library's number is wrong, the fused criterion has flashpair's, and says so once a process."""

from __future__ import annotations

import warnings

import compat_cases
import pytest
import torch
from compat_cases import (
    BATCHES,
    IMPLS,
    C,
    D,
    assert_same_numbers,
    ours,
    theirs,
    value_and_gradients,
)  # fmt: skip
from helpers import relative
from pytorch_metric_learning import losses

import flashpair
from flashpair.compat import divergence
from flashpair.compat.pml import Divergence, fuse

quiet = compat_cases.quiet

AXES = torch.eye(6, D).repeat(2, 1)
HALVES = torch.cat([torch.ones(2, 4), torch.randn(6, 4, generator=torch.Generator().manual_seed(0))])
SHARP = BATCHES["clustered"]
TWICE = (SHARP[0][:30].repeat(2, 1), torch.arange(60) % 15)
ONE = (SHARP[0][:1], torch.zeros(1, dtype=torch.int64), SHARP[0][1:3], torch.arange(2))
ALIGNED = torch.eye(D)


def aligned():
    loss = losses.ArcFaceLoss(D, D)
    with torch.no_grad():
        loss.W.copy_(ALIGNED)
    return loss


def arcface():
    criterion = flashpair.ArcFaceLoss(D, D)
    with torch.no_grad():
        criterion.weight.copy_(ALIGNED)
    return criterion


# The library's loss, flashpair's own criterion, and a batch of which they differ.
DIVERGENT = {
    "one pair": (losses.MultiSimilarityLoss, lambda: flashpair.MultiSimilarityLoss(epsilon=None), ONE),
    "same references": (losses.NTXentLoss, flashpair.NTXentLoss, (*SHARP, *SHARP)),
    "euclidean duplicates": (losses.ContrastiveLoss, flashpair.ContrastiveLoss, TWICE),
    "lifted structure without a side": (
        losses.GeneralizedLiftedStructureLoss,
        lambda: flashpair.GeneralizedLiftedStructureLoss(1.0, "euclidean"),
        BATCHES["singletons"],
    ),
    "nt-xent clip": (lambda: losses.NTXentLoss(1e-3), lambda: flashpair.NTXentLoss(1e-3), SHARP),
    "supcon without negatives": (
        losses.SupConLoss, lambda: flashpair.SupConLoss(reduction="nonzero"), BATCHES["one class"],
    ),
    "nca underflow": (lambda: losses.NCALoss(1000), lambda: flashpair.NCALoss(1000.0), SHARP),
    "tuplet duplicates": (losses.TupletMarginLoss, flashpair.TupletMarginLoss, (AXES, torch.arange(12) % 6)),
    "angular negatives": (losses.AngularLoss, flashpair.AngularLoss, SHARP),
    "arcface aligned": (aligned, arcface, (ALIGNED, torch.arange(D))),
    "snr without variance": (
        losses.SignalToNoiseRatioContrastiveLoss, flashpair.SNRContrastiveLoss, (HALVES, torch.arange(8) // 2),
    ),
    "histogram pairs": (losses.HistogramLoss, flashpair.HistogramLoss, BATCHES["singletons"]),
    "histogram end": (losses.HistogramLoss, flashpair.HistogramLoss, (AXES, torch.arange(12) % 6)),
}  # fmt: skip


def test_every_divergence_is_shown():
    assert DIVERGENT.keys() == divergence.REASONS.keys()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("reason", DIVERGENT)
def test_divergence(reason, impl, monkeypatch):
    """Warned of once a process; flashpair's own number, which is finite and not the library's."""
    theirs_, own, (x, labels, *refs) = DIVERGENT[reason]
    monkeypatch.setattr(divergence, "_said", set())
    loss = theirs_()
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always")
        criterion = fuse(loss, impl=impl)
        fuse(theirs_(), impl=impl)
    said = [w for w in given if issubclass(w.category, Divergence)]
    assert [str(w.message) for w in said].count(divergence.REASONS[reason]) == 1
    assert len({str(w.message) for w in said}) == len(said)
    assert all(w.filename == __file__ for w in said)
    own = own()
    own.impl = impl
    found, truth = ours(criterion, x, labels, tuple(refs)), ours(own, x, labels, tuple(refs))
    assert_same_numbers(found, truth)
    if reason == "histogram end":
        with pytest.raises((IndexError, RuntimeError)):
            loss(x, labels)
        return
    refs = (x, labels) if reason == "same references" else tuple(refs)
    if reason == "same references":
        value, gradient, *_ = value_and_gradients(lambda x: loss(x, labels, ref_emb=x, ref_labels=labels), x, [])
    else:
        value, gradient, *_ = theirs(loss, None, x, labels, refs)
    if gradient.isfinite().all() and value.isfinite():
        assert max(relative(value, truth[0]), relative(gradient, truth[1])) > 1e-3


def test_a_negligible_warning_is_not_given(monkeypatch):
    """Only what belongs to the loss is said."""
    monkeypatch.setattr(divergence, "_said", set())
    with warnings.catch_warnings():
        warnings.simplefilter("error", Divergence)
        fuse(losses.CosFaceLoss(C, D))
        fuse(losses.FastAPLoss())
