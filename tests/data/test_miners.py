"""Miners: their indices against the oracle's, pytorch-metric-learning's and the losses' own mining."""

from __future__ import annotations

import math

import golden
import peaks
import pytest
import torch
from conftest import needs_extension
from helpers import batch

import flashpair
from flashpair import Bound, Reduction, miners
from flashpair.core.similarity import dense_pairs, l2_normalize
from flashpair.miners import base

ORACLE = golden.load()
MINED = {name: found for name, found in ORACLE["mining"].items() if name in ORACLE["batches"]}
TRIPLET_KINDS = ["semihard", "semihard_all", "hard_all", "violating"]
EVERY = {
    "multi_similarity": miners.MultiSimilarityMiner,
    "batch_hard": miners.BatchHardMiner,
    **{kind: lambda kind=kind: miners.TripletMarginMiner(0.2, triplets=kind) for kind in TRIPLET_KINDS},
    "distance_weighted": lambda: miners.DistanceWeightedMiner(generator=torch.Generator().manual_seed(5)),
}


def listed(*indices):
    return torch.stack(indices).T.tolist()


def oracle_batch(name):
    return golden.batch({"batch": name}, ORACLE)


def with_references(references, n=60, dtype=torch.float64):
    """A batch, or its first third against all of it with one class that nobody else has."""
    x, labels = batch(n, 6, 5, dtype)
    return (x[: n // 3], labels[: n // 3], x + 0.1, labels % 7) if references else (x, labels)


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


@pytest.mark.parametrize("name", EVERY)
def test_block_by_block(monkeypatch, name):
    """One row, three rows and all rows at a time; a positive pair at a time, too."""
    x, labels = batch(53, 6, 5, torch.float64)
    whole = EVERY[name]()(x, labels)
    assert len(whole[0]) > 5 and len(list(EVERY[name]().blocks(x, labels))) == 1
    for rows in (1, 3, 52, 53):
        monkeypatch.setattr(base, "BLOCK_BYTES", rows * 53 * 8 + 7)
        blocks = list(EVERY[name]().blocks(x, labels))
        assert len(blocks) >= math.ceil(53 / rows)
        assert all(map(torch.equal, map(torch.cat, zip(*blocks, strict=True)), whole))
        assert all(map(torch.equal, EVERY[name]()(x, labels), whole))
        if name in TRIPLET_KINDS:
            assert all(len(set(map(tuple, listed(b.a, b.p)))) <= rows for b in blocks), "positive pairs of a chunk"


@pytest.mark.parametrize("references", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", EVERY)
def test_sixteen_bits_are_computed_in_float32(name, dtype, references):
    args = [t.to(dtype) if t.is_floating_point() else t for t in with_references(references)]
    wide = [t.float() if t.is_floating_point() else t for t in args]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = EVERY[name]()(*args)
    assert len(found[0]) > 3
    assert all(map(torch.equal, found, EVERY[name]()(*wide)))


@pytest.mark.parametrize("name", EVERY)
def test_a_batch_that_has_nothing_to_mine(name):
    x, labels = batch(12, 4, 3, torch.float32)
    none = torch.arange(12)
    cases = {
        "one class": (x, torch.zeros_like(labels)),
        "no positives": (x, none),
        "empty": (x[:0], labels[:0]),
        "one row": (x[:1], labels[:1]),
        "no references": (x, labels, x[:0], labels[:0]),
        "references of one class": (x, none * 0, x, none * 0),
        "references of other classes": (x, labels, x, labels + 100),
    }
    for case, args in cases.items():
        found = EVERY[name]()(*args)
        assert [(t.dtype, tuple(t.shape)) for t in found] == [(torch.int64, (0,))] * len(found), case


@pytest.mark.parametrize("name", EVERY)
def test_forms_of_the_same_call(name):
    """References, small integer labels, strided rows, and embeddings that want a gradient and get none."""
    x, labels, y, ref_labels = with_references(True)
    truth = EVERY[name]()(x, labels, y, ref_labels)
    kept = flashpair.References(y, ref_labels)
    strided = torch.stack([x, x], 2)[:, :, 0].requires_grad_()
    before = y.clone(), strided.detach().clone()
    for args in ((x, labels, kept), (strided, labels.to(torch.uint8), y, ref_labels.to(torch.int16))):
        found = EVERY[name]()(*args)
        assert all(map(torch.equal, found, truth)) and not any(t.requires_grad for t in found)
    assert torch.equal(y, before[0]) and torch.equal(strided, before[1])


def draws(several_positives, count=40000):
    """Draws for one anchor of `count` positive pairs, its negatives at 0.2 to 1.5 from it, and P(n | a)."""
    angles = torch.tensor([0.2, 0.5, 0.7, 0.9, 1.1, 1.3, 1.55, 2.0])
    negatives = torch.stack([angles.cos(), angles.sin(), *torch.zeros(4, 8)], 1)
    anchor, labels = torch.eye(1, 6), torch.arange(1, 9)
    positives = count if several_positives else 1
    refs = torch.cat([negatives, anchor.expand(positives, 6)])
    ref_labels = torch.cat([labels, torch.zeros(positives, dtype=torch.int64)])
    anchors = anchor.expand(count // positives, 6)
    miner = miners.DistanceWeightedMiner(generator=torch.Generator().manual_seed(1))
    args = (anchors, torch.zeros(count // positives, dtype=torch.int64), refs, ref_labels)
    assert miner.probabilities(*args)[:, 8:].eq(0).all()
    return miner(*args), miner.probabilities(*args)[0, :8].double()


@pytest.mark.parametrize("several_positives", [False, True])
def test_draws_are_as_frequent_as_they_are_probable(several_positives):
    (a, p, n), probabilities = draws(several_positives)
    assert len(n) == 40000 and (p >= 8).all() and n.max() < 8
    assert torch.unique(torch.stack([a, p]), dim=1).shape[1] == 40000
    counts, expected = n.bincount(minlength=8), 40000 * probabilities
    assert counts[-1] == 0 and expected[-1] == 0, "too far to be drawn"
    counts, expected = counts[:-1], expected[:-1]
    assert expected.min() > 50 and expected.max() > 4 * expected.min()
    assert ((counts - expected) ** 2 / expected).sum() < 22.5, "chi squared of 6 degrees of freedom: 1 in 1000"
    pairs = torch.bincount(n[:-1] * 8 + n[1:], minlength=64).reshape(8, 8)[:7, :7]
    alone = 39999 * probabilities[:7, None] * probabilities[:7]
    assert ((pairs - alone) ** 2 / alone).sum() < 85.4, "draws do not depend on each other: 48 degrees of freedom"


@pytest.mark.parametrize(("number", "drawn"), [(0.0, 2), (1 - 2**-53, 4)])
def test_the_least_and_the_greatest_random_number(monkeypatch, number, drawn):
    """The first and the last negative that have a weight: no self, no positive, none that is too far."""
    x = torch.tensor([[1.0, 0, 0], [1, 0, 0], [0.8, 0.6, 0], [0.6, 0.8, 0], [0.8, -0.6, 0], [-1, 0, 0], [0.9, 0, 0.1]])
    labels = torch.tensor([0, 0, 1, 2, 3, 4, 0])
    monkeypatch.setattr(torch, "rand", lambda shape, **options: torch.full(shape, number, dtype=options["dtype"]))
    found = miners.DistanceWeightedMiner()(x, labels)
    assert len(found.n) == 6 and (found.n == drawn).all()


def test_negatives_that_are_all_too_far_are_equally_likely():
    x = torch.tensor([[1.0, 0, 0], [1, 0, 0], [-1, 0, 0], [-1, 0, 0], [0, 0, 0]])
    labels = torch.tensor([0, 0, 1, 2, 3])
    found = miners.DistanceWeightedMiner(nonzero_loss_cutoff=0.99).probabilities(x, labels)
    third = 1 / 3
    assert torch.allclose(found[:2], torch.tensor([0, 0, third, third, third]).expand(2, 5))
    open_ended = miners.DistanceWeightedMiner(nonzero_loss_cutoff=2.5).probabilities(x, labels)
    assert torch.allclose(open_ended[0], torch.tensor([0, 0, 0.25, 0.25, 0.5])), "1 / d in three dimensions, to d = 2"


def test_probabilities_of_some_rows(monkeypatch):
    x, labels = batch(40, 5, 4, torch.float32)
    miner = miners.DistanceWeightedMiner()
    whole = miner.probabilities(x, labels)
    monkeypatch.setattr(base, "BLOCK_BYTES", 3 * 40 * 4)
    for first, rows in ((0, 40), (7, 11), (38, 9), (39, None), (40, 3), (50, None), (0, 0)):
        found, truth = miner.probabilities(x, labels, first=first, rows=rows), whole[first:][:rows]
        assert found.shape == truth.shape and torch.allclose(found, truth, rtol=1e-4), (first, rows)


def test_same_generator_same_draws():
    x, labels = batch(40, 5, 4, torch.float32)
    found, again = (EVERY["distance_weighted"]()(x, labels) for _ in range(2))
    assert torch.equal(found.n, again.n)
    miner = EVERY["distance_weighted"]()
    assert not torch.equal(miner(x, labels).n, miner(x, labels).n)
    assert (labels[found.a] == labels[found.p]).all() and (labels[found.a] != labels[found.n]).all()
    assert len(found.a) == 40 * 3


def test_what_cannot_be():
    x, labels = batch(10, 4, 2, torch.float32)
    for make in EVERY.values():
        for bad, name in ((torch.nan, "embeddings"), (torch.inf, "embeddings"), (torch.nan, "ref_emb")):
            broken = x.clone()
            broken[3, 1] = bad
            args = (broken, labels) if name == "embeddings" else (x, labels, broken, labels)
            with pytest.raises(ValueError, match=f"{name} must be finite, got NaN"):
                make().blocks(*args)
        with pytest.raises(TypeError, match="labels must be an integer tensor of shape"):
            make().blocks(x, labels.float())
        with pytest.raises(ValueError, match="ref_labels must be given with ref_emb"):
            make()(x, labels, x)
    with pytest.raises(ValueError, match="epsilon must be a finite number of at least 0, got -1"):
        miners.MultiSimilarityMiner(-1)
    with pytest.raises(ValueError, match="distance must be one of euclidean, cosine, got 'dot'"):
        miners.BatchHardMiner("dot")
    with pytest.raises(ValueError, match="triplets must be one of semihard, semihard_all, hard_all, violating"):
        miners.TripletMarginMiner(triplets="hard")
    with pytest.raises(TypeError, match="margin must be a number, got float32"):
        miners.TripletMarginMiner(torch.tensor(0.1))
    with pytest.raises(ValueError, match="cutoff must be a finite number above 0, got 0"):
        miners.DistanceWeightedMiner(0)
    with pytest.raises(ValueError, match=r"nonzero_loss_cutoff must be a finite number above 0.5, got 0.5"):
        miners.DistanceWeightedMiner(0.5, 0.5)
    with pytest.raises(TypeError, match=r"generator must be a torch.Generator or None, got int"):
        miners.DistanceWeightedMiner(generator=3)
    with pytest.raises(TypeError, match="normalize must be a bool"):
        miners.BatchHardMiner(normalize=1)


def test_says_what_it_is():
    text = "TripletMarginMiner(margin=0.1, distance='cosine', triplets='semihard', normalize=False)"
    assert repr(eval("flashpair.miners." + text)) == text


SCRIPT = """
from flashpair.miners import base
miner, n, d, per_class = eval("flashpair.miners." + sys.argv[1]), *map(int, sys.argv[2:5])
base.BLOCK_BYTES = int(sys.argv[5])
torch.set_num_threads(1)
labels = torch.arange(n) // per_class
generator = torch.Generator().manual_seed(0)
x = torch.randn(n, d, generator=generator)[labels] + 0.5 * torch.randn(n, d, generator=generator)
miner(x[:100], labels[:100])
def mine():
    global mined
    found = miner.blocks(x, labels) if sys.argv[6:] else [miner(x, labels)]
    mined = sum(len(indices) for block in found for indices in block)
print(peak_of(mine).extra, mined)
"""


@peaks.only_linux
@pytest.mark.parametrize(
    ("miner", "n", "per_class", "iterated"),
    [
        ("MultiSimilarityMiner()", 6000, 4, False),
        ("BatchHardMiner()", 6000, 4, False),
        ("TripletMarginMiner(triplets='semihard')", 6000, 4, False),
        ("TripletMarginMiner(triplets='hard_all')", 6000, 4, False),
        ("DistanceWeightedMiner()", 6000, 4, False),
        ("TripletMarginMiner(2.0)", 400, 200, True),
    ],
)
def test_peak_by_formula(miner, n, per_class, iterated):
    """Five copies of the embeddings, what is returned twice over, and sixteen blocks."""
    d, block = 32, 2**20
    peak, mined = peaks.printed(SCRIPT, miner, n, d, per_class, block, *["blocks"] * iterated)
    bound = 5 * 4 * n * d + 16 * block + (0 if iterated else 2 * 8 * mined)
    dense = 8 * mined if iterated else 4 * n * n
    assert bound < dense / 2, "the sizes must tell the formula from what is not to exist"
    assert peak <= bound, f"{peak:,} bytes over {bound:,}"


def own_miner(mine, **attributes):
    return type("Own", (miners.Miner,), {"mined": miners.MinedPairs, "mine": mine, **attributes})


NONE = torch.empty(0, dtype=torch.int64)


@pytest.mark.parametrize(
    "mine, error, words",
    [
        (lambda s, block: None, TypeError, "mine of Own must yield MinedPairs by and by, as a generator, got NoneType"),
        (lambda s, block: miners.MinedPairs(NONE, NONE, NONE, NONE), TypeError, "as a generator, got MinedPairs of 4"),
        (lambda s, block: [(NONE, NONE, NONE)], TypeError, "mine of Own must yield MinedPairs, got tuple of 3"),
        (lambda s, block: [3], TypeError, "mine of Own must yield MinedPairs, got int 3"),
        (
            lambda s, block: [miners.MinedPairs(NONE, NONE, NONE.float(), NONE)],
            TypeError,
            "a2 of the MinedPairs of Own must be an int64 tensor of one dimension, got float32",
        ),
        (
            lambda s, block: [miners.MinedPairs(NONE, torch.arange(2), NONE, NONE)],
            ValueError,
            "MinedPairs of Own must have one length for each kind of pair, got .*'p': 2",
        ),
    ],
)
def test_what_ones_own_miner_yields_is_looked_at(mine, error, words):
    x, labels = torch.randn(6, 3), torch.arange(6) // 2
    with pytest.raises(error, match=words):
        own_miner(mine)(normalize=True)(x, labels)


def test_ones_own_miner_says_what_it_mines_and_makes_its_parent():
    with pytest.raises(TypeError, match=r"Own\.mined must be MinedPairs or Triplets"):
        own_miner(lambda s, block: [], mined=None)
    with pytest.raises(TypeError, match=r"__init__ of Own must call super\(\)\.__init__\(normalize=\.\.\.\)"):
        own_miner(lambda s, block: [], __init__=lambda self: None)()
