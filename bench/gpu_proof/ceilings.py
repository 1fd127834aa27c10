"""Stage: what a large product and a large copy reach on this machine, the two numbers that times are held against."""

from __future__ import annotations

import statistics

import torch

from .accelerator import Accelerator, accelerator, stand_in
from .child import Skip, Stage
from .machine import smi

DTYPES = (torch.bfloat16, torch.float32)


def product(gpu: Accelerator, side: int, rounds: int, dtype: torch.dtype) -> float:
    """Median flop a second of a square product of random numbers."""
    a, b = (torch.randn(side, side, device=gpu.device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    for _ in range(3):
        torch.mm(a, b, out=out)
    times = [gpu.seconds(lambda: torch.mm(a, b, out=out)) for _ in range(rounds)]
    return 2 * side**3 / statistics.median(times)


def copy(gpu: Accelerator, size: int, rounds: int) -> float:
    """Median bytes a second, read and written, of a copy from the device's memory to itself."""
    source = torch.empty(size, dtype=torch.uint8, device=gpu.device).random_()
    target = torch.empty_like(source)
    target.copy_(source)
    times = [gpu.seconds(lambda: target.copy_(source)) for _ in range(rounds)]
    return 2 * size / statistics.median(times)


def run(stage: Stage) -> None:
    gpu, by = accelerator(stage.plan, stage.work), stand_in(stage.plan)
    side, size, rounds = stage.plan.ceiling
    for dtype in DTYPES:
        name = str(dtype).removeprefix("torch.")
        stage.say(ceiling=f"product {name}", flop_per_second=product(gpu, side, rounds, dtype), side=side, **by)
    torch.set_float32_matmul_precision("high")
    stage.say(ceiling="product tf32", flop_per_second=product(gpu, side, rounds, torch.float32), side=side, **by)
    stage.say(ceiling="copy", bytes_per_second=copy(gpu, size, rounds), bytes=size, **by)
    try:
        stage.say(ceiling="clocks", after=smi(), **by)
    except Skip as why:
        stage.say(part="clocks", skipped=str(why))
