"""The metrics against the oracle, against their definitions written out, and against pytorch-metric-learning."""

from __future__ import annotations

import itertools
import math
import random
from fractions import Fraction

import pytest
import torch
from conftest import needs_extension
from golden import load
from pytorch_metric_learning.distances import CosineSimilarity
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from pytorch_metric_learning.utils.inference import CustomKNN
from sklearn.metrics import fowlkes_mallows_score

from flashpair import References, metrics
from flashpair.engine import nearest
from flashpair.metrics.retrieval import rank_scores

METRICS = load()["metrics"]


def double(values):
    return torch.tensor(values, dtype=torch.float64)


def whole_numbers(n, m, classes, d, seed):
    """Exact similarities in every order of summation, many of them equal; some labels stand alone."""
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(-2, 3, (size, d), generator=generator).float() for size in (n, m)]
    labels = [torch.randint(classes, (size,), generator=generator) for size in (n, m)]
    return rows[0], labels[0], rows[1], labels[1]


def ranking(query, refs, distance, itself):
    """Places of the references, best first, by exact numbers."""
    score = -((refs - query) ** 2).sum(1) if distance == "euclidean" else refs @ query
    order = sorted(range(len(refs)), key=lambda j: (-score[j].item(), j))
    return [j for j in order if j != itself]


def defined(x, labels, y, ref_labels, distance):
    """Of each query: rank of the first of its class (0: none), R-Precision, MAP@R, R, and the labels in order."""
    for i, query in enumerate(x):
        order = ranking(query, x if y is None else y, distance, i if y is None else None)
        of = (labels if y is None else ref_labels)[order].tolist()
        hits = [int(label == labels[i]) for label in of]
        r = sum(hits)
        precision = [Fraction(sum(hits[: k + 1]), k + 1) * hits[k] for k in range(r)]
        first = hits.index(1) + 1 if r else 0
        yield first, Fraction(sum(hits[:r]), max(r, 1)), sum(precision) / Fraction(max(r, 1)), r, of


def test_oracle_retrieval():
    golden = METRICS["retrieval"]
    x, labels = double(golden["x"]), torch.tensor(golden["labels"])
    ks = (1, 2, 4, 8)
    for lone, name in (("skip", "skip_lone"), ("miss", "all_queries")):
        found = metrics.retrieval(x, labels, recall_at=ks, lone=lone)
        assert found.recall == {k: pytest.approx(golden["recall"][f"R@{k}_{name}"], abs=1e-12) for k in ks}
        assert (found.queries, found.lone) == ((9, 1) if lone == "skip" else (10, 1))
    found = metrics.retrieval(x, labels)
    assert found.precision_at_1 == pytest.approx(golden["precision_at_1"], abs=1e-12)
    assert found.r_precision == pytest.approx(golden["r_precision"], abs=1e-12)
    assert found.map_at_r == pytest.approx(golden["map_at_r"], abs=1e-12)
    macro = metrics.retrieval(x, labels, average="macro")
    assert macro.r_precision == pytest.approx(golden["macro"]["r_precision"], abs=1e-12)
    scores = metrics.query_scores(x, labels)
    for name in ("r_precision", "map_at_r"):
        expected = [golden["per_query"][name].get(str(i), 0.0) for i in range(len(x))]
        assert getattr(scores, name).tolist() == pytest.approx(expected, abs=1e-12)


def test_oracle_seed_table():
    """Ten relevant references each, found at these ranks alone: the table that shows what MAP@R rewards."""
    for row in METRICS["seed_table"]:
        hits = torch.zeros(1, 10, dtype=torch.bool)
        hits[0, [rank - 1 for rank in row["relevant_ranks"]]] = True
        assert rank_scores(hits, torch.tensor([10]))[:, 0].tolist() == pytest.approx(
            [row["r_precision"], row["map_at_r"]], abs=1e-12
        )


def test_oracle_neighbours_vote():
    golden = METRICS["retrieval"]
    x, labels = double(golden["x"]), torch.tensor(golden["labels"])
    assert metrics.knn_accuracy(x, labels, k=3) == pytest.approx(golden["knn3_accuracy"], abs=1e-12)
    for i, label in enumerate(golden["knn3_pred"]):  # of each query, the others being the gallery
        others = torch.arange(len(x)) != i
        assert metrics.knn_labels(x[i : i + 1], x[others], labels[others], k=3).item() == label


