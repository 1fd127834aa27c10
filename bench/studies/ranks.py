"""Processes that share a batch, beside one process that has all of it: `python -m bench ranks`.

All processes run from the start, each with one core and one thread. In each round, one of them computes the whole batch
while the others wait. Then some or all of them compute it together, once with each schedule. So a machine that slows
down slows all variants. Before anything is timed, loss and gradient of each variant are checked against float64
(check.py). The peak memory of a process and its traffic (traffic.py) stand beside the times. `--table FILE.json` only
prints the table, `--counts FILE.json` only prints what was counted beside docs/scaling.md's formulas.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from functools import partial
from pathlib import Path

from ..harness import machine, report
from ..harness.arguments import add_common, add_table, names, numbers, options_of
from ..harness.options import DATA, Options
from . import ranks_report
from .ranks_work import Plan, work
from .traffic import PASSES

LOSSES = ("ms", "ntxent")


def some_losses(text: str) -> tuple[str, ...]:
    found = names(text)
    if unknown := [name for name in found if name not in PASSES]:
        raise argparse.ArgumentTypeError(f"takes {', '.join(PASSES)}, got {', '.join(unknown)}")
    return found


def some_worlds(text: str) -> tuple[int, ...]:
    found = tuple(sorted({1, *numbers(text)}))
    if found[0] < 1:
        raise argparse.ArgumentTypeError(f"takes numbers of processes, got {text!r}")
    return found


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m bench ranks", description=__doc__.split("\n")[0])
    default, cores = Options(1, 1), min(4, machine.cores())
    p.add_argument("--n", type=int, default=16384, help="of the global batch")
    p.add_argument("--dim", type=int, default=128, help="embedding width")
    p.add_argument("--per-class", type=int, default=default.per_class, help="samples of each class")
    p.add_argument("--losses", type=some_losses, default=LOSSES, help=", ".join(PASSES))
    p.add_argument(
        "--worlds", type=some_worlds, default=tuple(range(1, cores + 1)), metavar="W,W",
        help="processes (as many as there are cores, up to 4)",
    )  # fmt: skip
    p.add_argument("--data", choices=DATA, default=default.data, help="trained: mining leaves few pairs")
    add_common(p, default)
    add_table(p)
    p.add_argument("--counts", type=Path, metavar="FILE.json", help="only print what it counted, beside the formulas")
    return p


def tell(what: str) -> None:
    print(what, file=sys.stderr, flush=True)


def save(folder: Path, document: report.Document) -> None:
    print(report.write(document, folder), flush=True)


def main(arguments: list[str] | None = None) -> None:
    import torch.multiprocessing as mp

    p = parser()
    given = vars(p.parse_args(arguments))
    if given["table"]:
        print(ranks_report.markdown(report.read(given["table"])))
        return
    if given["counts"]:
        print(ranks_report.counts(report.read(given["counts"])))
        return
    options = options_of(p, {**given, "sizes": (given["n"],), "dims": (given["dim"],), "threads": 1, "loss": "ms"})
    plan = Plan(options, given["losses"], given["worlds"])
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        where = Path(folder, "meeting").as_uri()
        mp.spawn(work, (plan, where, partial(save, given["out"]), tell), nprocs=max(plan.worlds))
    made = max(given["out"].glob("*-ranks-*.json"), key=lambda path: path.stat().st_mtime)
    print(ranks_report.markdown(report.read(made)))
