"""Every loss of the library: how it is made, and its baseline.

The baseline is pytorch-metric-learning's loss with the arguments, the reducer and the miner that give the same number.
If no loss gives the same number, `differs` says why, and the baseline is timed as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

import flashpair as fp

Baseline = Callable[..., Any]


class FamilyCase(NamedTuple):
    """One loss.

    Args:
        make: the class; `options`: its arguments.
        baseline: None, or a function of pytorch-metric-learning's package (and of C, D for class losses) that returns
            its loss, or loss and miner.
        differs: why the baseline's number is not this loss's.
        centres: rows of weights for each class; 0 for losses of pairs.
        one_pair: whether the loss takes one pair a class, so that there are as many rows and columns as classes.
        bytes_a_pair: the dense reference's memory for a pair, in float64.
    """

    make: Callable[..., torch.nn.Module]
    options: dict[str, Any] = {}  # noqa: RUF012
    baseline: Baseline | None = None
    differs: str = ""
    centres: int = 0
    one_pair: bool = False
    bytes_a_pair: int = 320

    @property
    def shown(self) -> str:
        """The constructor call, without the sizes of class losses."""
        given = ", ".join(f"{k}={v!r}" for k, v in self.options.items())
        return f"{self.make.__name__}({given})"

    def build(self, impl: str, classes: int, width: int, seed: int = 0) -> torch.nn.Module:
        """The criterion; its class weights depend on the seed alone."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            sized = (classes, width) if self.centres else ()
            return self.make(*sized, **self.options, impl=impl)


def _raw(p: Any) -> dict[str, Any]:
    return {"distance": p.distances.DotProductSimilarity(normalize_embeddings=False)}


def _raw_l2(p: Any) -> dict[str, Any]:
    return {"distance": p.distances.LpDistance(normalize_embeddings=False)}


def _cosine(p: Any) -> dict[str, Any]:
    return {"distance": p.distances.CosineSimilarity()}


def _angular(p: Any) -> Any:
    """The library does not normalise negatives here, so they must come normalised."""
    loss = p.losses.AngularLoss(alpha=40)
    return lambda x, *rest: loss(torch.nn.functional.normalize(x), *rest)


