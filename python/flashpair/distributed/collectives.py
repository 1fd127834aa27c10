"""The processes that share a batch, and their communication, which uses torch.distributed's collectives only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..core.chunks import only_once

RING, RETURN = 1, 2  # message tags: a chunk that goes round the ring, and results that go back to a chunk's process


class Ranks:
    """A process group, seen from one of its processes.

    Attributes:
        rank: the number of this process in the group.
        world: the number of processes.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self.group = group
        self.rank, self.world = dist.get_rank(group), dist.get_world_size(group)

    def rank_at(self, distance: int) -> int:
        """The rank that is `distance` further in the ring."""
        return (self.rank + distance) % self.world

    @property
    def device(self) -> torch.device:
        """The device of this group's messages, for a process that has no tensor to tell it."""
        nccl = "nccl" in dist.get_backend(self.group)
        return torch.device("cuda", torch.cuda.current_device()) if nccl else torch.device("cpu")

    def all_gather_ints(
        self, facts: Sequence[int], device: torch.device, last: Tensor | None = None
    ) -> list[list[int]]:
        """Some integers of every process. The host waits for them.

        Args:
            facts: this process's integers, as many on each process.
            device: where to send them from.
            last: () int64, one more integer, which is on the device.
        """
        own = torch.tensor(facts, dtype=torch.int64, device=device)
        if last is not None:
            own = torch.cat([own, last[None]])
        return [t.tolist() for t in self._gathered(own)]

    def all_gather_text(self, text: str, device: torch.device) -> list[str]:
        """The text of every process."""
        encoded = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).to(device)
        sizes = [size for (size,) in self.all_gather_ints([encoded.shape[0]], device)]
        return [bytes(t.tolist()).decode() for t in self.gather(encoded, sizes)]

    def _gathered(self, own: Tensor) -> list[Tensor]:
        """Every process's tensor, all of one shape."""
        every = [torch.empty_like(own) for _ in range(self.world)]
        dist.all_gather(every, own, group=self.group)
        return every

    def gather(self, rows: Tensor, sizes: Sequence[int]) -> list[Tensor]:
        """Every process's rows (n_r, ...). They are padded to one size for the way.

        Args:
            rows: (n, ...), this process's rows.
            sizes: n_r of every process.
        """
        padded = rows.new_zeros(max(sizes), *rows.shape[1:])
        padded[: rows.shape[0]] = rows
        return [t[:size] for t, size in zip(self._gathered(padded), sizes, strict=True)]

    def reduce_scatter(self, rows: Tensor, size: int) -> Tensor:
        """The sum over all processes of the rows that they have for this one: the first `size` of them.

        rows: (W, m, ...), for each process rows, padded to m.
        """
        out = torch.empty_like(rows[0])
        dist.reduce_scatter(out, list(rows.unbind(0)), group=self.group)
        return out[:size]

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all processes of tensors of one shape."""
        total = values.clone().contiguous()
        dist.all_reduce(total, group=self.group)
        return total

    def max(self, values: Tensor) -> Tensor:
        """The maximum over all processes of tensors of one shape."""
        most = values.clone().contiguous()
        dist.all_reduce(most, op=dist.ReduceOp.MAX, group=self.group)
        return most

    def most_of_all(self, counts: Tensor) -> int:
        """The largest of the counts (n,) of all processes, at least 1. The host waits for it."""
        return int(self.max(torch.cat([counts, counts.new_ones(1)]).max()))

    def sendrecv(self, out: Tensor, to: int, into: Tensor, source: int, tag: int) -> Transfer:
        """Starts to send `out` to one process, and to receive `into` from another. Empty tensors are not sent.

        Args:
            out: what to send.
            to: the rank that gets it.
            into: a tensor of the shape of what comes.
            source: the rank that sends it.
            tag: `RING` or `RETURN`.
        """
        ops = []
        if out.numel():
            ops.append(dist.P2POp(dist.isend, out, self._global(to), self.group, tag))
        if into.numel():
            ops.append(dist.P2POp(dist.irecv, into, self._global(source), self.group, tag))
        return Transfer(dist.batch_isend_irecv(ops) if ops else [], out, into)

    def _global(self, rank: int) -> int:
        """The global rank of a rank of the group."""
        return rank if self.group is None else dist.get_global_rank(self.group, rank)


class Transfer:
    """A transfer that has started. It keeps the memory of both tensors alive until it is over."""

    def __init__(self, work: Sequence[Any], out: Tensor, into: Tensor) -> None:
        self.work, self.out, self.into = work, out, into

    def wait(self) -> Tensor:
        """The received tensor, once it is there."""
        for request in self.work:
            request.wait()
        return self.into


class AllReduceSum(torch.autograd.Function):
    """The sum of every process's values.

    The loss is the sum of the processes' shares, and each share may depend on this sum. So the values' gradient is the
    sum of the gradients that the processes have.
    """

    @staticmethod
    def forward(ctx: Any, ranks: Ranks, values: Tensor) -> Tensor:
        ctx.ranks = ranks
        return ranks.sum(values)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[None, Tensor]:
        only_once()
        return None, ctx.ranks.sum(g)


class AllReduceGrad(torch.autograd.Function):
    """A tensor that is the same on every process. Its gradient is the sum of the processes' gradients."""

    @staticmethod
    def forward(ctx: Any, ranks: Ranks, value: Tensor) -> Tensor:
        ctx.ranks = ranks
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[None, Tensor]:
        only_once()
        return None, ctx.ranks.sum(g)


class ScaleGrad(torch.autograd.Function):
    """A tensor whose gradient is multiplied by a number."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, by: float) -> Tensor:
        ctx.by = by
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return g * ctx.by, None


class AllGatherRows(torch.autograd.Function):
    """The rows (n_r, D) of all processes, one after the other. Gradients are summed on the process of the row."""

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
    """The logsumexp over processes of each entry of row (N,); entries may be -inf."""
    top = ranks.max(row.detach())
    top = torch.where(top == -torch.inf, 0.0, top)
    some = row != -torch.inf
    sums: Tensor = AllReduceSum.apply(ranks, torch.where(some, torch.exp(torch.where(some, row, top) - top), 0.0))
    positive = sums > 0
    empty = torch.where(sums.isnan(), sums, -torch.inf)
    return torch.where(positive, torch.where(positive, sums, 1.0).log() + top, empty)
