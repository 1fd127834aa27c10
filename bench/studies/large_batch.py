"""Training steps of batches that do not fit memory: `python -m bench large_batch`: GradCache beside the plain step.

The encoder is a small convolutional network whose activations take about 0.2 MB an image. The loss is Multi-Similarity
with mining; a batch has four images of each class. Each way and size trains in a process of its own for some steps of
Adam. The time of each step and the memory that it adds are recorded; a falling loss shows that it learns. Before that,
gradients in float64 are checked against the plain step's with the dense reference.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import flashpair

from ..harness import machine, memory, report
from ..harness.arguments import RUNS, add_table
from ..harness.units import duration, size
from ..harness.worker import is_memory

SIDE, EMBEDDING, PER_CLASS, NOISE = 16, 128, 4, 0.5
CHECKED, ALLOWED = 512, 1e-9
WAYS = {"GradCache": "auto", "plain": "auto", "plain, dense reference": "reference"}  # with which impl of the loss


class Settings(NamedTuple):
    """A process's share: `steps` of `batch` images, embedded `micro_batch` at a time by GradCache."""

    way: str
    batch: int
    micro_batch: int
    steps: int
    threads: int
    memory_limit: int


def encoder() -> nn.Module:
    """Of images (B, 1, 16, 16) to embeddings (B, 128)."""
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(64 * SIDE**2 // 4, EMBEDDING)),
    )


def images(batch: int, seed: int) -> tuple[Tensor, Tensor]:
    """Noise around each class's picture, which is the same for every seed."""
    labels = torch.arange(batch) // PER_CLASS
    pictures = torch.randn(batch // PER_CLASS + 1, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    noise = torch.randn(batch, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))
    return pictures[labels].add_(noise, alpha=NOISE), labels


def backward(way: str, network: nn.Module, micro_batch: int, inputs: Tensor, labels: Tensor) -> float:
    """The loss, and its gradient in the network's parameters."""
    criterion = flashpair.MultiSimilarityLoss(impl=WAYS[way])
    if way == "GradCache":
        return flashpair.GradCache(network, criterion, micro_batch=micro_batch)(inputs, labels).item()
    loss = criterion(network(inputs), labels)
    loss.backward()
    return loss.item()


def train(s: Settings) -> dict[str, Any] | None:
    """Runs in a process of its own; returns None if it needs more memory than its limit."""
    torch.set_num_threads(s.threads)
    network = encoder()
    optimizer = torch.optim.Adam(network.parameters(), 1e-4)
    backward(s.way, network, s.micro_batch, *images(4 * PER_CLASS, 1))  # loads all code before anything is counted
    memory.limit_growth(s.memory_limit)
    losses: list[float] = []
    peaks: list[memory.Peak] = []
    try:
        for step in range(s.steps):
            optimizer.zero_grad()
            batch = images(s.batch, step + 1)
            peaks.append(memory.peak_of(partial(_append, losses, s, network, *batch)))
            optimizer.step()
    except (RuntimeError, MemoryError) as error:
        if is_memory(error):
            return None
        raise
    seconds = statistics.median(peak.seconds for peak in peaks)
    return {"seconds": seconds, "peak_extra_bytes": max(peak.extra for peak in peaks), "losses": losses}


def _append(losses: list[float], s: Settings, network: nn.Module, inputs: Tensor, labels: Tensor) -> None:
    losses.append(backward(s.way, network, s.micro_batch, inputs, labels))


def check(micro_batch: int) -> float:
    """The relative difference of GradCache's gradient from the plain step's with the dense reference, in float64."""
    inputs, labels = images(CHECKED, 1)
    found = []
    for way in ("GradCache", "plain, dense reference"):
        network = encoder().double()
        backward(way, network, micro_batch, inputs.double(), labels)
        found.append(torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None]))
    off = ((found[0] - found[1]).norm() / found[1].norm()).item()
    if not off < ALLOWED:
        raise SystemExit(f"GradCache's gradient is off by {off:.1e}: nothing is timed")
    return off


def markdown(document: dict[str, Any]) -> str:
    """One row a batch, one column a way to train."""
    lines = ["| images in a step | " + " | ".join(WAYS) + " |", "|---:|" + "---:|" * len(WAYS)]
    found = {(case["batch"], case["way"]): case["found"] for case in document["cases"]}
    over = f"over {size(document['memory_limit'])}"
    for batch in dict.fromkeys(case["batch"] for case in document["cases"]):
        cells = [
            over if (f := found[batch, way]) is None else f"{duration(f['seconds'])}, {size(f['peak_extra_bytes'])}"
            for way in WAYS
        ]
        lines.append(f"| {batch:,} | {' | '.join(cells)} |")
    what = f"Median time of a step, and memory beyond the images; {document['micro_batch']} images in a micro-batch."
    return "\n".join([*lines, "", f"{what} {machine.words(document['machine'], document['threads'])}."])


def main(arguments: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(prog="python -m bench large_batch", description=__doc__.split("\n")[0])
    p.add_argument("--batches", type=lambda t: [int(s) for s in t.split(",")], default=[4096, 16384, 65536])
    p.add_argument("--micro-batch", type=int, default=256)
    p.add_argument("--steps", type=int, default=3)
    p.add_argument("--threads", type=int, default=machine.cores())
    p.add_argument("--memory-limit", type=float, default=8.0, help="GB that a step may take (8)")
    p.add_argument("--out", type=Path, default=RUNS / "large-batch.json")
    add_table(p)
    given = p.parse_args(arguments)
    if given.table:
        print(markdown(report.read(given.table)))
        return 0
    limit = int(given.memory_limit * 1e9)
    document: dict[str, Any] = {
        "what": "flashpair bench: training steps of large batches", "machine": machine.describe(),
        "units": "seconds of a step, the median; bytes beyond what was resident before it; each step's loss",
        "threads": given.threads, "micro_batch": given.micro_batch, "steps": given.steps, "memory_limit": limit,
        "gradient_error": check(given.micro_batch), "cases": [],
    }  # fmt: skip
    table = Table("batch", "way", "a step", "memory", "loss", box=None)
    for batch in given.batches:
        for way in WAYS:
            s = Settings(way, batch, given.micro_batch, given.steps, given.threads, limit)
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
                found = process.submit(train, s).result()
            document["cases"].append({"batch": batch, "way": way, "found": found})
            if found is None:
                table.add_row(f"{batch:,}", way, "", f"over {size(limit)}")
                continue
            losses = " ".join(f"{loss:.3f}" for loss in found["losses"])
            table.add_row(f"{batch:,}", way, duration(found["seconds"]), size(found["peak_extra_bytes"]), losses)
    report.save(document, given.out)
    Console(width=max(100, Console().width)).print(table)
    return 0