BINS = 100
ONE_PAIR = {"one_pair": True}
OTHER_PAIRS = "its pairs count once for each triplet they are in"
FAMILY: dict[str, FamilyCase] = {
    "ms": FamilyCase(
        fp.MultiSimilarityLoss, {"epsilon": 0.1},
        lambda p: (p.losses.MultiSimilarityLoss(2, 50, 0.5, **_cosine(p)), p.miners.MultiSimilarityMiner(0.1)),
    ),
    "ms_weighting": FamilyCase(
        fp.MultiSimilarityLoss, {"epsilon": None}, lambda p: p.losses.MultiSimilarityLoss(2, 50, 0.5, **_cosine(p))
    ),
    "n_pairs": FamilyCase(fp.NPairsLoss, {}, lambda p: p.losses.NPairsLoss(**_raw(p)), **ONE_PAIR),
    "n_pairs_ovo": FamilyCase(fp.NPairsLoss, {"variant": "ovo"}, **ONE_PAIR),
    "n_pairs_all": FamilyCase(
        fp.NPairsLoss, {"variant": "all_pairs"}, lambda p: p.losses.NTXentLoss(temperature=1, **_raw(p))
    ),
    "n_pairs_soft": FamilyCase(fp.NPairsLoss, {"variant": "softlabel"}),
    "lifted": FamilyCase(fp.LiftedStructureLoss, {}, lambda p: p.losses.LiftedStructureLoss(1, 0, **_raw_l2(p))),
    "generalized_lifted": FamilyCase(  # the baseline's margins are subtracted on either side: 1 - s and s - 0
        fp.GeneralizedLiftedStructureLoss, {}, lambda p: p.losses.GeneralizedLiftedStructureLoss(0, 1, **_cosine(p))
    ),
    "lifted_star": FamilyCase(fp.LiftedStructureStarLoss),
    "lifted_star_mined": FamilyCase(fp.LiftedStructureStarLoss, {"epsilon": 0.1}),
    "contrastive": FamilyCase(fp.ContrastiveLoss, {}, lambda p: p.losses.ContrastiveLoss(0, 1)),
    "contrastive_squared": FamilyCase(fp.ContrastiveLoss, {"power": 2}),
    "contrastive_cosine": FamilyCase(
        fp.ContrastiveLoss, {"pos_margin": 1.0, "neg_margin": 0.5, "distance": "cosine"},
        lambda p: p.losses.ContrastiveLoss(1, 0.5, **_cosine(p)),
    ),
    "triplet": FamilyCase(fp.TripletMarginLoss, {}, lambda p: p.losses.TripletMarginLoss(0.2)),
    "triplet_hard": FamilyCase(
        fp.TripletMarginLoss, {"triplets": "hard"},
        lambda p: (p.losses.TripletMarginLoss(0.2), p.miners.BatchHardMiner()),
    ),
    "triplet_semihard": FamilyCase(fp.TripletMarginLoss, {"triplets": "semihard"}),
    "triplet_semihard_all": FamilyCase(
        fp.TripletMarginLoss, {"triplets": "semihard_all"},
        lambda p: (p.losses.TripletMarginLoss(0.2), p.miners.TripletMarginMiner(0.2, "semihard")),
    ),
    "binomial": FamilyCase(fp.BinomialDevianceLoss),
    "binomial_mined": FamilyCase(fp.BinomialDevianceLoss, {"epsilon": 0.1}),
    "binlifted": FamilyCase(fp.BinLiftedLoss),
    "mined_pair": FamilyCase(fp.MinedPairLoss),
    "nca": FamilyCase(fp.NCALoss, {}, lambda p: p.losses.NCALoss()),
    "ntxent": FamilyCase(fp.NTXentLoss, {}, lambda p: p.losses.NTXentLoss(0.07)),
    "supcon": FamilyCase(fp.SupConLoss, {}, lambda p: p.losses.SupConLoss(0.1)),
    "circle": FamilyCase(fp.CircleLoss, {}, lambda p: p.losses.CircleLoss(0.4, 80)),
    "tuplet_margin": FamilyCase(fp.TupletMarginLoss, {}, lambda p: p.losses.TupletMarginLoss(5.73, 64)),
    "intra_pair_variance": FamilyCase(fp.IntraPairVarianceLoss, {}, lambda p: p.losses.IntraPairVarianceLoss()),
    "margin": FamilyCase(fp.MarginLoss, {}, lambda p: p.losses.MarginLoss(0.2, 0, 1.2), OTHER_PAIRS),
    "margin_triplets": FamilyCase(
        fp.MarginLoss, {"mode": "triplets"}, lambda p: p.losses.MarginLoss(0.2, 0, 1.2)
    ),
    "angular": FamilyCase(fp.AngularLoss, {}, _angular),
    "histogram": FamilyCase(
        fp.HistogramLoss, {"n_bins": BINS}, lambda p: p.losses.HistogramLoss(n_bins=BINS), bytes_a_pair=64 * BINS
    ),
    "fastap": FamilyCase(fp.FastAPLoss, {}, lambda p: p.losses.FastAPLoss(10), bytes_a_pair=960),
    "snr": FamilyCase(
        fp.SNRContrastiveLoss, {}, lambda p: p.losses.ContrastiveLoss(0, 1, distance=p.distances.SNRDistance())
    ),
    "normalized_softmax": FamilyCase(
        fp.NormalizedSoftmaxLoss, {}, lambda p, c, d: p.losses.NormalizedSoftmaxLoss(c, d, 0.05), centres=1
    ),
    "cosface": FamilyCase(
        fp.CosFaceLoss, {}, lambda p, c, d: p.losses.CosFaceLoss(c, d, margin=0.35, scale=64), centres=1
    ),
    "arcface": FamilyCase(fp.ArcFaceLoss, {}, lambda p, c, d: p.losses.ArcFaceLoss(c, d, 28.6, 64), centres=1),
    "sphereface": FamilyCase(fp.SphereFaceLoss, {}, lambda p, c, d: p.losses.SphereFaceLoss(c, d, 4, 1), centres=1),
    "proxynca": FamilyCase(
        fp.ProxyNCALoss, {}, lambda p, c, d: p.losses.ProxyNCALoss(c, d), "its sum has the own proxy, too", centres=1
    ),
    "proxynca_plus": FamilyCase(
        fp.ProxyNCALoss, {"include_positive": True}, lambda p, c, d: p.losses.ProxyNCALoss(c, d), centres=1
    ),
    "proxy_anchor": FamilyCase(
        fp.ProxyAnchorLoss, {}, lambda p, c, d: p.losses.ProxyAnchorLoss(c, d, 0.1, 32), centres=1
    ),
    "soft_triple": FamilyCase(
        fp.SoftTripleLoss, {"centers_per_class": 10},
        lambda p, c, d: p.losses.SoftTripleLoss(c, d, 10, 20, 0.1, 0.01), centres=10,
    ),
}  # fmt: skip
