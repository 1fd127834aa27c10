"""What the fused criterion would not compute the same is refused, with every reason."""

from __future__ import annotations

import compat_cases
import pytest
import torch
from compat_cases import DOT, MEAN, NONZERO, SUM, C, D
from pytorch_metric_learning import distances, losses, miners, reducers, regularizers

from flashpair.compat.pml import fuse

quiet = compat_cases.quiet


class Mine(losses.MultiSimilarityLoss):
    def _compute_loss(self, mat, pos_mask, neg_mask):
        return super()._compute_loss(mat, pos_mask, neg_mask)


class Renamed(losses.MultiSimilarityLoss):
    """With other defaults alone."""

    def __init__(self, **options):
        super().__init__(3, 40, 0.6, **options)


def patched():
    loss = losses.MultiSimilarityLoss()
    loss.compute_loss = lambda *a: None
    return loss


def hooked():
    loss = losses.MultiSimilarityLoss()
    loss.register_forward_hook(lambda *a: None)
    return loss


def patched_distance():
    loss = losses.MultiSimilarityLoss()
    loss.distance.compute_mat = lambda *a: None
    loss.reducer.register_forward_hook(lambda *a: None)
    return loss


def learned():
    loss = losses.MultiSimilarityLoss()
    loss.base = torch.nn.Parameter(torch.tensor(0.5))
    return loss


def narrowed():
    loss = losses.CircleLoss()
    loss.reducer.low = 0.1
    return loss


def plus(miner, **options):
    return lambda: (losses.TripletMarginLoss(0.2, **options), miner)