def test_oracle_verification():
    golden = METRICS["retrieval"]
    found = metrics.verification_rate(double(golden["x"]), torch.tensor(golden["labels"]), negatives=(1, 2, 3, 5))
    assert {f"K={k}": pytest.approx(rate, abs=1e-12) for k, rate in found.items()} == METRICS["vrf_exact"]


def test_oracle_identification():
    golden = METRICS["identification"]
    genuine, impostors = golden["genuine"], golden["impostors"]
    probes = double([g["x"] for g in genuine] + impostors)
    labels = torch.tensor([g["id"] for g in genuine] + [-1 - k for k in range(len(impostors))])
    rates = [at["far_target"] for at in golden["at"]]
    found = metrics.identification(
        probes, labels, double(golden["gallery"]), torch.tensor(golden["gallery_ids"]), false_alarm_rates=rates
    )
    assert found.rank1 == pytest.approx(golden["rank1"], abs=1e-12)
    assert (found.genuine, found.impostors) == (6, 8)
    for at in golden["at"]:
        expected = at["threshold"], at["empirical_far"], at["dir"]
        assert tuple(found.open_set[at["far_target"]]) == pytest.approx(expected, abs=1e-12)


def test_oracle_clustering():
    golden = METRICS["clustering"]
    found = metrics.clustering_scores(torch.tensor(golden["labels"]), torch.tensor(golden["clusters"]))
    names = {"nmi": "nmi_arithmetic"} | {n: n for n in ("f1", "precision", "recall", "rand_index", "purity")}
    for name, key in names.items():
        assert getattr(found, name) == pytest.approx(golden[key], abs=1e-12), name


def test_oracle_interval():
    golden = METRICS["confidence_interval"]
    found = metrics.confidence_interval(golden["runs"])
    assert tuple(found) == pytest.approx((golden["mean"], golden["half_width"]), abs=1e-12)
    assert math.isnan(metrics.confidence_interval([3.0]).half_width)


@pytest.mark.parametrize("block_bytes", [2**28, 2**11])  # in one block of queries, and in many
@pytest.mark.parametrize("impl", [pytest.param("screened", marks=needs_extension), "reference"])
@pytest.mark.parametrize("distance", ["dot", "euclidean"])
@pytest.mark.parametrize("own_gallery", [True, False])
def test_by_definition(own_gallery, distance, impl, block_bytes, monkeypatch):
    monkeypatch.setattr(nearest, "BLOCK_BYTES", block_bytes)
    x, labels, y, ref_labels = whole_numbers(61, 47, 40, 5, seed=int(own_gallery))
    refs = (None, None) if own_gallery else (y, ref_labels)
    rows = list(defined(x, labels, *refs, distance))
    for depth in (1, 7):
        scores = metrics.query_scores(x, labels, *refs, depth=depth, distance=distance, impl=impl)
        looked_at = min(max(depth, max(r for *_, r, _ in rows)), 60 if own_gallery else 47)
        assert scores.first_hit.tolist() == [first if first <= looked_at else 0 for first, *_ in rows]
        assert scores.relevant.tolist() == [r for *_, r, _ in rows]
        assert scores.r_precision.tolist() == pytest.approx([float(s) for _, s, *_ in rows], abs=1e-12)
        assert scores.map_at_r.tolist() == pytest.approx([float(s) for _, _, s, *_ in rows], abs=1e-12)
    for lone, average in itertools.product(("skip", "miss"), ("micro", "macro")):
        found = metrics.retrieval(
            x, labels, *refs, recall_at=(1, 3, 1000), lone=lone, average=average, distance=distance, impl=impl
        )
        kept = [(row, label) for row, label in zip(rows, labels.tolist(), strict=True) if row[3] or lone == "miss"]

        def mean(values, kept=kept, average=average):
            by_class = {}
            for value, (_, label) in zip(values, kept, strict=True):
                by_class.setdefault(label if average == "macro" else 0, []).append(Fraction(value))
            return float(sum(sum(v) / len(v) for v in by_class.values()) / len(by_class))

        assert 0 < found.lone == sum(row[3] == 0 for row in rows)
        assert found.queries == len(kept)
        for k, recall in found.recall.items():
            assert recall == pytest.approx(mean([0 < row[0] <= k for row, _ in kept]), abs=1e-12)
        assert found.r_precision == pytest.approx(mean([row[1] for row, _ in kept]), abs=1e-12)
        assert found.map_at_r == pytest.approx(mean([row[2] for row, _ in kept]), abs=1e-12)
    for k in (1, 2, 6, 46):
        votes = []
        for *_, of in rows:
            top = of[:k]
            votes.append(max(top, key=lambda label, top=top: (top.count(label), -top.index(label))))
        right = [vote == label for vote, label in zip(votes, labels.tolist(), strict=True)]
        assert metrics.knn_accuracy(x, labels, *refs, k=k, distance=distance, impl=impl) == sum(right) / len(right)


