"""What the weight of a negative pair depends on (Wang et al., CVPR 2019, Table 1), found by experiment.

The weight w = |dL/dS_ij| of one negative pair is a function of its own similarity s, of the positives' p and of the
other negatives' n. The paper names three dependences. Here they mean:

    S  the similarity itself: w changes when all similarities move by the same amount, so that s - p and s - n stay
    P  its similarity relative to positives: w changes when positives move, while s and n stay
    N  its similarity relative to other negatives: w changes when these move, while s and p stay

Moves are finite, not derivatives, because many weights are step functions: a triplet's negative counts the positives
that it comes near, a contrastive pair has weight 0 or 1, mining keeps a pair or not. One change in any trial is a tick.
No tick means that no trial changed the weight by more than float64 rounding. Similarities stay in [-1, 1], as cosines
do.

Whole matrices are moved, not one anchor's row, because the histogram loss compares with the positives of the whole
batch. Its bins are fixed, so all moves of S are multiples of SHIFT, which must be a multiple of a bin's width; a shift
by a part of a bin changes its weights (test_weight_dependence.py). The criterion's reduction must be "sum" or "mean",
not "nonzero": an average over terms above 0 depends on all pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

import flashpair as fp
from flashpair.backends.reference import ReferencePairs
from flashpair.losses.averages import reduce_losses
from flashpair.losses.base import Criterion

CLASSES, PER_CLASS = 3, 3
PAIR = (0, PER_CLASS + 1)  # an N-pair loss has the first two of each class, as anchor and as positive
TRIALS, MOVES = 18, 6
SHIFT = 0.2
INNER = 0.6  # similarities of a start, so that shifts by up to 2 SHIFT stay within [-1, 1]
RELATIVE, ABSOLUTE = 1e-7, 1e-12  # of the weight, and of the largest weight: more than rounding


class Dependence(NamedTuple):
    """Whether the weight depends on its own similarity, on the positives', on the other negatives'."""

    s: bool
    p: bool
    n: bool

    @property
    def word(self) -> str:
        return "".join(letter for letter, found in zip("SPN", self, strict=True) if found)


def labels() -> Tensor:
    return torch.arange(CLASSES).repeat_interleave(PER_CLASS)


def similarity_to(distance: str, s: Tensor) -> Tensor:
    """The criterion's z of a similarity in [-1, 1]. Distances fall linearly with it, so differences are kept."""
    return {"dot": s, "euclidean": 1 - s, "squared_euclidean": 2 - 2 * s}[distance]


def weights(
    criterion: Criterion, s: Tensor, labels: Tensor, to: Callable[[str, Tensor], Tensor] = similarity_to
) -> Tensor:
    """|dL/dz| (N, N) of given similarities (N, N), without embeddings; squared norms are taken to be 1."""
    z = to(criterion.distance, s.detach().clone()).requires_grad_()
    pairs = ReferencePairs(z, labels, labels, square=True)
    pairs.embeddings = torch.ones(labels.shape[0], 1, dtype=z.dtype)
    loss = reduce_losses(criterion.row_losses(pairs), criterion.reduction, pairs).sum()
    return torch.autograd.grad(loss, z)[0].abs()


def random_similarities(
    generator: torch.Generator, low: float = -1.0, high: float = 1.0, count: int = CLASSES * PER_CLASS
) -> Tensor:
    """Symmetric similarities (N, N) within a random part of [low, high], so that they may be close, or all low."""
    ends = torch.rand(2, generator=generator, dtype=torch.float64).sort().values * (high - low) + low
    s = torch.rand(count, count, generator=generator, dtype=torch.float64) * (ends[1] - ends[0]) + ends[0]
    return torch.triu(s, 1) + torch.triu(s, 1).T + torch.eye(count, dtype=torch.float64)


def moved(generator: torch.Generator, s: Tensor, which: str, pair: tuple[int, int]) -> Iterator[Tensor]:
    """The similarities after some moves; the moves keep what the definition of `which` keeps."""
    i, j = pair
    same = labels()[:, None] == labels()
    mine = torch.zeros_like(same)
    mine[i, j] = mine[j, i] = True
    for k in range(MOVES):
        if which == "S":
            yield s + SHIFT * (-2, -1, 1, 2)[k % 4]
        else:
            other = random_similarities(generator)
            yield torch.where(same if which == "P" else ~same & ~mine, other, s)


