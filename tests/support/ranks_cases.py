"""Calls of `flashpair.distributed.gather` on every process of a group, beside one process that has the whole batch."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from helpers import assert_same, batch
from ranks_harness import Team
from torch import Tensor

from flashpair.distributed import gather
from flashpair.losses.base import Criterion
from flashpair.losses.registry import CRITERIA, OfClasses

N, D = 41, 6
LEAST = 0.1  # of what losses and gradients are sums of, in size
WORLDS = (2, 3, 4)
SCHEDULES = ("all_gather", "ring")
SIZES = {2: (17, 24), 3: (13, 9, 19), 4: (10, 11, 13, 7)}


class Shared(NamedTuple):
    """Embeddings x (N, D) with labels (N,), of which each process has `sizes`; or also references, and theirs."""

    x: Tensor
    labels: Tensor
    sizes: Sequence[int]
    y: Tensor | None = None
    ref_labels: Tensor | None = None
    ref_sizes: Sequence[int] = ()


class Call(NamedTuple):
    """A criterion's name in CRITERIA, or what makes one, its options, and what it is called with.

    `need`: whether x and y want a gradient. The criterion's parameters are float64.
    """

    make: str | Callable[..., Criterion]
    batch: Shared
    schedule: str
    options: dict[str, Any]
    gradients: str = "mean"
    need: tuple[bool, bool] = (True, True)

    def criterion(self, **more: Any) -> Criterion:
        make = CRITERIA[self.make] if isinstance(self.make, str) else self.make
        made = make(**self.options, **more)
        if isinstance(made, OfClasses):
            made = made.of_width(self.batch.x.shape[1])
        return made.double()


class Found(NamedTuple):
    """Loss () or (n,), and gradients of x (n, D), y (m, D) and the criterion's parameters."""

    loss: Tensor
    x: Tensor
    y: Tensor
    learned: list[Tensor]


def part(t: Tensor, sizes: Sequence[int], rank: int) -> Tensor:
    return t[sum(sizes[:rank]) : sum(sizes[: rank + 1])]


