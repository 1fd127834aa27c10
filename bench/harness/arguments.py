"""Command-line arguments that the benchmarks share, and the Options they make."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import torch

from . import machine
from .options import GB, VARIANTS, Options

ALIASES = {"pml": "pytorch-metric-learning"}
RESULTS = Path(__file__).resolve().parents[1] / "results"  # one JSON for each published table
RUNS = RESULTS.parents[1] / "build" / "bench"  # where all other runs go
PICTURES = RESULTS.parents[1] / "docs" / "pictures"
SHARE_OF_MEMORY = 0.85


def numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(sorted({int(part) for part in text.replace("_", "").split(",")}))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"takes whole numbers with commas between them, got {text!r}") from error


def names(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(ALIASES.get(part.strip(), part.strip()) for part in text.split(",")))


def add_common(p: argparse.ArgumentParser, default: Options) -> None:
    p.add_argument("--repeats", type=int, default=default.repeats, help="timed rounds")
    p.add_argument("--warmup", type=int, default=default.warmup, help="rounds before them")
    p.add_argument(
        "--time-limit", type=float, default=default.time_limit, metavar="S", help="seconds a variant may take"
    )
    p.add_argument(
        "--memory-limit",
        type=float,
        metavar="GB",
        help="what a step may add, 10^9 bytes (85 %% of the machine)",
    )
    p.add_argument("--threads", type=int, default=torch.get_num_threads())
    p.add_argument("--seed", type=int, default=default.seed)
    p.add_argument("--out", type=Path, default=RUNS, metavar="FOLDER", help="for the JSON and the PNG (build/bench)")


def add_batches(p: argparse.ArgumentParser, default: Options) -> None:
    p.add_argument("--sizes", type=numbers, default=default.sizes, metavar="N,N", help="batch sizes")
    p.add_argument("--dims", type=numbers, default=default.dims, metavar="D,D", help="embedding widths")
    p.add_argument("--per-class", type=int, default=default.per_class, help="samples of each class")
    p.add_argument("--variants", type=names, default=default.variants, help=f"{', '.join(VARIANTS)}, module:function")


def add_table(p: argparse.ArgumentParser) -> None:
    p.add_argument("--table", type=Path, metavar="FILE.json", help="only print this file's Markdown table")


def options_of(p: argparse.ArgumentParser, given: dict[str, Any]) -> Options:
    """The Options of parsed arguments; sets torch's threads. Exits with an error if the Options are invalid."""
    limit = given["memory_limit"]
    try:
        whole = machine.gpu_bytes() if given.get("device") == "cuda" else machine.memory_bytes()
        options = Options.of({**given, "memory_limit": int(SHARE_OF_MEMORY * whole if limit is None else limit * GB)})
    except ValueError as error:
        p.error(str(error))
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # as in the workers: no process beside what is timed
    torch.set_num_threads(options.threads)
    return options
