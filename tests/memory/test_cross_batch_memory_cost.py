"""What a step of CrossBatchMemory does not do: screened pairs, segments made anew, memory beside the queue."""

from __future__ import annotations

import peaks
import pytest
import torch
from conftest import needs_extension
from cross_batch_memory_cases import SIZE, D, Oracle, batches, screen_everything, step
from helpers import CRITERIA, assert_same

import flashpair
from flashpair import CrossBatchMemory, screening
from flashpair.backends.cpu.screened import rounded
from flashpair.chunked import reduce as pieces
from flashpair.memory import queue

pytestmark = needs_extension
TIGHT = ["MultiSimilarityLoss", "ContrastiveLoss(0.9, 0.2, 'cosine')", "TripletMarginLoss(triplets='hard')"]
TIGHT += ["BinomialDevianceLoss(epsilon=0.1)", "ContrastiveLoss"]


@pytest.mark.parametrize("listed", [pieces.LIVE_PAIRS_PER_ROW, 0], ids=["listed", "lists too short"])
@pytest.mark.parametrize("name", TIGHT)
def test_screened_where_few_pairs_live(name, listed, monkeypatch):
    """Classes so tight that most pairs are dead: what lives is listed in forward and looked up in backward."""
    screen_everything(monkeypatch)
    monkeypatch.setattr(queue, "RUN_ROWS", 300)
    monkeypatch.setattr(pieces, "LIVE_PAIRS_PER_ROW", listed)
    memory = CrossBatchMemory(CRITERIA[name](), 32, 700, dtype=torch.float64)
    oracle = Oracle(memory.criterion, 700, 32)
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(60, 32, generator=generator, dtype=torch.float64)
    for _ in range(6):
        labels = torch.randint(60, (180,), generator=generator)
        x = centres[labels] + 0.7 * torch.randn(180, 32, generator=generator, dtype=torch.float64)
        with screening() as seen:
            found = step(memory, x, labels)
        assert seen.tiles > 0
        for f, t in zip(found, step(oracle, x, labels), strict=True):
            assert_same(f, t)
    assert seen.tiles > 2 and seen.whole < seen.tiles
    if "hard" not in name:
        assert 0 < seen.live < seen.pairs / 4


def test_a_named_schedule_is_not_screened(monkeypatch):
    screen_everything(monkeypatch)
    with screening() as seen:
        memory = CrossBatchMemory(flashpair.MultiSimilarityLoss(impl="tiled"), D, SIZE)
        for x, labels in batches(dtype=torch.float32):
            memory(x, labels)
    assert seen.tiles == 0


def test_segments_that_stay_are_rounded_once(monkeypatch):
    screen_everything(monkeypatch)
    monkeypatch.setattr(queue, "RUN_ROWS", 50)
    memory, kept = CrossBatchMemory(flashpair.MultiSimilarityLoss(), D, 400), []
    for x, labels in batches((20,) * 30, dtype=torch.float32):
        memory(x, labels)
        kept.append([rounded(s.rows) for s in memory.queue.runs])
    same = [a is b and len(a) == 1 for a, b in zip(kept[-1], kept[-2], strict=True)]
    assert sum(same) >= 6


def test_what_a_batch_makes_anew_is_bounded_by_segments(monkeypatch):
    """However many segments there are, at most those that it meets at either end."""
    monkeypatch.setattr(queue, "RUN_ROWS", 50)
    memory = CrossBatchMemory(flashpair.NTXentLoss(), D, 1000)
    for k, (x, labels) in enumerate(batches((30,) * 80, dtype=torch.float32)):
        before = [s.rows.data_ptr() for s in memory.queue.runs]
        memory(x, labels)
        after = [s.rows.data_ptr() for s in memory.queue.runs]
        assert sum(a != b for a, b in zip(after, before, strict=True)) <= 3, k
    assert len(memory) == 1000 and len(after) == 20


FULL = """
impl, (d, n, size) = sys.argv[1], map(int, sys.argv[2:])
torch.set_num_threads(2)
memory = flashpair.CrossBatchMemory(flashpair.MultiSimilarityLoss(impl=impl), d, size)
def step():
    x = torch.randn(n, d, requires_grad=True)
    memory(x, torch.randint(1000, (n,))).backward()
step()
empty = resident()
for _ in range(size // 4096 + 1):
    memory.queue.evict(4096)
    labels, order = torch.sort(torch.randint(1000, (4096,)))
    memory.queue.append(torch.nn.functional.normalize(torch.randn(4096, d)), labels, order)
print(resident() - empty)
def steps():
    for _ in range(3):
        step()
print(peak_of(steps).extra)
assert len(memory) == size
"""


@peaks.only_linux
@pytest.mark.parametrize("impl", ["tiled", "auto"])
def test_a_step_takes_a_few_segments_beside_the_memory(impl):
    """Of the memory's size, 200,000 rows, nothing: no matrix (410 MB), no copy (26 MB); but what screening keeps."""
    d, n, size = 32, 512, 200_000
    entries, extra = peaks.printed(FULL, impl, d, n, size)
    row = 4 * d + 16
    assert 0.9 * size * row < entries < 1.5 * size * row
    limit = 8 * queue.RUN_ROWS * row + 12 * n * row + 64 * 8 * (n + queue.RUN_ROWS) + 8 * 4 * 512**2
    assert limit < size * 4 * d
    if impl == "auto":  # coordinates in int8 and two numbers a row, and lists of live pairs
        limit += size * (d + 16) + size * 8 * pieces.LIVE_PAIRS_PER_ROW
    assert limit < 4 * n * size / 8 and extra <= limit, f"{extra:,} bytes over {limit:,}"
