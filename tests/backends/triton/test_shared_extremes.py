"""Extremes that a logsumexp of the same pairs has anyway, and its sum in tiles of which a window leaves little."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import assert_same, batch, gradients

from flashpair import Bound, Reduction, row_reduce
from flashpair.engine.dispatch import interpreted

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(not interpreted(), reason="there is a GPU: test_gpu.py runs the kernels")

if interpreted():
    from flashpair.backends.triton import forward_pass, launcher, tiled
    from flashpair.engine import row_reduce_op


def _mined(scale, extreme, side="negatives"):
    """A logsumexp, the extreme of the same window, and a sum in a window that the extreme bounds."""
    lowest = Reduction("min", "positives", detach=True)
    kept = Bound(lowest, -0.2)
    best = Reduction(extreme, side, lower=kept, detach=True)
    bounded = {"upper" if extreme == "max" else "lower": Bound(best, 0.1)}
    return lowest, Reduction("logsumexp", side, scale=scale, lower=kept), best, Reduction("sum", "positives", **bounded)


@pytest.fixture(params=["fused", "tiled"])
def schedule(request, monkeypatch):
    if request.param == "tiled":
        monkeypatch.setattr(row_reduce_op, "backend_module", lambda impl, device: tiled)
    return request.param


@pytest.fixture
def launches(monkeypatch):
    """How many reductions each launch of `reduce_rows` has."""
    found, reduce = [], launcher.Launcher.reduce

    def spy(self, group, *args, **more):
        found.append(len(group))
        return reduce(self, group, *args, **more)

    monkeypatch.setattr(launcher.Launcher, "reduce", spy)
    return found


@pytest.mark.parametrize(("scale", "extreme"), [(3.0, "max"), (0.0, "max"), (-3.0, "min")])
def test_an_extreme_has_the_bits_of_its_own_pass(scale, extreme, schedule, launches, monkeypatch):
    x, labels = batch(50, 5, 4, torch.float64)
    labels[0] = 99  # of no positives, so of no window
    found = row_reduce(x, labels, *_mined(scale, extreme), impl="fused")
    together, before = sum(launches), len(launches)
    monkeypatch.setattr(forward_pass, "shared_extremes", lambda *arguments: {})
    apart = row_reduce(x, labels, *_mined(scale, extreme), impl="fused")
    assert (together, sum(launches[before:])) == (3, 4)
    assert (found[2] == apart[2]).all() and found[2].isfinite().any() and found[2].isinf().any()
    for one, other in zip(found, apart, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("why", ["learned scale", "the other extreme", "another window", "another side", "its place"])
def test_what_is_not_the_same_has_a_pass_of_its_own(why, schedule, launches):
    x, labels = batch(40, 5, 4, torch.float64)
    scale = torch.tensor(3.0, dtype=x.dtype) if why == "learned scale" else 3.0
    bound = {"lower": 0.1 if why == "another window" else 0.0}
    side = "all" if why == "another side" else "negatives"
    extreme = Reduction("min" if why == "the other extreme" else "max", side, detach=why != "its place", **bound)
    reductions = Reduction("logsumexp", "negatives", scale=scale, lower=0.0), extreme
    found = row_reduce(x, labels, *reductions, impl="fused")
    assert sum(launches) == 2
    for one, truth in zip(found, row_reduce(x, labels, *reductions, impl="reference"), strict=True):
        assert_same(one, truth)


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("bound", [None, 0.0])
def test_a_scale_of_zero_counts_pairs(bound, learned, schedule):
    x, labels = batch(40, 5, 4, torch.float64)
    scale = torch.zeros((), dtype=x.dtype, requires_grad=True) if learned else 0.0
    r = Reduction("logsumexp", "negatives", scale=scale, lower=bound)
    count = Reduction("count", "negatives", lower=bound)
    rows, number = row_reduce(x.requires_grad_(), labels, r, count, impl="fused")
    assert_same(rows.detach(), number.log())
    assert number.min() < number.max() or bound is None
    inputs = [x, scale] if learned else [x]
    (truth,) = row_reduce(x, labels, r, impl="reference")
    some = rows.detach() > -math.inf
    for one, other in zip(gradients((rows[some],), inputs), gradients((truth[some],), inputs), strict=True):
        assert_same(one, other)
