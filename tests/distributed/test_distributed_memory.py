"""What a process holds: of all rows with "all_gather", and with "ring" the same however many processes there are."""

from __future__ import annotations

import ctypes

import peaks
import pytest
import torch
import torch.distributed as dist
from conftest import needs_extension
from ranks_cases import SCHEDULES

import flashpair
from bench.harness.memory import peak_of
from flashpair.distributed import gather

pytestmark = [needs_extension, peaks.only_linux]
ROWS, WIDTH = 500, 2048
COPIES = 12  # of a process's rows: sorted ones, packets, two processes' as one problem, and their gradients
COPY = 4 * ROWS * WIDTH  # bytes of a process's rows, beside which all else is small
SLACK = 2**21
M_MMAP_THRESHOLD = -3  # of malloc.h


def _peaks(make):
    """The most bytes that forward and backward of a call added to this process, with each schedule."""
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, peaks.THRESHOLD)
    rank, found = dist.get_rank(), []
    for schedule in SCHEDULES:
        shared = gather(make(), schedule=schedule)
        x = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(rank)).requires_grad_()
        x.grad = torch.zeros_like(x)
        labels = (torch.arange(ROWS) + rank * ROWS // 2) // 4

        def step(shared=shared, x=x, labels=labels):
            shared(x, labels).backward()

        shared(x[:300], labels[:300]).backward()  # code, threads and buffers are there before anything is counted
        found.append(peak_of(step).extra)
    return found


@pytest.mark.parametrize("make", [flashpair.NTXentLoss])
def test_a_ring_s_memory_does_not_grow_with_the_processes(team, make):
    few, many = (torch.tensor(team.run(world, _peaks, make)).amax(0) for world in (6, 8))
    (gathered, ring), (more_gathered, more_ring) = few.tolist(), many.tolist()
    words = f"{ring / COPY:.1f}, then {more_ring / COPY:.1f} copies"
    assert ring <= COPIES * COPY + SLACK, words
    assert abs(more_ring - ring) <= COPY / 2 + SLACK, words
    # two processes' rows more, and as many of their gradient
    assert more_gathered >= gathered + 4 * COPY, f"{gathered / COPY:.1f}, then {more_gathered / COPY:.1f} copies"