@pytest.mark.parametrize("distance", ["dot", "euclidean"])
@pytest.mark.parametrize("own_gallery", [True, False])
def test_verification_by_enumeration(own_gallery, distance, monkeypatch):
    """Every positive pair beside every set of K of its query's negatives."""
    monkeypatch.setattr(metrics.verification, "PASS_BYTES", 400)  # several passes
    x, labels, y, ref_labels = whole_numbers(23, 14, 5, 3, seed=5)
    if own_gallery:
        y, ref_labels = x, labels
    rates = {1: [], 3: []}
    for (i, j), k in itertools.product(itertools.product(range(len(x)), range(len(y))), rates):
        if labels[i] != ref_labels[j] or (own_gallery and i == j):
            continue
        score = -((y - x[i]) ** 2).sum(1) if distance == "euclidean" else y @ x[i]
        below = (score[ref_labels != labels[i]] < score[j]).tolist()
        rates[k].append(Fraction(sum(map(all, itertools.combinations(below, k))), math.comb(len(below), k)))
    refs = () if own_gallery else (y, ref_labels)
    found = metrics.verification_rate(x, labels, *refs, negatives=tuple(rates), distance=distance)
    assert found == {k: pytest.approx(float(sum(r) / len(r)), abs=1e-12) for k, r in rates.items()}


def test_equal_to_pytorch_metric_learning():
    generator = torch.Generator().manual_seed(3)
    centres = torch.randn(40, 16, generator=generator)
    labels = torch.cat([torch.arange(40), torch.randint(37, (300,), generator=generator)])
    x = centres[labels] + 1.0 * torch.randn(340, 16, generator=generator)
    names = ("precision_at_1", "r_precision", "mean_average_precision_at_r")
    for average, refs in itertools.product(("micro", "macro"), ((), (x[:200], labels[:200]))):
        peer = AccuracyCalculator(
            include=names, k="max_bin_count", avg_of_avgs=average == "macro", device=torch.device("cpu"),
            knn_func=CustomKNN(CosineSimilarity()),
        )  # fmt: skip
        queries = (x[200:], labels[200:]) if refs else (x, labels)
        theirs = peer.get_accuracy(*queries, *refs)
        ours = metrics.retrieval(*queries, *refs, average=average)
        assert [ours.precision_at_1, ours.r_precision, ours.map_at_r] == pytest.approx(
            [theirs[name] for name in names], abs=1e-6
        )
    assert 0.3 < ours.map_at_r < 0.9


def test_closed_and_open_set_by_definition():
    x, labels, y, ref_labels = whole_numbers(60, 20, 30, 6, seed=8)
    genuine = [label in ref_labels for label in labels]
    order = [ranking(query, y, "dot", None) for query in x]
    best = [(y[o[0]] @ query).item() for o, query in zip(order, x, strict=True)]
    right = [bool(ref_labels[o[0]] == label) for o, label in zip(order, labels, strict=True)]
    impostors = [score for score, known in zip(best, genuine, strict=True) if not known]
    rates = (0.0, 0.1, 0.3, 2 / 3, 0.999)
    found = metrics.identification(x, labels, y, ref_labels, false_alarm_rates=rates, distance="dot")
    assert len(impostors) == found.impostors > 10
    assert found.rank1 == pytest.approx(sum(r for r, g in zip(right, genuine, strict=True) if g) / sum(genuine))
    for rate in rates:
        thresholds = [-math.inf, *sorted(set(impostors))]
        share = [sum(score > t for score in impostors) / len(impostors) for t in thresholds]
        place = next(k for k, s in enumerate(share) if s <= rate)
        detected = [r and score > thresholds[place] for r, score, g in zip(right, best, genuine, strict=True) if g]
        expected = thresholds[place], share[place], sum(map(bool, detected)) / len(detected)
        assert tuple(found.open_set[rate]) == pytest.approx(expected), rate


