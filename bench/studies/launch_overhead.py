"""What a call of `onchip` costs the CPU beside the launch: `python -m bench launch_overhead`. Needs no GPU.

The launch is replaced by a function that does nothing, on CPU tensors. An autograd.Function that only passes on a
gradient
is timed beside it: that is torch's own part. On a GPU, backward runs on another thread, which adds the same to both.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import flashpair
from flashpair.backends import extension
from flashpair.backends.cuda import onchip
from flashpair.engine import small_batch

CALLS, ROUNDS = 2000, 15


class _NoLaunch:
    workspace = 256

    def __init__(self, *arguments: Any) -> None:
        pass

    def __call__(self, *arguments: Any) -> None:
        pass


class _NoKernel:
    emulated = True
    Launch = _NoLaunch

    @staticmethod
    def limits(device: int) -> tuple[int, int, bool]:
        return 132, 227 * 1024, True


class _Nothing(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(torch.empty_like(x))
        return x.new_empty(())

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (gradient,) = ctx.saved_tensors
        return gradient * g


def measure(calls: int = CALLS, rounds: int = ROUNDS) -> dict[str, float]:
    """Microseconds of forward and backward: medians of interleaved rounds."""
    x, labels = torch.zeros(8, 4, requires_grad=True), torch.arange(8) // 4
    criterion = flashpair.MultiSimilarityLoss(impl="onchip")
    dense = flashpair.MultiSimilarityLoss(impl="reference")

    def step(loss: Callable[[], Tensor]) -> Callable[[], None]:
        def run() -> None:
            x.grad = None
            loss().backward()

        return run

    steps = {
        "onchip": step(lambda: criterion(x, labels)),
        "autograd.Function": step(lambda: _Nothing.apply(x)),
        "dense eager code": step(lambda: dense(x, labels)),
    }
    found: dict[str, list[float]] = {name: [] for name in steps}
    caches = (onchip._limits, small_batch._compiled_plan, onchip._launch)
    with (
        mock.patch.object(extension, "onchip", lambda: _NoKernel),
        mock.patch.object(extension, "emulated", lambda: True),
    ):
        for cache in caches:
            cache.cache_clear()
        for turn in range(rounds + 1):
            for name, run in steps.items():
                count = calls if name != "dense eager code" else calls // 10
                start = time.perf_counter()
                for _ in range(count):
                    run()
                if turn:
                    found[name].append((time.perf_counter() - start) / count * 1e6)
    for cache in caches:
        cache.cache_clear()
    return {name: statistics.median(times) for name, times in found.items()}


def main(arguments: list[str] | None = None) -> None:
    argparse.ArgumentParser(prog="python -m bench launch_overhead", description=__doc__.split("\n")[0]).parse_args(
        arguments
    )
    torch.set_num_threads(1)
    for name, microseconds in measure().items():
        print(f"{name}: {microseconds:.0f} µs")
