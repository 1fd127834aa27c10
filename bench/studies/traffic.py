"""Counts the traffic of one process: the bytes that flashpair.distributed passes to torch.distributed, and the pairs.

A collective counts as what its bandwidth-optimal algorithm sends. With W processes, an all-gather of B bytes from each
sends (W - 1) B, a reduce-scatter of B bytes to each sends the same, and an all-reduce of B bytes sends 2 (W - 1) / W B.
(gloo, on CPUs, may send more: its reduce-scatter is an all-reduce.)
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

from torch import Tensor

from flashpair.chunked.reduce import ChunkedCall
from flashpair.core.problem import Problem
from flashpair.distributed.collectives import RING, Ranks


class Traffic:
    """Bytes by kind: all_gather, reduce_scatter, all_reduce, and between two processes ring and home (sent back).

    Also the number of chunks, and of their pairs. A pair that serves both its ends counts once.
    """

    def __init__(self) -> None:
        self.bytes: dict[str, float] = {}
        self.calls: dict[str, int] = {}
        self.pairs = {"forward": 0.0, "backward": 0.0}
        self.chunks = {"forward": 0, "backward": 0}

    def add(self, what: str, count: float) -> None:
        self.bytes[what] = self.bytes.get(what, 0.0) + count
        self.calls[what] = self.calls.get(what, 0) + 1

    def record(self) -> dict[str, Any]:
        return {
            "bytes": round(sum(self.bytes.values())),
            "by_kind": self.bytes,
            "calls": self.calls,
            "pairs": self.pairs,
            "chunks": self.chunks,
        }


@contextlib.contextmanager
def counted() -> Iterator[Traffic]:
    """Counts this process's traffic while it is open."""
    traffic = Traffic()
    gathered, reduce_scatter, total, most, sendrecv = (
        Ranks._gathered, Ranks.reduce_scatter, Ranks.sum, Ranks.max, Ranks.sendrecv,
    )  # fmt: skip

    def gather(self: Ranks, mine: Tensor) -> list[Tensor]:
        traffic.add("all_gather", (self.world - 1) * mine.nbytes)
        return gathered(self, mine)

    def scatter(self: Ranks, rows: Tensor, size: int) -> Tensor:
        traffic.add("reduce_scatter", (self.world - 1) * rows[0].nbytes)
        return reduce_scatter(self, rows, size)

    def reduce(of: Any) -> Any:
        def run(self: Ranks, values: Tensor) -> Tensor:
            traffic.add("all_reduce", 2 * (self.world - 1) / self.world * values.nbytes)
            return of(self, values)

        return run

    def hand(self: Ranks, out: Tensor, to: int, into: Tensor, source: int, tag: int) -> Any:
        traffic.add("ring" if tag == RING else "home", out.nbytes)
        return sendrecv(self, out, to, into, source, tag)

    def met(way: str, of: Any) -> Any:
        def run(self: ChunkedCall, p: Problem, *rest: Any) -> Any:
            traffic.chunks[way] += 1
            traffic.pairs[way] += p.pairs / (2 if p.y is None else 1)
            return of(self, p, *rest)

        return run

    passes = {"forward": met("forward", ChunkedCall.forward), "backward": met("backward", ChunkedCall.backward)}
    with (
        mock.patch.multiple(
            Ranks, _gathered=gather, reduce_scatter=scatter, sum=reduce(total), max=reduce(most), sendrecv=hand
        ),
        mock.patch.multiple(ChunkedCall, **passes),
    ):
        yield traffic


# For each pass of a loss over the references, forward and backward: how many numbers of an anchor are sent with its
# row, and how many other processes compute for it and send back. Multi-Similarity's windows are vectors. In NT-Xent the
# first logsumexp is the second pass's offset, whose gradient is sent back. A logsumexp is three numbers.
PASSES = {
    "ms": (((0, 1), (2, 4), (1, 3)), ((10, 0),)),
    "ms_weighting": (((0, 6),), ((8, 0),)),
    "ntxent": (((0, 3), (1, 1)), ((3, 1), (4, 0))),
}


def formula(schedule: str, loss: str, world: int, n: int, d: int, itemsize: int) -> float:
    """The traffic of one of `world` processes with n rows each by docs/scaling.md, labels included. It leaves out only
    single numbers, a few bytes."""
    forward, backward = PASSES[loss]
    apart, steps = (world - 1) / 2, world // 2
    row, number, labels = n * d * itemsize, n * itemsize, (world - 1) * n * 8
    home = labels + sum(apart * found * number for _, found in (*forward, *backward))
    if schedule == "ring":
        round_ = sum(steps * (row + along * number) for along, _ in (*forward, *backward))
        return round_ + home + len(backward) * apart * row
    gathered = (world - 1) * (row + sum(along * number for along, _ in (*forward, *backward)))
    return gathered + home + len(backward) * (world - 1) * row
