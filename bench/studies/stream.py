"""A loss against references on disk that do not fit memory: `python -m bench stream`.

It writes unit vectors around class centres to a file. A process of its own then computes the loss of some anchors
against all of them, and the anchors' gradient, with a progress bar. The study reports its time, the peak memory of the
whole process, and the time of the bare products. Before that, the first references are checked against float64 all at
once.
"""

from __future__ import annotations

import argparse
import multiprocessing
import tempfile
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

import flashpair
from flashpair import StreamedReferences

from ..harness import machine, report
from ..harness.arguments import add_table
from ..harness.memory import status_bytes
from ..harness.units import duration, size

LOSSES = {
    "ntxent": lambda impl: flashpair.NTXentLoss(impl=impl),
    "ms": lambda impl: flashpair.MultiSimilarityLoss(impl=impl),
    "ms_weighting": lambda impl: flashpair.MultiSimilarityLoss(epsilon=None, impl=impl),
}
A_CLASS, CHECKED, WRITTEN, TIMED = 100, 50_000, 2**18, 16_384  # rows
OF_ANCHORS = 2**31 - 1  # a seed that no block uses
NOISE = 0.5


class Settings(NamedTuple):
    """anchors (N, D) against refs (M, D); each of `losses` in a process of its own."""

    anchors: int
    refs: int
    dim: int
    losses: tuple[str, ...]
    progress: bool