def rows_of(call: Call, criterion: Criterion) -> Sequence[int]:
    """How many losses each process has with reduction "none"."""
    if criterion.anchors != "proxies":
        return call.batch.sizes
    ends = [criterion.num_classes * r // len(call.batch.sizes) for r in range(len(call.batch.sizes) + 1)]
    return [last - first for first, last in itertools.pairwise(ends)]


def upstream(rows: Sequence[int], shape: torch.Size, rank: int | None) -> Tensor:
    """Random, of all rows or of a process's; of one number the same on every process."""
    drawn = torch.randn(sum(rows) + 1, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    if not shape:
        return drawn[-1]
    return drawn[:-1] if rank is None else part(drawn[:-1], rows, rank)


def gradients_of(call: Call, loss: Tensor, seed: Tensor, x: Tensor, y: Tensor | None, criterion: Criterion) -> Found:
    empty = x.new_zeros(0)
    learned = [p for p in criterion.parameters() if p.requires_grad]
    wanted = [x, empty if y is None else y, *learned]
    found: list[Tensor | None] = [None] * len(wanted)
    if loss.requires_grad:
        places = [k for k, t in enumerate(wanted) if t.requires_grad]
        given = torch.autograd.grad(loss, [wanted[k] for k in places], seed.to(loss.dtype), allow_unused=True)
        for k, g in zip(places, given, strict=True):
            found[k] = g
    full = [torch.zeros_like(t) if g is None else g for g, t in zip(found, wanted, strict=True)]
    return Found(loss.detach(), full[0], full[1], full[2:])


def steps(calls: Sequence[Call]) -> list[Found]:
    """The job: each call's loss and gradients on this process."""
    rank, found = dist.get_rank(), []
    for call in calls:
        b, criterion = call.batch, call.criterion()
        x = part(b.x, b.sizes, rank).clone().requires_grad_(call.need[0])
        y, more = None, {}
        if b.y is not None:
            y = part(b.y, b.ref_sizes, rank).clone().requires_grad_(call.need[1])
            more = {"ref_emb": y, "ref_labels": part(b.ref_labels, b.ref_sizes, rank)}
        shared = gather(criterion, schedule=call.schedule, gradients=call.gradients)
        loss = shared(x, part(b.labels, b.sizes, rank), **more)
        found.append(gradients_of(call, loss, upstream(rows_of(call, criterion), loss.shape, rank), x, y, criterion))
    return found


def truth(call: Call) -> Found:
    """One process's, of the whole batch, by the dense reference."""
    b, criterion = call.batch, call.criterion(impl="reference")
    x = b.x.clone().requires_grad_(call.need[0])
    y = None if b.y is None else b.y.clone().requires_grad_(call.need[1])
    more = {} if y is None else {"ref_emb": y, "ref_labels": b.ref_labels}
    loss = criterion(x, b.labels, **more)
    return gradients_of(call, loss, upstream(rows_of(call, criterion), loss.shape, None), x, y, criterion)


def assert_as_one(team: Team, calls: Sequence[Call]) -> None:
    """Every process has the one process's loss, and its part of the gradients, to rounding."""
    world = len(calls[0].batch.sizes)
    every, wrong = team.run(world, steps, calls), []
    for k, call in enumerate(calls):
        try:
            _assert_call(call, [mine[k] for mine in every])
        except AssertionError as error:
            name = call.make if isinstance(call.make, str) else call.make.__name__
            wrong.append(f"{name}, {call.schedule}, {call.gradients}, {call.options}: {str(error).splitlines()[0]}")
    assert not wrong, "\n".join([f"{len(wrong)} of {len(calls)} are not as one process's:", *wrong])


def _assert_call(call: Call, found: list[Found]) -> None:
    one = truth(call)
    if one.loss.dim():
        assert_same(torch.cat([f.loss for f in found]), one.loss, LEAST)
    else:
        assert all(torch.equal(f.loss, found[0].loss) for f in found), "another number on another process"
        assert_same(found[0].loss, one.loss, LEAST)
    by = len(found) if call.gradients == "mean" else 1
    for name, whole, sizes in (("x", one.x, call.batch.sizes), ("y", one.y, call.batch.ref_sizes)):
        parts = [getattr(f, name) for f in found]
        if sizes:
            assert [len(p) for p in parts] == list(sizes)
        assert_same(torch.cat(parts), by * whole, LEAST)
    for f in found:
        for mine, first, whole in zip(f.learned, found[0].learned, one.learned, strict=True):
            assert torch.equal(mine, first), "parameters would part ways"
            assert_same_number(mine, whole) if not whole.dim() else assert_same(mine, whole, LEAST)


def assert_same_number(mine: Tensor, whole: Tensor) -> None:
    """The gradient of one number is a sum over all pairs, which may cancel: there is no largest entry to go by."""
    assert (mine - whole).abs() <= 1e-10 * whole.abs() + 1e-13, f"{mine.item()} for {whole.item()}"


def clustered(world: int) -> Shared:
    return Shared(*batch(N, D, 4, torch.float64), SIZES[world])


def _without_rows(world: int) -> Shared:
    sizes = [N // (world - 1)] * world
    sizes[1], sizes[0] = 0, N - sum(sizes[2:])
    return clustered(world)._replace(sizes=sizes)


def _one_row(world: int) -> Shared:
    sizes = [(N - 1) // (world - 1)] * world
    sizes[-1], sizes[0] = 1, N - 1 - sum(sizes[1:-1])
    return clustered(world)._replace(sizes=sizes)


def _without_positives(world: int) -> Shared:
    """What the first process has is alone in its class; so are, by turns, labels that only look as if."""
    b = clustered(world)
    labels = b.labels.clone()
    labels[: b.sizes[0]] = 100 + torch.arange(b.sizes[0])
    return b._replace(labels=labels)


def _one_class(world: int) -> Shared:
    """Few rows: losses of triplets visit a class's samples one by one."""
    sizes = [2 + rank for rank in range(world)]
    return Shared(clustered(world).x[: sum(sizes)], torch.full((sum(sizes),), 7), sizes)


def _split_classes(world: int) -> Shared:
    b = clustered(world)
    return b._replace(labels=torch.arange(N) % 6)


def _ties(world: int) -> Shared:
    """Unit rows of four halves: similarities are exact in any order, most are equal to others, and rows come twice."""
    generator = torch.Generator().manual_seed(5)
    x = torch.zeros(N, D, dtype=torch.float64)
    for row in x:
        row[torch.randperm(D, generator=generator)[:4]] = torch.randint(0, 2, (4,), generator=generator).double() - 0.5
    x[N // 2 : N // 2 + 12] = x[:12]
    return clustered(world)._replace(x=x)


BATCHES: dict[str, Callable[[int], Shared]] = {
    "uneven": clustered,
    "a process without rows": _without_rows,
    "a process with one row": _one_row,
    "a process without positives": _without_positives,
    "one class": _one_class,
    "all alone": lambda world: clustered(world)._replace(labels=torch.arange(N)),
    "classes on every process": _split_classes,
    "ties and duplicates": _ties,
    "nobody has rows": lambda world: Shared(torch.zeros(0, D).double(), torch.zeros(0).long(), [0] * world),
    "one row in all": lambda world: Shared(*batch(1, D, 1, torch.float64), [0] * (world - 1) + [1]),
}


def towers(world: int, ref_sizes: Sequence[int] | None = None) -> Shared:
    """Against references, some of whose classes the anchors do not have."""
    sizes = {2: (20, 9), 3: (0, 25, 4), 4: (9, 1, 12, 7)}[world] if ref_sizes is None else ref_sizes
    y, ref_labels = batch(sum(sizes), D, 3, torch.float64, seed=1)
    return clustered(world)._replace(y=y, ref_labels=ref_labels, ref_sizes=sizes)
