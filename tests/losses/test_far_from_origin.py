"""Ranks are exact: metrics and miners by Euclidean distance, of rows whose squares swallow their differences."""

from __future__ import annotations

import pytest
import torch

import flashpair
from flashpair import metrics

N, D = 48, 4
NEAR = N // 3 - 1  # of a cluster; distances to other clusters are the same but for float32's rounding
ROUNDING = 1e-6


def far():
    """Batches (N, D) float32 whose own differences, taken in float64, say what is near."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(N, D, generator=generator)
    one_huge = torch.cat([torch.full((N, 1), 3e6), x[:, 1:]], dim=1)
    apart = x + 1e5 * torch.nn.functional.one_hot(torch.arange(N) % 3, D)
    collapsed = torch.randn(1, D, generator=generator) + 1e-4 * x
    return {"shifted": 8 * x + 1e6, "one huge coordinate": one_huge, "clusters apart": apart, "collapsed": collapsed}


BATCHES = far()
LABELS = torch.arange(N) // 3 % 8


def distances(x):
    x = x.double()
    return (x[:, None] - x[None, :]).norm(dim=2)


def ranking(x):
    """The order of each row's others by distance, equal ones by index."""
    d = distances(x)
    d.fill_diagonal_(torch.inf)
    return d.sort(dim=1, stable=True).indices[:, :NEAR]


@pytest.fixture(params=BATCHES)
def x(request):
    return BATCHES[request.param]


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_nearest(x, impl):
    found = flashpair.nearest(x, NEAR, distance="euclidean", impl=impl)
    assert torch.equal(found.indices, ranking(x))
    exact = distances(x).gather(1, ranking(x))
    torch.testing.assert_close(found.values.double(), exact, rtol=1e-5, atol=0)


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_ranked_metrics(x, impl):
    order = ranking(x)
    hits = LABELS[order] == LABELS[:, None]
    found = metrics.retrieval(x, LABELS, recall_at=(1, 4), distance="euclidean", impl=impl)
    for k in (1, 4):
        assert found.recall[k] == pytest.approx(hits[:, :k].any(1).double().mean().item(), abs=1e-12)
    scores = metrics.query_scores(x, LABELS, depth=NEAR, distance="euclidean", impl=impl)
    assert torch.equal(scores.first_hit, torch.where(hits.any(1), hits.byte().argmax(1) + 1, 0))
    votes = LABELS[order[:, :1]][:, 0]
    assert metrics.knn_accuracy(x, LABELS, k=1, distance="euclidean", impl=impl) == (votes == LABELS).double().mean()


def test_identification(x):
    half = N // 2
    d = distances(x)[:half, half:]
    right = (LABELS[half:][d.sort(dim=1, stable=True).indices[:, 0]] == LABELS[:half]).double().mean().item()
    found = metrics.identification(x[:half], LABELS[:half], x[half:], LABELS[half:], distance="euclidean")
    assert found.rank1 == pytest.approx(right, abs=1e-12)


@pytest.mark.parametrize("impl", ["tiled", "reference"])
def test_verification(x, impl):
    d, same = distances(x), LABELS[:, None] == LABELS
    pairs = [(d[a, p], d[a, ~same[a]]) for a in range(N) for p in range(N) if same[a, p] and a != p]
    low = sum((others > own * (1 + ROUNDING)).double().mean().item() for own, others in pairs) / len(pairs)
    high = sum((others > own * (1 - ROUNDING)).double().mean().item() for own, others in pairs) / len(pairs)
    found = metrics.verification_rate(x, LABELS, negatives=(1,), distance="euclidean", impl=impl)[1]
    assert high - low < 0.05
    assert low - 1e-9 <= found <= high + 1e-9


def test_batch_hard_miner(x):
    d, same = distances(x), LABELS[:, None] == LABELS
    positives = same & ~torch.eye(N, dtype=torch.bool)
    mined = flashpair.miners.BatchHardMiner(distance="euclidean", normalize=False)(x, LABELS)
    assert torch.equal(mined.a, torch.arange(N))
    for found, hardest in (
        (mined.p, torch.where(positives, d, -torch.inf).amax(1)),
        (mined.n, torch.where(same, torch.inf, d).amin(1)),
    ):
        torch.testing.assert_close(d[mined.a, found], hardest, rtol=ROUNDING, atol=0)


def test_distances_of_miners(x):
    miner = flashpair.miners.DistanceWeightedMiner(normalize=False)
    blocks = torch.cat([block.z for block in miner.rows(x, LABELS, None, None)])
    off = ~torch.eye(N, dtype=torch.bool)
    torch.testing.assert_close(blocks.double()[off], distances(x)[off], rtol=1e-5, atol=0)
