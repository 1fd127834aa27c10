"""Steps of CrossBatchMemory: `python -m bench memory_bank`: time over the memory's size, beside the bare products.

The GEMM bound of a step of N anchors and M entries is three products of 2 N M D flop: similarities, the same again in
backward, and the anchors' gradient, with 8,192 entries at a time so that they stay in cache. Rounds are interleaved.
Processor seconds (of all threads) stand beside seconds of the clock; they say more if other processes use the machine.
The data are tight classes, so that mining leaves few pairs, as it does once training is under way.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

import flashpair

from ..harness import machine, report
from ..harness.arguments import RUNS, add_table
from ..harness.options import label

D, CLASSES, NOISE = 128, 5000, 0.2
LOSSES = {"NTXentLoss": flashpair.NTXentLoss, "MultiSimilarityLoss": flashpair.MultiSimilarityLoss}


def embeddings(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    centres = torch.randn(CLASSES, D, generator=torch.Generator().manual_seed(1))
    labels = torch.randint(CLASSES, (n,), generator=generator)
    return centres[labels] + NOISE * torch.randn(n, D, generator=generator), labels


def full(criterion: flashpair.Criterion, size: int) -> flashpair.CrossBatchMemory:
    """A memory that holds `size` entries."""
    memory = flashpair.CrossBatchMemory(criterion, D, size)
    generator = torch.Generator().manual_seed(2)
    for first in range(0, size, 65536):
        x, labels = embeddings(min(65536, size - first), generator)
        labels, order = torch.sort(labels)
        memory.queue.evict(len(labels))
        memory.queue.append(normalize(x)[order], labels, order)
    return memory


def gemm_bound(n: int, size: int) -> Callable[[], None]:
    x, y = torch.randn(n, D), torch.randn(8192, D)
    s, dx = torch.zeros(n, 8192), torch.zeros(n, D)

    def step() -> None:
        for first in range(0, size, 8192):
            m = min(8192, size - first)
            torch.mm(x, y[:m].T, out=s[:, :m])
            torch.mm(x, y[:m].T, out=s[:, :m])
            dx.addmm_(s[:, :m], y[:m])

    return step


def training(memory: flashpair.CrossBatchMemory, n: int) -> Callable[[], None]:
    generator = torch.Generator().manual_seed(3)

    def step() -> None:
        x, labels = embeddings(n, generator)
        memory(x.requires_grad_(), labels).backward()

    return step


def measure(size: int, n: int, repeats: int) -> dict[str, dict[str, Any]]:
    steps = {"gemm_bound": gemm_bound(n, size)}
    steps |= {name: training(full(make(), size), n) for name, make in LOSSES.items()}
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    for turn in range(repeats + 1):
        for name, step in steps.items():
            start, used = time.perf_counter(), time.process_time()
            step()
            if turn:
                found[name].append((time.perf_counter() - start, time.process_time() - used))
    return {
        name: {"median": statistics.median(t for t, _ in times), "process": statistics.median(t for _, t in times)}
        for name, times in found.items()
    }


HEAD = ("M", "N", "", "step", "ps a pair", "of the GEMM bound's speed", "processor", "of the GEMM bound's")


def rows(case: dict[str, Any]) -> list[str]:
    """The table's lines of one size of memory and batch."""
    size, n, times = case["m"], case["n"], case["times"]
    base = times["gemm_bound"]
    return [
        f"| {size:,} | {n:,} | {label(name)} | {t['median'] * 1e3:,.1f} ms | {t['median'] / n / size * 1e12:,.0f} "
        f"| {base['median'] / t['median']:.2f} | {t['process'] * 1e3:,.1f} ms | {base['process'] / t['process']:.2f} |"
        for name, t in times.items()
    ]


def markdown(document: dict[str, Any]) -> str:
    lines = ["| " + " | ".join(HEAD) + " |", "|---:|---:|---|" + "---:|" * (len(HEAD) - 3)]
    lines += [line for case in document["cases"] for line in rows(case)]
    what = (
        f"A step of N embeddings against M entries, D = {document['d']}, float32. Median time by the clock and of the "
        "processor, all threads together."
    )
    return "\n".join([*lines, "", f"{what} {machine.words(document['machine'], document['threads'])}."])


def main(arguments: list[str] | None = None) -> None:
    p = argparse.ArgumentParser(prog="python -m bench memory_bank", description=__doc__.split("\n")[0])
    p.add_argument("--sizes", type=lambda t: [int(s) for s in t.split(",")], default=[10_000, 100_000, 1_000_000])
    p.add_argument("--batches", type=lambda t: [int(s) for s in t.split(",")], default=[256, 1024])
    p.add_argument("--repeats", type=int, default=5)
    p.add_argument("--threads", type=int, default=machine.cores())
    p.add_argument("--out", type=Path, default=RUNS, metavar="FOLDER", help="for the JSON (build/bench)")
    add_table(p)
    options = p.parse_args(arguments)
    if options.table:
        print(markdown(report.read(options.table)))
        return
    torch.set_num_threads(options.threads)
    document: dict[str, Any] = {"kind": "memory_bank", "machine": machine.describe(), "threads": options.threads}
    document |= {"d": D, "repeats": options.repeats, "units": "seconds of a step: the clock's, the process's"}
    document["cases"] = []
    for size in options.sizes:
        for n in options.batches:
            document["cases"].append({"m": size, "n": n, "times": measure(size, n, options.repeats)})
            print(*rows(document["cases"][-1]), sep="\n", flush=True)
    print(markdown(document))
    report.save(document, options.out / f"memory-bank-{report.stamp(document)}.json")