def depends(criterion: Criterion, which: str, seed: int = 0) -> bool:
    """Whether the weight of a negative pair depends on `which`, one of S, P and N, as the module defines it."""
    generator = torch.Generator().manual_seed(seed)
    who, pair = labels(), PAIR
    for trial in range(TRIALS):
        s = random_similarities(generator, -INNER, INNER) if which == "S" else random_similarities(generator)
        if trial % 2:  # a trained batch: positives above most negatives
            s = torch.where(who[:, None] == who, (s.abs() + INNER) / 2, s)
        if trial % 3 == 0:  # the pair is its anchor's hardest negative
            s[pair] = s[pair[::-1]] = s[pair[0], PER_CLASS:].max() + 0.01
        before = weights(criterion, s, who)
        for after in moved(generator, s, which, pair):
            found = weights(criterion, after, who)
            a, b = before[pair], found[pair]
            if (a - b).abs() > RELATIVE * torch.maximum(a, b) + ABSOLUTE * torch.maximum(before.max(), found.max()):
                return True
    return False


def dependence(criterion: Criterion) -> Dependence:
    """All three dependences of a criterion of pairs."""
    return Dependence(*(depends(criterion, which) for which in "SPN"))


SUM = {"reduction": "sum"}
STUDIED: dict[str, Criterion] = {
    "Contrastive": fp.ContrastiveLoss(None, 0.5, "cosine", **SUM),
    "Binomial": fp.BinomialDevianceLoss(**SUM),
    "Triplet": fp.TripletMarginLoss(0.2, "cosine", **SUM),
    "Histogram": fp.HistogramLoss(10),
    "N-pairs": fp.NPairsLoss(**SUM),
    "Lifted Structure": fp.GeneralizedLiftedStructureLoss(**SUM),
    "BinLifted": fp.BinLiftedLoss(**SUM),
    "NCA": fp.NCALoss(distance="cosine", **SUM),
    "MS": fp.MultiSimilarityLoss(**SUM),
    "LiftedStruct*": fp.LiftedStructureStarLoss(**SUM),
    "MS mining": fp.MinedPairLoss(**SUM),
    "MS weighting": fp.MultiSimilarityLoss(epsilon=None, **SUM),
    "Binomial_m": fp.BinomialDevianceLoss(epsilon=0.1, **SUM),
    "LiftedStruct*_m": fp.LiftedStructureStarLoss(epsilon=0.1, **SUM),
}
"""The losses of Tables 1 and 2 in the forms that the paper gives them."""

PUBLISHED = {
    "Contrastive": "S", "Binomial": "S", "Triplet": "P", "Histogram": "P", "N-pairs": "N", "Lifted Structure": "N",
    "BinLifted": "SN", "NCA": "PN", "MS": "SPN", "LiftedStruct*": "N", "MS mining": "P", "MS weighting": "SN",
    "Binomial_m": "SP", "LiftedStruct*_m": "PN",
}  # fmt: skip
"""What Table 1, and Table 2 for the last five, print."""

OTHERS: dict[str, Criterion] = {
    "Triplet, hardest": fp.TripletMarginLoss(0.2, "cosine", "hard", **SUM),
    "Triplet, semi-hard": fp.TripletMarginLoss(0.2, "cosine", "semihard", **SUM),
    "NT-Xent": fp.NTXentLoss(**SUM),
    "SupCon": fp.SupConLoss(**SUM),
    "Circle": fp.CircleLoss(**SUM),
    "Tuplet margin": fp.TupletMarginLoss(**SUM),
    "Intra-pair variance": fp.IntraPairVarianceLoss(),
    "Margin": fp.MarginLoss(**SUM),
    "Angular": fp.AngularLoss(**SUM),
    "FastAP": fp.FastAPLoss(**SUM),
    "SNR": fp.SNRContrastiveLoss(**SUM),
    "Lifted, original": fp.LiftedStructureLoss(**SUM),
    "N-pairs, one-vs-one": fp.NPairsLoss("ovo", **SUM),
}
"""Losses of this library that the paper's tables do not have."""