def write(path: Path, s: Settings) -> None:
    bank = np.memmap(path, np.float32, "w+", shape=(s.refs, s.dim))
    for first in range(0, s.refs, WRITTEN):
        rows = torch.arange(first, min(first + WRITTEN, s.refs))
        bank[first : first + len(rows)] = _embedded(rows // A_CLASS, s.dim, first).numpy()
    bank.flush()


def _embedded(labels: Tensor, dim: int, seed: int) -> Tensor:
    """Unit vectors near the centres of their classes; a formula gives the centres."""
    centre = torch.sin((labels[:, None] + 1.0) * (torch.arange(dim) + 1.0) * 0.7548776662)
    noise = torch.randn(len(labels), dim, generator=torch.Generator().manual_seed(seed))
    unit = torch.nn.functional.normalize(centre)
    return torch.nn.functional.normalize(unit + NOISE * noise / dim**0.5)


def batch(s: Settings) -> tuple[Tensor, Tensor]:
    labels = torch.arange(s.anchors) // 4 * max(1, s.refs // A_CLASS // max(1, s.anchors // 4))
    return _embedded(labels, s.dim, OF_ANCHORS), labels


def check(bank: Any, labels: Tensor, s: Settings, loss: str) -> None:
    """Compares value and gradient of 256 anchors against the first references with float64, to float32's accuracy."""
    x, x_labels = batch(s)
    x, x_labels, count = x[:256], x_labels[:256] % max(1, CHECKED // A_CLASS), min(CHECKED, s.refs)
    found = []
    for impl, dtype in (("auto", torch.float32), ("reference", torch.float32), ("reference", torch.float64)):
        a = x.to(dtype).requires_grad_()
        y = torch.from_numpy(np.array(bank[:count])).to(dtype)
        if impl == "auto":
            value = LOSSES[loss](impl)(a, x_labels, ref_emb=StreamedReferences(y, labels[:count], block=7000))
        else:
            value = LOSSES[loss](impl)(a, x_labels, ref_emb=y, ref_labels=labels[:count])
        found.append((value.detach(), torch.autograd.grad(value, a)[0]))
    for ours, eager, truth in zip(*found, strict=True):
        off, bound = (((t.double() - truth).norm() / truth.norm()).item() for t in (ours, eager))
        if off > 2 * (bound + torch.finfo(torch.float32).eps):
            raise RuntimeError(f"{loss}: off by {off:.1e}, eager float32 by {bound:.1e}")


def measure(path: str, s: Settings, loss: str, results: Any) -> None:
    """In a process of its own."""
    before = status_bytes("VmHWM")
    bank = np.memmap(path, np.float32, "r", shape=(s.refs, s.dim))
    labels = torch.arange(s.refs) // A_CLASS
    x, x_labels = batch(s)
    x.requires_grad_()
    start = time.perf_counter()
    value = LOSSES[loss]("auto")(x, x_labels, ref_emb=StreamedReferences(bank, labels, progress=s.progress))
    middle = time.perf_counter()
    value.backward()
    end, peak = time.perf_counter(), status_bytes("VmHWM")
    check(bank, labels, s, loss)
    y = torch.randn(TIMED, s.dim)
    out, dx = torch.empty(s.anchors, TIMED), torch.empty(s.anchors, s.dim)
    bounds = []
    for _ in range(4):
        begin = time.perf_counter()
        torch.mm(x.detach(), y.T, out=out)
        torch.mm(x.detach(), y.T, out=out)
        torch.mm(out, y, out=dx)
        bounds.append(time.perf_counter() - begin)
    results.put(
        {
            "loss": loss, "value": value.item(), "forward_seconds": middle - start, "backward_seconds": end - middle,
            "peak_bytes": peak, "bytes_at_start": before, "gemm_bound_seconds": sorted(bounds[1:])[1] * s.refs / TIMED,
        }
    )  # fmt: skip


def run(s: Settings, folder: Path) -> dict[str, Any]:
    path = folder / "bank.f32"
    write(path, s)
    found = []
    for loss in s.losses:
        load, context = machine.OtherLoad(), multiprocessing.get_context("spawn")
        results = context.Queue()
        process = context.Process(target=measure, args=(str(path), s, loss, results))
        process.start()
        while process.is_alive() and results.empty():
            time.sleep(0.05)
        if results.empty():
            raise RuntimeError(f"{loss}: the process ended with {process.exitcode}")
        found.append({**results.get(), "other_cores_busy_or_ours": load.cores()})
        process.join()
    return {
        "kind": "stream", "settings": s._asdict(), "bank_bytes": path.stat().st_size, "machine": machine.describe(),
        "threads": torch.get_num_threads(), "results": found,
    }  # fmt: skip


def markdown(document: dict[str, Any]) -> str:
    s = document["settings"]
    lines = ["| loss | forward | gradient | GEMM bound | peak of the whole process |", "|---|---:|---:|---:|---:|"]
    for r in document["results"]:
        ahead, back, bound = (duration(r[k]) for k in ("forward_seconds", "backward_seconds", "gemm_bound_seconds"))
        lines.append(f"| {r['loss']} | {ahead} | {back} | {bound} | {size(r['peak_bytes'])} |")
    lines.append("")
    lines.append(
        f"{s['anchors']:,} anchors against {s['refs']:,} references of D = {s['dim']} "
        f"({size(document['bank_bytes'])} on disk), float32. {machine.words(document['machine'], document['threads'])}."
    )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    p = argparse.ArgumentParser(prog="python -m bench stream", description=__doc__.split("\n")[0])
    p.add_argument("--anchors", type=int, default=4096)
    p.add_argument("--refs", type=int, default=10_000_000)
    p.add_argument("--dim", type=int, default=64)
    p.add_argument("--losses", nargs="+", choices=LOSSES, default=["ntxent"])
    p.add_argument("--folder", type=Path, help="where the references are written (a temporary one)")
    p.add_argument("--out", type=Path, help="a folder for the JSON")
    add_table(p)
    given = p.parse_args(arguments)
    if given.table:
        print(markdown(report.read(given.table)))
        return
    s = Settings(given.anchors, given.refs, given.dim, tuple(given.losses), True)
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        document = run(s, Path(folder))
    print(markdown(document))
    if given.out is not None:
        stamp = datetime.now(timezone.utc).strftime("%Y%m%d-%H%M%S")
        report.save(document, given.out / f"stream-{'-'.join(s.losses)}-{stamp}.json")