LP = distances.LpDistance
RAW = LP(power=2, normalize_embeddings=False)
REFUSED = {
    "another class": (TypeError, lambda: losses.VICRegLoss(), ["VICRegLoss cannot be fused: it must be one of NPairs"]),
    "a class above": (TypeError, lambda: losses.LargeMarginSoftmaxLoss(3, 4), ["LargeMarginSoftmaxLoss cannot"]),
    "no loss": (TypeError, lambda: torch.nn.MSELoss(), ["MSELoss cannot be fused"]),
    "memory": (TypeError, lambda: losses.CrossBatchMemory(losses.NTXentLoss(), 4), ["give the memory as ref_emb"]),
    "override": (ValueError, Mine, ["Mine .loss. is MultiSimilarityLoss with its own _compute_loss"]),
    "sub-centres": (ValueError, lambda: losses.SubCenterArcFaceLoss(num_classes=3, embedding_size=4), ["its own"]),
    "patch": (ValueError, patched, ["with its own compute_loss"]),
    "patched parts": (
        ValueError, patched_distance,
        ["CosineSimilarity .distance of the loss. .* with its own compute_mat", "MeanReducer .reducer. has hooks"],
    ),
    "hook": (ValueError, hooked, ["has hooks"]),
    "learned option": (ValueError, learned, ["parameters that are not known: base", "base must be a number"]),
    "swap": (ValueError, lambda: losses.TripletMarginLoss(swap=True), ["swap must be False, got True"]),
    "drawn triplets": (
        ValueError, lambda: losses.TripletMarginLoss(triplets_per_anchor=9), ["triplets_per_anchor must be 'all', got"],
    ),
    "drawn triplets of margin": (ValueError, lambda: losses.MarginLoss(triplets_per_anchor=9), ["must be 'all'"]),
    "distance": (
        ValueError, lambda: losses.MultiSimilarityLoss(distance=LP()),
        ["must have a distance that is dot, normalised or raw, got normalised euclidean"],
    ),
    "norm": (ValueError, lambda: losses.ContrastiveLoss(distance=LP(p=1)), [r"LpDistance\(p=1\) .*p must be 2"]),
    "norm of products": (
        ValueError, lambda: losses.NPairsLoss(distance=distances.DotProductSimilarity(p=1)), ["p must be 2"],
    ),
    "power": (ValueError, lambda: losses.ContrastiveLoss(distance=LP(power=3)), ["power must be 1 or 2"]),
    "square": (ValueError, lambda: losses.ContrastiveLoss(distance=LP(power=2)), ["got normalised squared_euclidean"]),
    "power of products": (
        ValueError, lambda: losses.MultiSimilarityLoss(distance=distances.DotProductSimilarity(power=2)), ["must be 1"],
    ),
    "own distance": (
        ValueError, lambda: losses.NTXentLoss(distance=distances.BatchedDistance(LP())), ["BatchedDistance of the"],
    ),
    "raw proxies": (ValueError, lambda: losses.ProxyNCALoss(C, D, distance=RAW), ["normalised, got raw"]),
    "threshold": (
        ValueError, lambda: losses.NTXentLoss(reducer=reducers.ThresholdReducer(low=0.1)), ["reducer ThresholdReducer"],
    ),
    "changed threshold": (ValueError, narrowed, ["the limits of AvgNonZeroReducer"]),
    "mean of the margin loss": (
        ValueError, lambda: losses.MarginLoss(reducer=MEAN()), ["reduction of MarginLoss must be divisor or sum"],
    ),
    "nonzero pairs": (ValueError, lambda: losses.NTXentLoss(reducer=NONZERO()), ["must be mean or sum, got nonzero"]),
    "elements that are no rows": (
        ValueError, lambda: losses.NTXentLoss(reducer=reducers.DoNothingReducer()), ["got none .DoNothingReducer"],
    ),
    "two reducers": (
        ValueError,
        lambda: losses.ContrastiveLoss(reducer=reducers.MultipleReducers({"pos_loss": SUM(), "neg_loss": MEAN()})),
        ["all parts must have the same reducer, got SumReducer, MeanReducer"],
    ),
    "penalty of a sum": (
        ValueError, lambda: losses.MarginLoss(nu=1, learn_beta=True, reducer=SUM()), ["nu of one learned beta"],
    ),
    "negative nu": (ValueError, lambda: losses.MarginLoss(nu=-1, learn_beta=True), ["nu must be at least 0, got -1"]),
    "bins": (ValueError, lambda: losses.HistogramLoss(delta=0.3), ["delta must be 2 / n_bins"]),
    "embedding regularizer": (
        ValueError, lambda: losses.NPairsLoss(embedding_regularizer=regularizers.LpRegularizer()),
        ["embedding_regularizer LpRegularizer is not part"],
    ),
    "weight regularizer": (
        ValueError, lambda: losses.CosFaceLoss(C, D, weight_regularizer=regularizers.RegularFaceRegularizer()),
        ["weight_regularizer RegularFaceRegularizer"],
    ),
    "statistics": (ValueError, lambda: losses.CircleLoss(collect_stats=True), ["collect_stats of CircleLoss .loss."]),
    "another miner": (
        ValueError, lambda: (losses.ContrastiveLoss(), miners.PairMarginMiner()),
        ["miner PairMarginMiner with ContrastiveLoss: no criterion has this mining"],
    ),
    "miner of another loss": (
        ValueError, lambda: (losses.MultiSimilarityLoss(), miners.BatchHardMiner()), ["with MultiSimilarityLoss"],
    ),
    "miner of another distance": (
        ValueError, lambda: (losses.MultiSimilarityLoss(), miners.MultiSimilarityMiner(distance=DOT())),
        ["the miner must have the distance of the loss, normalised dot, got raw dot"],
    ),
    "hard triplets": (
        ValueError, plus(miners.TripletMarginMiner(type_of_triplets="hard")), ["must be all or semihard, got hard"],
    ),
    "a narrower miner": (ValueError, plus(miners.TripletMarginMiner(0.1)), ["must be at least the loss's, 0.2, got"]),
    "mean of mined triplets": (
        ValueError, plus(miners.TripletMarginMiner(), reducer=MEAN()), ["with TripletMarginMiner must be nonzero or"],
    ),
    "smooth mined triplets": (ValueError, plus(miners.TripletMarginMiner(), smooth_loss=True), ["smooth_loss with"]),
    "a range": (ValueError, plus(miners.BatchHardMiner(allowed_pos_range=(0, 1))), ["allowed_pos_range of"]),
    "every reason": (
        ValueError,
        lambda: (
            losses.TripletMarginLoss(swap=True, triplets_per_anchor=3, distance=LP(p=1), collect_stats=True),
            miners.PairMarginMiner(),
        ),
        ["collect_stats", "p must be 2", "swap", "triplets_per_anchor", "PairMarginMiner"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(name):
    error, make, words = REFUSED[name]
    found = make()
    with pytest.raises(error, match=words[0]) as raised:
        fuse(*(found if isinstance(found, tuple) else (found,)))
    for each in words[1:]:
        assert raised.match(each)


def test_impl():
    assert fuse(losses.NTXentLoss(), impl="reference").impl == "reference"
    with pytest.raises(ValueError, match="impl must be one of"):
        fuse(losses.NTXentLoss(), impl="fast")


def test_a_subclass_with_other_defaults():
    criterion = fuse(Renamed(), impl="reference")
    assert (criterion.alpha, criterion.beta, criterion.base) == (3.0, 40.0, 0.6)
