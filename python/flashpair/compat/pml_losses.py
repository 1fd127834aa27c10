"""Each loss of pytorch-metric-learning 2.9 that has a criterion of the same numbers."""

from __future__ import annotations

import math

from .. import losses
from .pml_switch import (
    PAIR_LOSS,
    POSITIVES,
    REFERENCES,
    VALID,
    Switch,
    centres,
    classes,
    contrastive,
    histogram,
    histogram_refusals,
    lifted,
    margin,
    margin_refusals,
    soft_triple,
    transposed,
    triplet,
)

MARGINS = ("neg_margin", "pos_margin")
PAIRS = {"nonzero": "nonzero", "mean": "mean_pairs", "sum": "sum"}  # one element a pair, of two kinds
ANY = dict.fromkeys(("mean", "nonzero", "sum", "divisor"), "mean")  # of one number

SWITCHES = {
    "NPairsLoss": Switch(
        lambda a: losses.NPairsLoss("mc", **a.common),
        reductions={"mean": "mean", "nonzero": "nonzero", "sum": "sum"},
    ),
    "LiftedStructureLoss": Switch(
        lambda a, neg, pos: losses.LiftedStructureLoss(neg - pos, **a.common),
        MARGINS, ("euclidean",), reductions=POSITIVES, divergences=("one pair",),
    ),
    "GeneralizedLiftedStructureLoss": Switch(
        lifted, MARGINS, ("euclidean", "dot"), divergences=(*PAIR_LOSS, "lifted structure without a side"),
        watched=MARGINS,
    ),
    "MultiSimilarityLoss": Switch(
        lambda a, alpha, beta, base: losses.MultiSimilarityLoss(alpha, beta, base, a.epsilon, **a.common),
        ("alpha", "beta", "base"), divergences=PAIR_LOSS,
    ),
    "ContrastiveLoss": Switch(
        contrastive, MARGINS[::-1], ("euclidean", "dot", "snr"), reductions=PAIRS, divergences=PAIR_LOSS,
    ),
    "SignalToNoiseRatioContrastiveLoss": Switch(
        contrastive, MARGINS[::-1], ("snr",), reductions=PAIRS, divergences=PAIR_LOSS,
    ),
    "TripletMarginLoss": Switch(
        triplet, ("margin", "smooth_loss"), ("euclidean", "squared_euclidean", "dot"),
        reductions={"mean": "mean", "nonzero": "nonzero", "sum": "sum"}, divergences=REFERENCES,
        fixed={"swap": False, "triplets_per_anchor": "all"},
    ),
    "CircleLoss": Switch(
        lambda a, m, gamma: losses.CircleLoss(m, gamma, **a.common), ("m", "gamma"), divergences=PAIR_LOSS,
    ),
    "NTXentLoss": Switch(
        lambda a, temperature: losses.NTXentLoss(temperature, **a.common),
        ("temperature",), reductions=POSITIVES, divergences=(*PAIR_LOSS, "nt-xent clip"),
    ),
    "SupConLoss": Switch(
        lambda a, temperature: losses.SupConLoss(temperature, **a.common),
        ("temperature",), divergences=(*PAIR_LOSS, "supcon without negatives"),
    ),
    "NCALoss": Switch(
        lambda a, scale: losses.NCALoss(scale, a.word, **a.common),
        ("softmax_scale",), ("squared_euclidean", "dot"), reductions=VALID,
        divergences=(*REFERENCES, "nca underflow"),
    ),
    "TupletMarginLoss": Switch(
        lambda a, angle, scale: losses.TupletMarginLoss(math.degrees(angle), scale, **a.common),
        ("margin", "scale"), raw=False, reductions=POSITIVES, divergences=(*PAIR_LOSS, "tuplet duplicates"),
    ),
    "IntraPairVarianceLoss": Switch(
        lambda a, pos, neg: losses.IntraPairVarianceLoss(pos, neg, **a.common),
        ("pos_eps", "neg_eps"), reductions={"mean": "mean"}, divergences=PAIR_LOSS,
    ),
    "MarginLoss": Switch(
        margin, ("margin", "nu"), ("euclidean",), reductions={"divisor": "nonzero", "sum": "sum"},
        divergences=REFERENCES, fixed={"triplets_per_anchor": "all"}, refusals=margin_refusals,
    ),
    "FastAPLoss": Switch(
        lambda a, bins: losses.FastAPLoss(bins, **a.common),
        ("num_bins",), ("squared_euclidean",), raw=False, reductions=VALID,
    ),
    "AngularLoss": Switch(
        lambda a: losses.AngularLoss(math.degrees(float(a.loss.alpha)), **a.common),
        (), ("euclidean",), raw=False, reductions=POSITIVES, divergences=("angular negatives",),
    ),
    "HistogramLoss": Switch(
        histogram, ("delta",), raw=False, reductions=ANY, divergences=("histogram pairs", "histogram end"),
        watched=("delta",), refusals=histogram_refusals,
    ),
    "NormalizedSoftmaxLoss": Switch(
        classes("NormalizedSoftmaxLoss", "temperature"), ("temperature",), weight="W", layout=transposed,
    ),
    "CosFaceLoss": Switch(
        classes("CosFaceLoss", "margin", "scale"), ("margin", "scale"), raw=False, weight="W", layout=transposed,
    ),
    "ArcFaceLoss": Switch(
        classes("ArcFaceLoss", "margin", "scale"), ("margin", "scale"), raw=False, weight="W", layout=transposed,
        divergences=("arcface aligned",),
    ),
    "SphereFaceLoss": Switch(
        classes("SphereFaceLoss", "margin", "scale"), ("margin", "scale"), raw=False, weight="W", layout=transposed,
    ),
    "ProxyNCALoss": Switch(
        classes("ProxyNCALoss", "softmax_scale"), ("softmax_scale",), ("squared_euclidean", "dot"), raw=False,
        weight="proxies", divergences=("nca underflow",),
    ),
    "ProxyAnchorLoss": Switch(
        classes("ProxyAnchorLoss", "margin", "alpha"), ("margin", "alpha"), raw=False,
        reductions={"divisor": "mean"}, weight="proxies",
    ),
    "SoftTripleLoss": Switch(
        soft_triple, ("la", "gamma", "margin"), raw=False, weight="fc", layout=centres,
    ),
}  # fmt: skip
