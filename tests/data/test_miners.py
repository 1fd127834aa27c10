"""Miners: their indices against the oracle's, pytorch-metric-learning's, the losses' own mining, and loops."""

from __future__ import annotations

import golden
import pytest
import torch
from conftest import needs_extension
from helpers import batch
from miner_cases import TRIPLET_KINDS, listed, with_references

import flashpair
from flashpair import Bound, Reduction, miners
from flashpair.core.similarity import dense_pairs, l2_normalize

ORACLE = golden.load()
MINED = {name: found for name, found in ORACLE["mining"].items() if name in ORACLE["batches"]}


def oracle_batch(name):
    return golden.batch({"batch": name}, ORACLE)


@pytest.mark.parametrize("name", MINED)
def test_the_oracles_indices(name):
    x, labels = oracle_batch(name)
    truth = MINED[name]
    a1, p, a2, n = miners.MultiSimilarityMiner(0.1)(x, labels)
    assert listed(a1, p) == [[row["anchor"], k] for row in truth["ms_miner_eps0.1"] for k in row["pos"]]
    assert listed(a2, n) == [[row["anchor"], k] for row in truth["ms_miner_eps0.1"] for k in row["neg"]]
    assert listed(*miners.BatchHardMiner()(x, labels)) == truth["batch_hard"]
    names = ["semihard_tf", "triplets_semihard_margin0.2", "triplets_hard", "triplets_violating_margin0.2"]
    for kind, key in zip(TRIPLET_KINDS, names, strict=True):
        assert listed(*miners.TripletMarginMiner(0.2, triplets=kind)(x, labels)) == truth[key], kind


@pytest.mark.parametrize("name", MINED)
def test_the_oracles_probabilities(name):
    """Its rows without any weight are 0; ours are uniform over the negatives."""
    x, labels = oracle_batch(name)
    truth = torch.tensor(MINED[name]["distance_weighted_prob_cutoff0.5_nonzero1.4"], dtype=torch.float64)
    negatives = (labels[:, None] != labels).double()
    uniform = negatives / negatives.sum(1, keepdim=True).clamp_min(1)
    truth = torch.where(truth.sum(1, keepdim=True) > 0, truth, uniform)
    found = miners.DistanceWeightedMiner().probabilities(x, labels)
    assert torch.allclose(found, truth, rtol=1e-12, atol=0)


def test_the_oracles_probabilities_in_128_dimensions():
    case = ORACLE["mining"]["distance_weighted_dim128"]
    d = torch.tensor(case["distances"], dtype=torch.float64)
    refs = torch.zeros(len(d), 128, dtype=torch.float64)
    refs[:, 0], refs[:, 1] = 1 - d**2 / 2, (1 - (1 - d**2 / 2) ** 2).sqrt()
    anchor = torch.eye(1, 128, dtype=torch.float64)
    miner = miners.DistanceWeightedMiner(case["cutoff"], case["nonzero_loss_cutoff"])
    found = miner.probabilities(anchor, torch.zeros(1).long(), refs, torch.arange(1, len(d) + 1))[0]
    truth = torch.tensor(case["prob"], dtype=torch.float64)
    assert torch.allclose(found, truth, rtol=1e-11, atol=0)
    single = miner.probabilities(anchor.float(), torch.zeros(1).long(), refs.float(), torch.arange(1, len(d) + 1))[0]
    assert single.dtype == torch.float32
    assert torch.allclose(single.double(), truth, rtol=1e-4, atol=torch.finfo(torch.float32).tiny)


@pytest.mark.parametrize("references", [False, True])
@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
def test_the_indices_of_pytorch_metric_learning(distance, references):
    peer = pytest.importorskip("pytorch_metric_learning.miners")
    distances = pytest.importorskip("pytorch_metric_learning.distances")
    args = with_references(references)
    of = {"distance": distances.LpDistance() if distance == "euclidean" else distances.CosineSimilarity()}
    alike = [
        (miners.BatchHardMiner(distance), peer.BatchHardMiner(**of)),
        (miners.TripletMarginMiner(0.15, distance, "violating"), peer.TripletMarginMiner(0.15, "all", **of)),
        (miners.TripletMarginMiner(0.15, distance, "hard_all"), peer.TripletMarginMiner(0.15, "hard", **of)),
        (miners.TripletMarginMiner(0.15, distance, "semihard_all"), peer.TripletMarginMiner(0.15, "semihard", **of)),
    ]
    for ours, theirs in alike:
        found, truth = listed(*ours(*args)), listed(*theirs(*args))
        assert len(found) > 5 and found == sorted(found)
        assert found == sorted(truth), ours
    if distance == "cosine":
        for epsilon in (0.0, 0.1, 0.5):
            a1, p, a2, n = miners.MultiSimilarityMiner(epsilon)(*args)
            b1, q, b2, m = peer.MultiSimilarityMiner(epsilon)(*args)
            assert len(a1) > 5 and len(a2) > 5
            assert listed(a1, p) == sorted(listed(b1, q)) and listed(a2, n) == sorted(listed(b2, m))


