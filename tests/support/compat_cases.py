"""Losses and miners of pytorch-metric-learning, batches for them, and both libraries' numbers of these."""

from __future__ import annotations

import warnings

import pytest
import torch
from helpers import batch

pytest.importorskip("pytorch_metric_learning")
from pytorch_metric_learning import distances, losses, miners, reducers

IMPLS = ["reference", "auto"]
C, D = 30, 7
COSINE, DOT, L2, SQUARED = (
    lambda: distances.CosineSimilarity(),
    lambda: distances.DotProductSimilarity(normalize_embeddings=False),
    lambda: distances.LpDistance(normalize_embeddings=False),
    lambda: distances.LpDistance(power=2),
)
MEAN, SUM, NONZERO = reducers.MeanReducer, reducers.SumReducer, reducers.AvgNonZeroReducer


def lone(labels):
    """Every third sample is of a class of its own."""
    k = torch.arange(labels.shape[0])
    return torch.where(k % 3 == 0, 20 + k // 3, labels)


def duplicated(x, labels):
    """Equal positives, and equal negatives; at most 25 rows, of which torch.cdist has exact zeros."""
    x = x.clone()
    first = (labels == 0).nonzero()[:, 0]
    x[first[1]] = x[first[0]]
    x[(labels == 2).nonzero()[0, 0]] = x[(labels == 1).nonzero()[0, 0]]
    return x, labels


SMALL = batch(21, D, 3, torch.float64, 1)
BATCHES = {
    "clustered": batch(60, D, 4, torch.float64),
    "singletons": (SMALL[0], lone(SMALL[1])),
    "one class": (SMALL[0], torch.full((21,), 5)),
    "all different": (SMALL[0], torch.arange(21)),
    "duplicates": duplicated(*SMALL),
}
REFS = batch(40, D, 5, torch.float64, 2)


def beta(loss):
    """With a boundary of its own for each class."""
    with torch.no_grad():
        loss.beta.copy_(torch.linspace(0.8, 1.3, len(loss.beta)))
    return loss


CASES = {
    "multi-similarity": lambda: losses.MultiSimilarityLoss(),
    "multi-similarity of other options": lambda: losses.MultiSimilarityLoss(3, 20, 0.7, distance=DOT(), reducer=SUM()),
    "multi-similarity, nonzero": lambda: losses.MultiSimilarityLoss(reducer=NONZERO()),
    "multi-similarity and miner": lambda: (losses.MultiSimilarityLoss(), miners.MultiSimilarityMiner(0.2)),
    "multi-similarity and miner, nonzero": lambda: (
        losses.MultiSimilarityLoss(reducer=NONZERO()), miners.MultiSimilarityMiner(),
    ),
    "n-pairs": lambda: losses.NPairsLoss(),
    "n-pairs of raw embeddings": lambda: losses.NPairsLoss(distance=DOT(), reducer=SUM()),
    "lifted structure": lambda: losses.LiftedStructureLoss(1.2, 0.3),
    "lifted structure of raw embeddings": lambda: losses.LiftedStructureLoss(distance=L2(), reducer=SUM()),
    "generalized lifted": lambda: losses.GeneralizedLiftedStructureLoss(1.2, 0.3),
    "generalized lifted of cosines": lambda: losses.GeneralizedLiftedStructureLoss(-0.4, 0.5, distance=COSINE()),
    "contrastive": lambda: losses.ContrastiveLoss(),
    "contrastive of margins": lambda: losses.ContrastiveLoss(0.3, 0.9, distance=L2(), reducer=MEAN()),
    "contrastive of cosines": lambda: losses.ContrastiveLoss(0.9, 0.1, distance=COSINE(), reducer=SUM()),
    "contrastive, a reducer a part": lambda: losses.ContrastiveLoss(
        reducer=reducers.MultipleReducers({"pos_loss": NONZERO()}, default_reducer=NONZERO())
    ),
    "signal to noise": lambda: losses.SignalToNoiseRatioContrastiveLoss(pos_margin=0.1, neg_margin=0.8),
    "contrastive of signal to noise": lambda: losses.ContrastiveLoss(distance=distances.SNRDistance(), reducer=MEAN()),
    "triplet": lambda: losses.TripletMarginLoss(),
    "triplet, mean": lambda: losses.TripletMarginLoss(0.2, reducer=MEAN(), distance=L2()),
    "triplet of squares": lambda: losses.TripletMarginLoss(0.2, distance=SQUARED(), reducer=SUM()),
    "triplet of cosines, smooth": lambda: losses.TripletMarginLoss(0.1, smooth_loss=True, distance=COSINE()),
    "triplet, hard": lambda: (losses.TripletMarginLoss(0.3), miners.BatchHardMiner()),
    "triplet, hard, mean": lambda: (losses.TripletMarginLoss(0.3, reducer=MEAN()), miners.BatchHardMiner()),
    "triplet, hard, smooth": lambda: (
        losses.TripletMarginLoss(0.0, smooth_loss=True, distance=COSINE()), miners.BatchHardMiner(distance=COSINE()),
    ),
    "triplet, violating": lambda: (losses.TripletMarginLoss(0.2), miners.TripletMarginMiner(0.3)),
    "triplet, semihard": lambda: (
        losses.TripletMarginLoss(0.2), miners.TripletMarginMiner(0.2, type_of_triplets="semihard"),
    ),
    "triplet of cosines, semihard, sum": lambda: (
        losses.TripletMarginLoss(0.2, distance=COSINE(), reducer=SUM()),
        miners.TripletMarginMiner(0.5, type_of_triplets="semihard", distance=COSINE()),
    ),
    "circle": lambda: losses.CircleLoss(),
    "circle, mean": lambda: losses.CircleLoss(0.25, 8, reducer=MEAN()),
    "nt-xent": lambda: losses.NTXentLoss(),
    "nt-xent, sum": lambda: losses.NTXentLoss(0.5, distance=DOT(), reducer=SUM()),
    "supcon": lambda: losses.SupConLoss(),
    "supcon, mean": lambda: losses.SupConLoss(0.5, reducer=MEAN()),
    "nca": lambda: losses.NCALoss(),
    "nca of cosines": lambda: losses.NCALoss(4, distance=COSINE(), reducer=SUM()),
    "tuplet margin": lambda: losses.TupletMarginLoss(4, 32),
    "intra-pair variance": lambda: losses.IntraPairVarianceLoss(0.02, 0.03),
    "margin": lambda: losses.MarginLoss(0.2, 0.1, 1.1),
    "margin, learned": lambda: losses.MarginLoss(0.2, 0.1, 1.1, learn_beta=True),
    "margin of classes": lambda: beta(losses.MarginLoss(0.3, 0.1, num_classes=C)),
    "margin of classes, learned": lambda: beta(losses.MarginLoss(0.3, 0.1, learn_beta=True, num_classes=C)),
    "margin of classes, sum": lambda: beta(
        losses.MarginLoss(0.3, 0.1, learn_beta=True, num_classes=C, reducer=SUM(), distance=L2())
    ),
    "margin of classes, none active": lambda: losses.MarginLoss(-9, 0.1, learn_beta=True, num_classes=C),
    "margin, none active": lambda: losses.MarginLoss(-9, 0.1, learn_beta=True),
    "fastap": lambda: losses.FastAPLoss(12),
    "angular": lambda: losses.AngularLoss(36),
    "histogram": lambda: losses.HistogramLoss(n_bins=20),
    "histogram of delta": lambda: losses.HistogramLoss(delta=0.08),
    "normalized softmax": lambda: losses.NormalizedSoftmaxLoss(C, D, 0.1),
    "normalized softmax of raw embeddings": lambda: losses.NormalizedSoftmaxLoss(C, D, 1.5, distance=DOT()),
    "cosface": lambda: losses.CosFaceLoss(C, D),
    "arcface": lambda: losses.ArcFaceLoss(C, D, 30, 16),
    "sphereface": lambda: losses.SphereFaceLoss(C, D, 3, scale=2, reducer=SUM()),
    "proxy nca": lambda: losses.ProxyNCALoss(C, D, softmax_scale=3),
    "proxy nca of cosines": lambda: losses.ProxyNCALoss(C, D, softmax_scale=3, distance=COSINE(), reducer=SUM()),
    "proxy anchor": lambda: losses.ProxyAnchorLoss(C, D, 0.2, 16),
    "soft triple": lambda: losses.SoftTripleLoss(C, D, 3, 15, 0.2, 0.05),
}  # fmt: skip
# Where the library's number is wrong, or there is none: tested below.
WRONG = {
    "generalized lifted": ("singletons", "one class", "all different"),
    "generalized lifted of cosines": ("singletons", "one class", "all different"),
    "supcon": ("one class",),
    "supcon, mean": ("one class",),
    "nca": ("all different",),
    "histogram": ("singletons", "duplicates"),
    "histogram of delta": ("singletons", "duplicates"),
}
# A cosine of 1, or of more or less by rounding: the library is right with less.
ROUNDED = {("tuplet margin", "duplicates")}
NO_REFERENCES = ("n-pairs", "lifted", "fastap", "angular", "histogram", "normalized", "cosface", "arcface")
NO_REFERENCES += ("sphereface", "proxy", "soft triple")


@pytest.fixture(autouse=True)  # of the modules that have it as their own
def quiet():
    """No warnings, and numbers of the library that are float64 throughout: HistogramLoss has some of the default."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    torch.set_default_dtype(before)


def made(name):
    torch.manual_seed(0)
    found = CASES[name]()
    loss, miner = found if isinstance(found, tuple) else (found, None)
    return loss.double(), miner


def value_and_gradients(call, x, parameters, refs=()):
    """`refs`: (), or references and their labels; gradients of them, too."""
    leaves = [t.clone().requires_grad_() for t in (x, *refs[:1])]
    value = call(leaves[0], *leaves[1:], *refs[1:])
    wanted = leaves + parameters
    found = torch.autograd.grad(value, wanted, allow_unused=True)
    return [value.detach(), *(torch.zeros_like(t) if g is None else g for g, t in zip(found, wanted, strict=True))]


def theirs(loss, miner, x, labels, refs=()):
    def call(x, *refs):
        return loss(x, labels, None if miner is None else miner(x, labels, *refs), *refs)

    return value_and_gradients(call, x, list(loss.parameters()), refs)


def ours(criterion, x, labels, refs=()):
    names = dict(zip(("ref_emb", "ref_labels"), range(2), strict=True)) if refs else {}
    return value_and_gradients(
        lambda x, *refs: criterion(x, labels, **{name: refs[k] for name, k in names.items()}),
        x, list(criterion.parameters()), refs,
    )  # fmt: skip


def assert_same_numbers(found, truth):
    """Values and gradients, a weight's in the library's layout; the bound is of what torch.cdist rounds in float64."""
    assert len(found) == len(truth)
    for f, t in zip(found, truth, strict=True):
        if f.dim() == 3:
            f = f.flatten(0, 1)
        if f.shape != t.shape:
            f = f.t() if f.dim() == 2 else f.reshape(t.shape)
        assert f.shape == t.shape and t.isfinite().all()
        assert (f - t).abs().max() <= 1e-9 * t.abs().max() + 1e-14
