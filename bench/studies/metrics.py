"""Retrieval metrics of a large test set: `python -m bench metrics`, by default of the size of Stanford Online Products.

The metrics are checked first, on some of the queries, against a dense float64 ranking. Beside them are timed: the same
ranks by blocks of torch.mm and torch.topk, as they are usually computed, and one bare product, the GEMM bound.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flashpair import metrics

from ..harness import machine, memory, report
from ..harness.arguments import RUNS, add_table
from ..harness.units import duration, size

BLOCK = 2**25  # similarities at a time
CHECKED = 256  # queries


def embeddings(n: int, d: int, per_class: int) -> tuple[Tensor, Tensor]:
    """Unit rows (n, d) float32, in clusters that retrieve most of their class; labels (n,)."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(n) // per_class
    centres = torch.randn(int(labels[-1]) + 1, d, generator=generator)
    x = centres[labels] + torch.randn(n, d, generator=generator)
    return torch.nn.functional.normalize(x, dim=1), labels


def blocks(x: Tensor) -> Any:
    """The rows (B, n) of all similarities, the own one -inf, a block at a time."""
    rows = max(1, BLOCK // len(x))
    for first in range(0, len(x), rows):
        z = x[first : first + rows] @ x.T
        z.diagonal(first).fill_(-math.inf)
        yield slice(first, first + len(z)), z


def by_topk(x: Tensor, labels: Tensor, depth: int) -> Tensor:
    """Whether each of a query's nearest references is of its class (n, depth)."""
    return torch.cat([labels[z.topk(depth, dim=1).indices] == labels[rows, None] for rows, z in blocks(x)])


def product(x: Tensor) -> None:
    for _ in blocks(x):
        pass


def right(x: Tensor, labels: Tensor, ks: tuple[int, ...]) -> bool:
    """Whether the scores of some queries equal a dense float64 ranking's, except where float32 has ties."""
    some = torch.randperm(len(x), generator=torch.Generator().manual_seed(1))[:CHECKED]
    scores = metrics.query_scores(x, labels, depth=max(ks))
    z = x[some].double() @ x.double().T
    z[torch.arange(len(some)), some] = -math.inf
    hits = labels[z.argsort(dim=1, descending=True, stable=True)] == labels[some, None]
    r = scores.relevant[some]
    ranks = torch.arange(1, hits.shape[1] + 1)
    inside = hits & (ranks <= r[:, None])
    map_at_r = (inside.cumsum(1).double() / ranks * inside).sum(1) / r
    same = (scores.map_at_r[some] - map_at_r).abs() < 1e-12
    return bool(same.double().mean() > 0.98)


def markdown(document: dict[str, Any]) -> str:
    lines = ["| | time | memory |", "|---|---:|---:|"]
    for name, of in document["found"].items():
        lines.append(f"| {name} | {duration(of['seconds'])} | {size(of['peak_extra_bytes'])} |")
    n = f"{document['n']:,}"
    what = f"{n} embeddings against one another, D = {document['d']}, {document['per_class']} a class, float32."
    return "\n".join([*lines, "", f"{what} {machine.words(document['machine'], document['machine']['cores'])}."])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench metrics", description=__doc__)
    parser.add_argument("-n", type=int, default=60_000)
    parser.add_argument("-d", type=int, default=128)
    parser.add_argument("--per-class", type=int, default=5)
    parser.add_argument("--recall-at", default="1,10,100,1000")
    parser.add_argument("--out", type=Path, default=RUNS / "metrics.json")
    add_table(parser)
    given = parser.parse_args(arguments)
    if given.table:
        print(markdown(report.read(given.table)))
        return 0
    ks = tuple(int(k) for k in given.recall_at.split(","))
    x, labels = embeddings(given.n, given.d, given.per_class)
    if not right(x, labels, ks):
        raise SystemExit("the scores differ from a dense float64 ranking's: nothing is timed")
    deep = max(ks)
    jobs = {
        f"P@1, R-Precision, MAP@R, Recall@{deep}": lambda: metrics.retrieval(x, labels, recall_at=ks),
        "P@1, R-Precision, MAP@R": lambda: metrics.retrieval(x, labels, recall_at=()),
        "VRF, 1 and 71 negatives": lambda: metrics.verification_rate(x, labels, negatives=(1, 71)),
        "5-NN accuracy": lambda: metrics.knn_accuracy(x, labels, k=5),
        f"torch.mm and topk, {deep} deep": lambda: by_topk(x, labels, deep),
        f"torch.mm and topk, {given.per_class - 1} deep": lambda: by_topk(x, labels, given.per_class - 1),
        "GEMM bound: one product": lambda: product(x),
    }
    found: dict[str, dict[str, float]] = {}
    for name, job in jobs.items():
        start = time.perf_counter()
        peak = memory.peak_of(job)
        found[name] = {"seconds": time.perf_counter() - start, "peak_extra_bytes": peak.extra}
    resident = memory.status_bytes("VmHWM")
    document = {
        "what": "flashpair bench: retrieval metrics of a test set against itself", "machine": machine.describe(),
        "units": "seconds; bytes beyond what was resident before; process_bytes: the process's peak, whatever ran last",
        **{name: getattr(given, name) for name in ("n", "d", "per_class", "recall_at")},
        "process_bytes": resident, "found": found,
    }  # fmt: skip
    report.save(document, given.out)
    print(markdown(document))
    return 0