@pytest.mark.parametrize("references", [False, True])
@pytest.mark.parametrize("cutoffs", [(0.5, 1.4), (0.9, 1.2)])
def test_the_probabilities_of_pytorch_metric_learning(monkeypatch, cutoffs, references):
    pytest.importorskip("pytorch_metric_learning")
    from pytorch_metric_learning.miners import DistanceWeightedMiner, distance_weighted_miner

    args = with_references(references)
    monkeypatch.setattr(
        distance_weighted_miner.lmu, "get_random_triplet_indices", lambda *_, weights, **__: (weights,) * 3
    )
    truth, _, _ = DistanceWeightedMiner(*cutoffs).mine(*args[:2], *(args[2:] or args[:2]))
    found = miners.DistanceWeightedMiner(*cutoffs).probabilities(*args)
    drawn = truth.isfinite().all(1)  # a row without weights is NaN there
    assert drawn.sum() > 10
    assert torch.allclose(found[drawn], truth[drawn], rtol=1e-10, atol=1e-300)


def test_losses_of_pytorch_metric_learning_take_the_tuples():
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    x, labels = batch(40, 6, 4, torch.float64)
    found = losses.TripletMarginLoss(0.2)(x, labels, miners.TripletMarginMiner(0.2)(x, labels))
    assert torch.isclose(found, flashpair.TripletMarginLoss(0.2)(x, labels), rtol=1e-12)
    mined = losses.MultiSimilarityLoss(2.0, 50.0, 0.5)(x, labels, miners.MultiSimilarityMiner(0.1)(x, labels))
    assert torch.isclose(mined, flashpair.MultiSimilarityLoss()(x, labels), rtol=1e-12)


@pytest.mark.parametrize("references", [False, True])
@pytest.mark.parametrize("epsilon", [0.0, 0.1, 3.0])
def test_pairs_are_those_that_the_loss_weights(epsilon, references):
    args = with_references(references)
    more = dict(zip(("ref_emb", "ref_labels"), args[2:], strict=False))
    weights = flashpair.pair_weights(flashpair.MultiSimilarityLoss(epsilon=epsilon), *args[:2], **more)
    a1, p, a2, n = miners.MultiSimilarityMiner(epsilon)(*args)
    assert len(a1) > 3 and len(a2) > 3
    assert listed(a1, p) == (weights < 0).nonzero().tolist()
    assert listed(a2, n) == (weights > 0).nonzero().tolist()


@needs_extension
@pytest.mark.parametrize("impl", ["tiled", "screened"])
def test_pairs_are_those_that_the_engine_counts(impl):
    x, labels = batch(1500, 24, 5, torch.float32)
    pairs = flashpair.make_pairs(x, labels, normalize=True, impl=impl)
    lowest = Reduction("min", "positives", detach=True)
    kept = Bound(lowest, -0.1)
    highest = Reduction("max", "negatives", lower=kept, detach=True)
    negatives = Reduction("count", "negatives", lower=kept)
    _, neg, _, pos = pairs.reduce(
        lowest, negatives, highest, Reduction("count", "positives", upper=Bound(highest, 0.1))
    )
    a1, _, a2, _ = miners.MultiSimilarityMiner(0.1)(x, labels)
    assert len(a2) > 1500
    assert torch.equal(a1.bincount(minlength=1500), pairs.restore(pos).long())
    assert torch.equal(a2.bincount(minlength=1500), pairs.restore(neg).long())


@pytest.mark.parametrize("references", [False, True])
@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
def test_triplets_make_the_losses(distance, references):
    args = with_references(references)
    more = dict(zip(("ref_emb", "ref_labels"), args[2:], strict=False))
    x, y = l2_normalize(args[0]), l2_normalize(args[2] if references else args[0])
    z = dense_pairs(x, y, "dot" if distance == "cosine" else "euclidean")
    d = -z if distance == "cosine" else z
    alike = [("hard", "batch_hard"), ("semihard", "semihard"), ("semihard_all", "semihard_all"), ("all", "violating")]
    for triplets, kind in alike:
        if kind == "batch_hard":
            a, p, n = miners.BatchHardMiner(distance)(*args)
        else:
            a, p, n = miners.TripletMarginMiner(0.2, distance, kind)(*args)
        terms = (d[a, p] - d[a, n] + 0.2).relu()
        assert (terms > 0).sum() > 5
        for reduction, found in (("sum", terms.sum()), ("nonzero", terms[terms > 0].mean())):
            criterion = flashpair.TripletMarginLoss(0.2, distance, triplets, reduction=reduction, impl="reference")
            assert torch.isclose(found, criterion(*args[:2], **more), rtol=1e-12), (triplets, reduction)


