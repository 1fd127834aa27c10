"""All criteria, in every form that uses the engine in another way. `check` and the tests go through them.

A new loss adds its rows here.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import losses as c
from .base import Criterion

CLASSES = 200


class OfClasses(Criterion):
    """A loss against class weights that takes embeddings of any width. Equal widths have equal weights.

    Args:
        kind: the criterion's class.
        options: its arguments beside the number of classes and the width.
        common: normalize, reduction and impl.
    """

    takes_references = False

    def __init__(self, kind: type[c.ClassCriterion], options: dict[str, Any], **common: Any) -> None:
        super().__init__(**{"normalize": True, "reduction": "mean", "impl": "auto", **common})
        self.averagings = kind.averagings
        self.kind, self.options, self.common = kind, options, common
        self.made = torch.nn.ModuleDict()

    def of_width(self, d: int) -> c.ClassCriterion:
        if str(d) not in self.made:
            with torch.random.fork_rng(devices=()):
                torch.manual_seed(d)
                self.made[str(d)] = self.kind(CLASSES, d, **self.options, **self.common)
        made: c.ClassCriterion = self.made[str(d)]  # type: ignore[assignment]
        return made

    def forward(
        self, embeddings: Tensor, labels: Tensor, *tuples: Any, ref_emb: Tensor | None = None,
        ref_labels: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        criterion = self.of_width(embeddings.shape[1]).to(embeddings.device)
        loss: Tensor = criterion(embeddings, labels, *tuples, ref_emb=ref_emb, ref_labels=ref_labels)
        return loss


def of_classes(kind: type[c.ClassCriterion], **options: Any) -> Callable[..., Criterion]:
    return functools.partial(OfClasses, kind, options)


CRITERIA: dict[str, Callable[..., Criterion]] = {
    "MultiSimilarityLoss": c.MultiSimilarityLoss,
    "MultiSimilarityLoss(epsilon=None)": functools.partial(c.MultiSimilarityLoss, epsilon=None),
    "LiftedStructureLoss": c.LiftedStructureLoss,
    "GeneralizedLiftedStructureLoss": c.GeneralizedLiftedStructureLoss,
    "GeneralizedLiftedStructureLoss(distance='euclidean')": functools.partial(
        c.GeneralizedLiftedStructureLoss, distance="euclidean"
    ),
    "LiftedStructureStarLoss": c.LiftedStructureStarLoss,
    "LiftedStructureStarLoss(epsilon=0.1)": functools.partial(c.LiftedStructureStarLoss, epsilon=0.1),
    "NPairsLoss": c.NPairsLoss,
    "NPairsLoss('ovo')": functools.partial(c.NPairsLoss, "ovo"),
    "NPairsLoss('all_pairs')": functools.partial(c.NPairsLoss, "all_pairs"),
    "NPairsLoss('softlabel')": functools.partial(c.NPairsLoss, "softlabel"),
    "ContrastiveLoss": c.ContrastiveLoss,
    "ContrastiveLoss(0.9, 0.2, 'cosine')": functools.partial(c.ContrastiveLoss, 0.9, 0.2, "cosine"),
    "ContrastiveLoss(power=2)": functools.partial(c.ContrastiveLoss, power=2),
    "SNRContrastiveLoss": functools.partial(c.SNRContrastiveLoss, 0.1, 1.2, 0.1),
    "TripletMarginLoss": c.TripletMarginLoss,
    "TripletMarginLoss(distance='cosine', smooth=True)": functools.partial(
        c.TripletMarginLoss, distance="cosine", smooth=True
    ),
    "TripletMarginLoss(power=2)": functools.partial(c.TripletMarginLoss, power=2),
    "TripletMarginLoss(triplets='hard')": functools.partial(c.TripletMarginLoss, triplets="hard"),
    "TripletMarginLoss(triplets='semihard')": functools.partial(c.TripletMarginLoss, triplets="semihard"),
    "TripletMarginLoss(triplets='semihard_all')": functools.partial(
        c.TripletMarginLoss, distance="cosine", triplets="semihard_all"
    ),
    "BinomialDevianceLoss": c.BinomialDevianceLoss,
    "BinomialDevianceLoss(epsilon=0.1)": functools.partial(c.BinomialDevianceLoss, epsilon=0.1),
    "BinLiftedLoss": functools.partial(c.BinLiftedLoss, normalized=True),
    "MinedPairLoss": functools.partial(c.MinedPairLoss, weights="row_mean"),
    "NCALoss": c.NCALoss,
    "NCALoss(distance='cosine')": functools.partial(c.NCALoss, 16.0, "cosine"),
    "NTXentLoss": c.NTXentLoss,
    "SupConLoss": functools.partial(c.SupConLoss, 0.1, 0.07),
    "CircleLoss": functools.partial(c.CircleLoss, gamma=20.0),
    "CircleLoss(over='batch')": functools.partial(c.CircleLoss, gamma=20.0, over="batch"),
    "TupletMarginLoss": functools.partial(c.TupletMarginLoss, scale=16.0),
    "IntraPairVarianceLoss": c.IntraPairVarianceLoss,
    "MarginLoss": functools.partial(c.MarginLoss, nu=0.01, learn_beta=True),
    "MarginLoss(mode='triplets')": functools.partial(c.MarginLoss, mode="triplets"),
    "AngularLoss": c.AngularLoss,
    "AngularLoss(form='hinge')": functools.partial(c.AngularLoss, 30.0, "hinge"),
    "HistogramLoss": functools.partial(c.HistogramLoss, 20),
    "FastAPLoss": c.FastAPLoss,
    "NormalizedSoftmaxLoss": of_classes(c.NormalizedSoftmaxLoss, temperature=0.2),
    "CosFaceLoss": of_classes(c.CosFaceLoss, scale=8.0),
    "ArcFaceLoss": of_classes(c.ArcFaceLoss, scale=8.0),
    "SphereFaceLoss": of_classes(c.SphereFaceLoss),
    "ProxyNCALoss": of_classes(c.ProxyNCALoss),
    "ProxyAnchorLoss": of_classes(c.ProxyAnchorLoss),
    "SoftTripleLoss": of_classes(c.SoftTripleLoss, centers_per_class=3, tau=0.2),
}
