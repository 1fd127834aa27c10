"""Samplers whose batches accelerate shares out."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import BatchSampler

from flashpair.samplers import Flat, MPerClassSampler

shards = pytest.importorskip("accelerate.data_loader")
LABELS = torch.arange(64) // 4


def test_a_share_is_not_shared_out_once_more():
    own = MPerClassSampler(LABELS, 4, 16, num_replicas=2, rank=0)
    for batches in (own, BatchSampler(Flat(own), 16, drop_last=False)):
        with pytest.raises(RuntimeError, match="share, which accelerate would split again"):
            next(iter(shards.BatchSamplerShard(batches, 2, 0)))
    assert len(list(own)) == 2  # by itself it goes on


def test_batches_of_all_processes_are_split():
    """Both halves are of one draw: no class twice."""
    halves = []
    for rank in range(2):
        whole = MPerClassSampler(LABELS, 4, 32, num_replicas=1, rank=0, seed=3)
        halves.append(list(shards.BatchSamplerShard(whole, 2, rank, split_batches=True)))
    assert [len(half) for half in halves] == [2, 2]
    for first, second in zip(*halves, strict=True):
        assert len(first) == len(second) == 16
        assert not set(LABELS[first].tolist()) & set(LABELS[second].tolist())
