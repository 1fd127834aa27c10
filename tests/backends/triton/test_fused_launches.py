"""How the interpreted Triton kernels share out the work: splits of the columns, lists of live tiles, exponentials."""

from __future__ import annotations

import math

import interpreted_kernels
import pytest
import torch
from helpers import (
    CRITERIA,
    assert_same,
    batch,
    gradients,
)
from interpreted_kernels import compare, interpreted_alone

from flashpair import MultiSimilarityLoss, Reduction, row_reduce
from flashpair.core.call import compile_call
from flashpair.engine.dispatch import interpreted

pytest.importorskip("triton")
pytestmark = interpreted_alone

if interpreted():
    from flashpair.backends.triton import launch, launcher, shared_top
    from flashpair.core.problem import Operands, Problem

tiles = interpreted_kernels.tiles


@pytest.mark.parametrize("count", [2, 9])
@pytest.mark.parametrize("per_class", [4, 90])
def test_columns_split_among_programs(count, per_class, monkeypatch, tiles):
    """More splits than the columns, or those with positives, have tiles, too."""
    monkeypatch.setattr(launch, "choose_splits", lambda *arguments: count)
    x, labels = batch(70, 7, per_class, torch.float64)
    y, ref_labels = batch(85, 7, per_class, torch.float64, seed=1)
    compare(CRITERIA["LiftedStructureLoss"], x, labels)
    compare(MultiSimilarityLoss, x, labels)
    compare(CRITERIA["MultiSimilarityLoss"], x, labels, y, ref_labels)


def test_splits_fill_the_processors_and_leave_tiles_whole(monkeypatch):
    monkeypatch.setattr(launch, "processors", lambda device: 132)
    cpu = torch.device("cpu")
    assert launch.choose_splits(1024, 2048, cpu) == 1
    assert launch.choose_splits(8, 1024, cpu) > 10
    assert launch.choose_splits(8, 8, cpu) <= 2
    assert launch.choose_splits(8, 1024, cpu, most=3) <= 3
    assert launch.choose_splits(0, 0, cpu) == 1


@pytest.mark.parametrize("noise", [1.0, 0.4, 0.02])
@pytest.mark.parametrize("references", [False, True], ids=["square", "references"])
def test_mining_that_leaves_many_and_few_tiles(noise, references, monkeypatch, tiles):
    """Backward visits just the tiles that a window lets a pair through of, and the gradient is the same."""
    listed = []
    list_tiles = launcher.Launcher.list_tiles

    def spy(self, live, role):
        found = list_tiles(self, live, role)
        listed.append((found.counts.sum().item(), found.index.numel()))
        return found

    monkeypatch.setattr(launcher.Launcher, "list_tiles", spy)
    centres = torch.randn(64, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(256) // 4
    x = centres[labels] + noise * torch.randn(256, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    y = (x[:200] + 0.01, labels[:200]) if references else ()
    compare(MultiSimilarityLoss, x, labels, *y)
    visited, tiles_in_all = map(sum, zip(*listed, strict=True))
    assert len(listed) == 1 + references
    assert visited < tiles_in_all * (1.0 if noise == 1 else 0.9 if noise > 0.1 else 0.3)


@pytest.mark.parametrize("spread", [0.0, math.inf])
def test_one_exponential_for_both_ends_and_one_for_each(spread, monkeypatch, tiles):
    """Which of the two kernels runs is decided on the device by how far the rows' logsumexps lie apart."""
    monkeypatch.setattr(shared_top, "SPREAD", dict.fromkeys(shared_top.SPREAD, spread))
    x, labels = batch(90, 7, 4, torch.float64)
    for name in ("MultiSimilarityLoss", "GeneralizedLiftedStructureLoss(distance='euclidean')"):
        compare(CRITERIA[name], x, labels)


def test_logsumexps_too_far_apart_for_one_exponential(monkeypatch, tiles):
    x, labels = batch(90, 7, 4, torch.float64)
    monkeypatch.setattr(shared_top, "SPREAD", dict.fromkeys(shared_top.SPREAD, 100.0))
    x[::2] *= 8  # products of order 1 and of order 100
    results = []
    for impl in ("fused", "reference"):
        a = x.clone().requires_grad_()
        (rows,) = row_reduce(a, labels, Reduction("logsumexp", "negatives"), impl=impl)
        results.append([rows.detach(), *gradients((rows,), [a])])
    assert results[1][0].max() - results[1][0].min() > shared_top.SPREAD[torch.float64]
    for found, truth in zip(*results, strict=True):
        assert_same(found, truth)


def test_rows_past_two_to_the_thirty_one_entries(tiles):
    """Offsets are 64 bits: the positives of the one anchor are the last rows of 4 GB of references."""
    m, d = 2**21 + 5, 1024
    y = torch.zeros(m, d, dtype=torch.float16)
    y[-4:] = torch.tensor([[0.5], [2.0], [1.0], [-1.0]], dtype=torch.float16)
    x = torch.ones(1, d, dtype=torch.float16)
    lo, hi = torch.tensor([m - 4]), torch.tensor([m])
    p = Problem(x, y, lo, hi, None, torch.arange(m), "dot")
    r = Reduction("max", "positives", detach=True)
    call = compile_call((r,), "dot", "fused")
    one = launcher.Launcher(p, call.terms, Operands(None, call.scales, []))
    state = one.forward_operands(0, 1, False, torch.empty(1, 1))
    one.reduce((0,), [state], one.anchors(), launcher.PairBlock(0, 1, 0, m), 1)
    assert state.row_max.item() == 2 * d
