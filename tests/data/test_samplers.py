"""Samplers: what a batch is made of, whose share it is, and that a seed says all of it."""

from __future__ import annotations

import itertools

import pytest
import torch
from golden import load
from torch.utils.data import DataLoader, TensorDataset

from flashpair import samplers
from flashpair.miners import hard_classes
from flashpair.samplers import Flat, HardClassSampler, MPerClassSampler, NPairsSampler

MINING = load()["mining"]


def uneven_labels():
    """30 classes, of 1 to 30 samples, in disorder; labels are not consecutive."""
    labels = torch.repeat_interleave(7 * torch.arange(30) - 50, torch.arange(1, 31))
    return labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))]


def by_class(labels, batch):
    found = {}
    for place in batch:
        found.setdefault(labels[place].item(), []).append(place)
    return found


@pytest.mark.parametrize("m", [1, 4, 32])
def test_some_of_each_of_some_classes(m):
    labels = uneven_labels()
    sampler = MPerClassSampler(labels, m, 8 * m, batches=40)
    batches = list(sampler)
    assert len(batches) == len(sampler) == 40
    for batch in batches:
        found = by_class(labels, batch)
        assert [labels[place] for place in batch] == [label for label in found for _ in range(m)]
        assert len(found) == 8
        for label, places in found.items():
            size = int((labels == label).sum())
            assert len(set(places)) == min(m, size), "no sample again while there are others"
            assert max(map(places.count, places)) == -(-m // size)


def test_classes_are_as_likely_whatever_their_size():
    """10 of 30 in each of 3,000 batches: 1,000 times each, standard deviation 26. So is each sample of a class."""
    labels = uneven_labels()
    times, samples = torch.zeros(30), torch.zeros(len(labels))
    for batch in MPerClassSampler(labels, 1, 10, batches=3000, seed=3):
        times[(labels[batch] + 50) // 7] += 1
        samples[batch] += 1
    assert (times - 1000).abs().max() < 5 * 26
    largest = samples[labels == labels.max()]
    assert (largest - 1000 / 30).abs().max() < 5 * (1000 / 30) ** 0.5
    firsts = {labels[batch[0]].item() for batch in MPerClassSampler(labels, 1, 10, batches=300)}
    assert len(firsts) == 30, "places in a batch are no one's own"


@pytest.mark.parametrize("make", [
    lambda labels, **options: MPerClassSampler(labels, 2, 8, **options),
    lambda labels, **options: NPairsSampler(labels, 4, **options),
    lambda labels, **options: HardClassSampler(labels, lambda places: places[:, None] % 7 + 0.5, 4, **options),
])  # fmt: skip
def test_seed_and_epoch_say_all(make):
    labels = uneven_labels()
    one, other = make(labels, batches=5), make(labels.tolist(), batches=5)
    epochs = [list(one) for _ in range(3)]
    assert len({str(epoch) for epoch in epochs}) == 3
    assert [list(other) for _ in range(3)] == epochs
    other.set_epoch(1)
    assert list(other) == epochs[1]
    assert list(other) == epochs[2]
    assert list(make(labels, batches=5, seed=1)) not in epochs
    sampled = int((labels.unique(return_counts=True)[1]).sum()) - isinstance(one, (NPairsSampler, HardClassSampler))
    assert len(make(labels)) == sampled // 8
    with torch.random.fork_rng():
        torch.manual_seed(5)
        before = torch.random.get_rng_state()
        list(make(labels))
        assert torch.equal(torch.random.get_rng_state(), before), "torch's own generator is left alone"


@pytest.mark.parametrize("world", [2, 3])
def test_processes_share_a_batch(world):
    """Together they have the batch that one process of their size has: no class twice."""
    labels = uneven_labels()
    for m in (2, 4 * world):  # which fits a share, and which does not
        whole = MPerClassSampler(labels, m, 4 * world, batches=6)
        shares = [MPerClassSampler(labels, m, 4, batches=6, num_replicas=world, rank=rank) for rank in range(world)]
        for batch, *parts in zip(whole, *shares, strict=True):
            assert list(itertools.chain(*parts)) == batch
    pairs = [NPairsSampler(labels, 5, batches=6, num_replicas=world, rank=rank) for rank in range(world)]
    mined = [
        HardClassSampler(labels, lambda p: p[:, None].sin(), 5, batches=6, num_replicas=world, rank=rank)
        for rank in range(world)
    ]
    for parts in (*zip(*pairs, strict=True), *zip(*mined, strict=True)):
        assert all(len(part) == 10 for part in parts)
        assert len(by_class(labels, itertools.chain(*parts))) == 5 * world


def test_pairs_of_different_samples():
    labels = uneven_labels()
    drawn = set()
    for batch in NPairsSampler(labels, 6, batches=200):
        anchors, positives = labels[batch].chunk(2)
        assert torch.equal(anchors, positives)
        assert len(anchors.unique()) == 6 and len(set(batch)) == 12
        drawn.update(anchors.tolist())
    assert drawn == set(labels.tolist()) - {labels.min().item()}, "the class of one sample is left out"


@pytest.mark.parametrize("workers", [0, 2])
def test_in_a_data_loader(workers):
    labels = uneven_labels()
    data = TensorDataset(torch.arange(len(labels)), labels)
    sampler = MPerClassSampler(labels, 3, 12, batches=7)
    loader = DataLoader(data, batch_sampler=sampler, num_workers=workers)
    flat = DataLoader(
        data, sampler=Flat(MPerClassSampler(labels, 3, 12, batches=7)), batch_size=12, num_workers=workers
    )
    assert len(loader) == len(flat) == 7
    expected = MPerClassSampler(labels, 3, 12, batches=7)
    for _ in range(2):
        for batch, (places, theirs), (same, _) in zip(expected, loader, flat, strict=True):
            assert places.tolist() == same.tolist() == batch
            assert torch.equal(theirs, labels[batch])


@pytest.mark.parametrize("aggregate", ["max", "sum"])
def test_oracle_hard_classes(aggregate):
    golden = MINING[f"hard_class_greedy_{aggregate}"]
    f, positive = (torch.tensor(golden[name], dtype=torch.float64) for name in ("anchors", "positives"))
    found = hard_classes(f, positive, golden["n"], aggregate=aggregate, start=golden["start"])
    assert found.tolist() == golden["selected"]


@pytest.mark.parametrize("aggregate", ["max", "sum"])
def test_hard_classes_by_definition(aggregate):
    """Whole numbers, so that many classes are equally hard: each chosen one is among the hardest, and any of them."""
    generator = torch.Generator().manual_seed(1)
    f, positive = torch.randint(-2, 3, (2, 40, 3), generator=generator).float()
    violation = f @ positive.T - (f * positive).sum(1, keepdim=True)
    seconds = set()
    for _ in range(50):
        chosen = hard_classes(f, positive, 40, aggregate=aggregate, generator=generator).tolist()
        assert sorted(chosen) == list(range(40))
        for k in range(1, 40):
            rows = violation[chosen[:k]]
            hardness = rows.amax(0) if aggregate == "max" else rows.sum(0)
            hardness[chosen[:k]] = -torch.inf
            assert hardness[chosen[k]] == hardness.max()
        start = hard_classes(f, positive, 2, aggregate=aggregate, start=7, generator=generator).tolist()
        assert start[0] == 7
        seconds.add(start[1])
    others = violation[7].clone()
    others[7] = -torch.inf
    assert seconds == set((others == others.max()).nonzero()[:, 0].tolist())
    assert len(seconds) > 1


def test_a_batch_of_classes_that_are_near():
    """Classes on a line in pairs: with one of a pair comes the other, and only its samples are asked for."""
    labels = torch.arange(40).repeat_interleave(5)
    asked = []

    def embed(places):
        asked.append(len(places))
        assert not torch.is_grad_enabled()
        angle = (labels[places] // 2 * 0.15 + labels[places] % 2 * 1e-3).double()
        return torch.stack([angle.cos(), angle.sin()], dim=1)

    for batch in HardClassSampler(labels, embed, 6, m=3, candidates=40, batches=10):
        assert torch.equal(labels[batch], labels[batch[:6]].repeat(3))
        pairs = labels[batch[:6]] // 2
        assert len(pairs.unique()) == 3
        assert len(set(batch)) == 18
    assert asked == [80] * 10


def test_thousands_of_classes_in_a_few_rows_of_memory(monkeypatch):
    labels = torch.arange(3000).repeat_interleave(2)
    table = torch.randn(6000, 8, generator=torch.Generator().manual_seed(2))
    sizes = []
    monkeypatch.setattr(samplers.hard_classes, "hard_classes", lambda f, positive, *rest, **options: (
        sizes.append(f.shape), hard_classes(f, positive, *rest, **options))[1])  # fmt: skip

    def embed(places):
        sizes.append(len(places))
        return table[places]

    sampler = HardClassSampler(labels, embed, 64, candidates=1500, batches=1)
    assert len(set(labels[next(iter(sampler))].tolist())) == 64
    assert sizes == [1024, 1024, 952, (1500, 8)]


def test_what_cannot_be():
    labels = uneven_labels()
    embed = torch.zeros
    for call, words in [
        (
            lambda: MPerClassSampler(labels, 3, 8),
            "batch_size times the number of processes must be a multiple of m = 3, got 8",
        ),
        (
            lambda: MPerClassSampler(labels, 1, 31),
            r"labels must have 31 classes \(batch_size / m = 31 / 1, over all processes\), got 30",
        ),
        (lambda: MPerClassSampler(labels, 1, 16, num_replicas=2, rank=0), "batch_size / m = 32 / 1"),
        (lambda: MPerClassSampler(labels, 1, 8, num_replicas=2, rank=2), "rank must be one of 0, 1"),
        (lambda: MPerClassSampler(labels, 0, 8), "m must be at least 1"),
        (lambda: MPerClassSampler(labels, 1, 8, seed=-1), "seed must be at least 0"),
        (lambda: MPerClassSampler(labels, 1, 8, seed=2**39), "seed must be below 2"),
        (lambda: MPerClassSampler(labels[None], 1, 8), "labels must have shape"),
        (lambda: NPairsSampler(labels, 30), "labels must have 30 classes of two samples or more .*, got 29"),
        (lambda: HardClassSampler(labels, embed, 30), "labels must have 30 classes of two samples or more"),
        (lambda: HardClassSampler(labels, embed, 9, candidates=8), "candidates must be at least .* 9, got 8"),
        (lambda: HardClassSampler(labels, embed, 9, aggregate="mean"), "aggregate must be one of max, sum"),
        (lambda: hard_classes(torch.ones(3, 2), torch.ones(2, 2), 1), "positives must be like anchors"),
        (lambda: hard_classes(torch.ones(3, 2), torch.ones(3, 2), 4), "count must be at most 3"),
        (lambda: hard_classes(torch.ones(3, 2), torch.ones(3, 2), 1, start=3), "start must be below 3"),
        (lambda: hard_classes(torch.ones(3, 2), torch.ones(3, 2) * torch.nan, 1), "must be finite"),
    ]:
        with pytest.raises(ValueError, match=words):
            call()
    with pytest.raises(TypeError, match="labels must be an integer tensor"):
        MPerClassSampler([0.5, 1.0], 1, 1)