def by_hand(s, labels, margin):
    """Every set from whole-numbered similarities, in loops; ties by the lowest index. `margin` is epsilon, too."""
    count, found = len(labels), {kind: [] for kind in ["positives", "negatives", "batch_hard", *TRIPLET_KINDS]}
    for a in range(count):
        positives = [k for k in range(count) if labels[k] == labels[a] and k != a]
        negatives = [k for k in range(count) if labels[k] != labels[a]]
        if positives and negatives:
            far, near = min(positives, key=lambda k: s[a][k]), max(negatives, key=lambda k: s[a][k])
            found["batch_hard"].append([a, far, near])
            found["positives"] += [[a, p] for p in positives if s[a][p] < s[a][near] + margin]
            found["negatives"] += [[a, n] for n in negatives if s[a][n] > s[a][far] - margin]
        for p in positives if negatives else []:
            farther = [n for n in negatives if s[a][n] < s[a][p]]
            one = max(farther, key=lambda k: s[a][k]) if farther else min(negatives, key=lambda k: s[a][k])
            found["semihard"].append([a, p, one])
            for n in negatives:
                gap = s[a][p] - s[a][n]
                found["semihard_all"] += [[a, p, n]] * (0 < gap <= margin)
                found["hard_all"] += [[a, p, n]] * (gap <= 0)
                found["violating"] += [[a, p, n]] * (gap <= margin)
    return found


@pytest.mark.parametrize("seed", range(4))
def test_ties_and_duplicates_by_hand(seed):
    """Similarities that are exact in every order, most of them equal to others, and rows that stand twice."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(-1, 2, (14, 3), generator=generator).float()
    x = torch.cat([x, x[:6]])
    labels = torch.randint(0, 4, (20,), generator=generator)
    labels[3] = 9  # alone of its class
    truth = by_hand((x @ x.T).tolist(), labels.tolist(), 1.0)
    assert listed(*miners.BatchHardMiner("cosine", normalize=False)(x, labels)) == truth["batch_hard"]
    a1, p, a2, n = miners.MultiSimilarityMiner(1, normalize=False)(x, labels)
    assert [listed(a1, p), listed(a2, n)] == [truth["positives"], truth["negatives"]]
    for kind in TRIPLET_KINDS:
        found = miners.TripletMarginMiner(1, "cosine", kind, normalize=False)(x, labels)
        assert listed(*found) == truth[kind] and truth[kind], kind


def test_one_comparison_decides_of_both_kinds():
    """One positive and one negative, whose similarities are epsilon apart to a rounding: s_n > s_p - epsilon and
    s_p < s_n + epsilon may not agree, but either both are mined, as the loss does it, or none."""
    drawn = torch.rand(300, generator=torch.Generator().manual_seed(0)) * 1.6 - 0.8
    seen = set()
    for positive in drawn:
        negative = positive - 0.1
        seen.add((bool(negative > positive - 0.1), bool(positive < negative + 0.1)))
        refs, ref_labels = torch.stack([positive, negative])[:, None], torch.tensor([0, 1])
        args = torch.ones(1, 1), torch.zeros(1, dtype=torch.int64), refs, ref_labels
        a1, _, a2, _ = miners.MultiSimilarityMiner(0.1, normalize=False)(*args)
        assert len(a1) == len(a2)
        loss = flashpair.MultiSimilarityLoss(normalize=False, impl="reference")(
            *args[:2], ref_emb=refs, ref_labels=ref_labels
        )
        assert (loss > 0) == (len(a1) > 0)
        further = torch.nextafter(negative, torch.tensor(1.0))
        seen.add((bool(further > positive - 0.1), bool(positive < further + 0.1)))
        refs = torch.stack([positive, further])[:, None]
        a1, _, a2, _ = miners.MultiSimilarityMiner(0.1, normalize=False)(*args[:2], refs, ref_labels)
        assert len(a1) == len(a2)
    assert {(True, False), (False, True)} <= seen, "both ways to disagree are there"
