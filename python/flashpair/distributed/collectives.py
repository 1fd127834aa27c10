"""The processes that share a batch, and what they tell each other: torch.distributed's own collectives, no more."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..core.chunks import only_once

RING, RETURN = 1, 2  # tags: a chunk on its way round, and what was found for one on its way back


class Ranks:
    """A process group, seen from one of its processes.

    Attributes:
        rank, world: this process's place in the group, and how many there are.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self.group = group
        self.rank, self.world = dist.get_rank(group), dist.get_world_size(group)

    def rank_at(self, distance: int) -> int:
        return (self.rank + distance) % self.world

    @property
    def device(self) -> torch.device:
        """Where this group's messages may be, for a process that has no tensor to go by."""
        nccl = "nccl" in dist.get_backend(self.group)
        return torch.device("cuda", torch.cuda.current_device()) if nccl else torch.device("cpu")

    def all_gather_ints(
        self, facts: Sequence[int], device: torch.device, last: Tensor | None = None
    ) -> list[list[int]]:
        """Some integers of every process, and one that is on the device; the host waits for them."""
        mine = torch.tensor(facts, dtype=torch.int64, device=device)
        if last is not None:
            mine = torch.cat([mine, last[None]])
        return [t.tolist() for t in self._gathered(mine)]

    def all_gather_text(self, text: str, device: torch.device) -> list[str]:
        """Some words of every process."""
        mine = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).to(device)
        sizes = [size for (size,) in self.all_gather_ints([mine.shape[0]], device)]
        return [bytes(t.tolist()).decode() for t in self.gather(mine, sizes)]

    def _gathered(self, mine: Tensor) -> list[Tensor]:
        every = [torch.empty_like(mine) for _ in range(self.world)]
        dist.all_gather(every, mine, group=self.group)
        return every

    def gather(self, rows: Tensor, sizes: Sequence[int]) -> list[Tensor]:
        """Everybody's rows (n_r, ...), of which there are `sizes`; padded on the way to the most that anyone has."""
        most = max(sizes)
        mine = rows.new_zeros(most, *rows.shape[1:])
        mine[: rows.shape[0]] = rows
        return [t[:size] for t, size in zip(self._gathered(mine), sizes, strict=True)]

    def reduce_scatter(self, rows: Tensor, size: int) -> Tensor:
        """From rows (world, most, ...) the sum of everybody's for this process, its first `size`."""
        out = torch.empty_like(rows[0])
        dist.reduce_scatter(out, list(rows.unbind(0)), group=self.group)
        return out[:size]

    def sum(self, values: Tensor) -> Tensor:
        total = values.clone().contiguous()
        dist.all_reduce(total, group=self.group)
        return total

    def max(self, values: Tensor) -> Tensor:
        most = values.clone().contiguous()
        dist.all_reduce(most, op=dist.ReduceOp.MAX, group=self.group)
        return most

    def sendrecv(self, out: Tensor, to: int, into: Tensor, source: int, tag: int) -> Transfer:
        """Starts to send `out` to one process and to fill `into` from another; nobody sends what has no elements."""
        ops = []
        if out.numel():
            ops.append(dist.P2POp(dist.isend, out, self._global(to), self.group, tag))
        if into.numel():
            ops.append(dist.P2POp(dist.irecv, into, self._global(source), self.group, tag))
        return Transfer(dist.batch_isend_irecv(ops) if ops else [], out, into)

    def _global(self, rank: int) -> int:
        return rank if self.group is None else dist.get_global_rank(self.group, rank)


class Transfer:
    """One that has started; keeps both ends' memory until it is over."""

    def __init__(self, work: Sequence[Any], out: Tensor, into: Tensor) -> None:
        self.work, self.out, self.into = work, out, into

    def wait(self) -> Tensor:
        for one in self.work:
            one.wait()
        return self.into


class AllReduceSum(torch.autograd.Function):
    """The sum of every process's values. Each counts towards a loss that is the sum of every process's share, so its
    gradient is the sum of what the shares give."""

    @staticmethod
    def forward(ctx: Any, ranks: Ranks, values: Tensor) -> Tensor:
        ctx.ranks = ranks
        return ranks.sum(values)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[None, Tensor]:
        only_once()
        return None, ctx.ranks.sum(g)


class AllReduceGrad(torch.autograd.Function):
    """A tensor that every process has: its gradient is the sum of the processes', the same on each."""

    @staticmethod
    def forward(ctx: Any, ranks: Ranks, value: Tensor) -> Tensor:
        ctx.ranks = ranks
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[None, Tensor]:
        only_once()
        return None, ctx.ranks.sum(g)


class ScaleGrad(torch.autograd.Function):
    """A tensor whose gradient is multiplied."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, by: float) -> Tensor:
        ctx.by = by
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return g * ctx.by, None


class AllGatherRows(torch.autograd.Function):
    """Everybody's rows (n, D), one after the other; the gradient of a row goes home, summed."""

    @staticmethod
    def forward(ctx: Any, ranks: Ranks, rows: Tensor, sizes: Sequence[int]) -> Tensor:
        ctx.ranks, ctx.sizes = ranks, sizes
        return torch.cat(ranks.gather(rows, sizes))

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[None, Tensor, None]:
        only_once()
        ranks, sizes = ctx.ranks, ctx.sizes
        parts = g.new_zeros(ranks.world, max(sizes), *g.shape[1:])
        for part, rows in zip(parts, g.split(list(sizes)), strict=True):
            part[: rows.shape[0]] = rows
        return None, ranks.reduce_scatter(parts, sizes[ranks.rank]), None


def all_logsumexp(ranks: Ranks, row: Tensor) -> Tensor:
    """The logsumexp over all processes of values (N,), -inf among them."""
    peak = ranks.max(row.detach())
    peak = torch.where(peak == -torch.inf, 0.0, peak)
    some = row != -torch.inf
    mass: Tensor = AllReduceSum.apply(ranks, torch.where(some, torch.exp(torch.where(some, row, peak) - peak), 0.0))
    whole = mass > 0
    return torch.where(whole, torch.where(whole, mass, 1.0).log() + peak, torch.where(mass.isnan(), mass, -torch.inf))