def test_clusters_of_clusters():
    """Classes that stand apart are found; pair scores agree with scikit-learn's Fowlkes-Mallows index."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(12).repeat(20)
    x = 4 * torch.randn(12, 32, generator=generator)[labels] + torch.randn(240, 32, generator=generator)
    assert metrics.clustering(x, labels, seeds=2, n_init=5) == pytest.approx((1.0,) * 6)
    near = 0.5 * torch.randn(12, 32, generator=generator)[labels] + torch.randn(240, 32, generator=generator)
    with pytest.warns(DeprecationWarning, match="clustering: unit= is now called normalize="):
        assert metrics.clustering(x, labels, n_init=5, unit=True) == pytest.approx((1.0,) * 6)
    one, two = (metrics.clustering(near, labels, seeds=seeds) for seeds in (1, 2))
    assert one.nmi < 0.9
    assert one != two
    assert metrics.clustering_scores(labels[:12], labels[:12]) == (1.0,) * 6, "where no two are alike"
    clusters = torch.randint(9, (240,), generator=generator)
    scores = metrics.clustering_scores(labels, clusters)
    index = fowlkes_mallows_score(labels.numpy(), clusters.numpy())
    assert math.sqrt(scores.precision * scores.recall) == pytest.approx(index)


def test_of_references_and_half_precision():
    x, labels, y, ref_labels = whole_numbers(30, 40, 9, 8, seed=2)
    plain = metrics.retrieval(x, labels, y, ref_labels)
    assert metrics.retrieval(x, labels, References(y, ref_labels)) == plain
    assert metrics.retrieval(x.bfloat16(), labels, y.bfloat16(), ref_labels) == plain
    assert metrics.verification_rate(x, labels, References(y, ref_labels)) == metrics.verification_rate(
        x, labels, y, ref_labels
    )


def test_what_cannot_be():
    x, labels, y, ref_labels = whole_numbers(9, 7, 3, 4, seed=1)
    alone = torch.arange(9)
    for call, words in [
        (lambda: metrics.retrieval(x, alone), "labels must have a reference of some query's class"),
        (lambda: metrics.retrieval(x, labels, recall_at=(0,)), "recall_at must be at least 1"),
        (lambda: metrics.retrieval(x, labels, lone="no"), "lone must be one of skip, miss"),
        (lambda: metrics.retrieval(x, labels, average="no"), "average must be one of micro, macro"),
        (lambda: metrics.retrieval(x, labels, distance="no"), "distance must be one of cosine, dot, euclidean"),
        (lambda: metrics.retrieval(x * torch.nan, labels), "embeddings must be finite"),
        (
            lambda: metrics.retrieval(x[:1], labels[:1]),
            "embeddings must have two rows or more, got 1 queries and 1 references",
        ),
        (lambda: metrics.retrieval(x, labels, y), "ref_labels must be given with ref_emb"),
        (lambda: metrics.knn_accuracy(x, labels, k=9), "k must be at most 8"),
        (lambda: metrics.verification_rate(x, alone), "labels must have two samples of some class"),
        (lambda: metrics.verification_rate(x, labels, negatives=(8,)), "negatives must be at most"),
        (lambda: metrics.identification(x, labels, None), "ref_emb must be the gallery, got None"),
        (lambda: metrics.identification(x, 0 * labels, y, 0 * ref_labels, false_alarm_rates=(0.1,)), "need impostors"),
        (lambda: metrics.identification(x, labels + 9, y, ref_labels), "got only impostors"),
        (lambda: metrics.clustering_scores(labels[:0], labels[:0]), "labels must not be empty"),
        (lambda: metrics.confidence_interval([]), "runs must not be empty"),
        (lambda: metrics.retrieval(x * 1e20, labels), "and so must their squares"),
        (lambda: metrics.verification_rate(x, labels, y * 1e20, ref_labels), "ref_emb must be finite, and so must"),
        (lambda: metrics.knn_labels(x, None), "ref_emb must be the embeddings of known classes"),
        (lambda: metrics.identification(x, labels, y, ref_labels, false_alarm_rates=(1.0,)), "must be below 1"),
    ]:
        with pytest.raises(ValueError, match=words):
            call()


def test_order_of_samples_is_no_matter():
    """But for equal similarities, which random embeddings do not have."""
    generator = torch.Generator().manual_seed(4)
    x, labels = torch.randn(200, 8, generator=generator), torch.randint(20, (200,), generator=generator)
    order = random.Random(0).sample(range(200), 200)
    (recall, *one), (other_recall, *other) = (metrics.retrieval(x[o], labels[o]) for o in (order, slice(None)))
    assert recall == pytest.approx(other_recall, abs=1e-12)
    assert one == pytest.approx(other, abs=1e-12)
    one, other = (metrics.verification_rate(x[o], labels[o], negatives=(3,)) for o in (order, slice(None)))
    assert one == pytest.approx(other, abs=1e-12)
