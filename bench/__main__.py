"""The command line: `python -m bench`, `--plot FILE.json`, `--table FILE.json`."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch

from . import machine, plot, report, suite
from .options import DATA, DEFAULT, DEVICES, DTYPES, GB, LOSSES, PHASES, VARIANTS, Options
from .progress import Progress

ALIASES = {"pml": "pytorch-metric-learning"}
RESULTS = Path(__file__).resolve().parent / "results"
SHARE_OF_MEMORY = 0.85


def numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(sorted({int(part) for part in text.replace("_", "").split(",")}))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"takes whole numbers with commas between them, got {text!r}") from error


def names(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(ALIASES.get(part.strip(), part.strip()) for part in text.split(",")))


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m bench", description="Time and memory of one training step, against peers."
    )
    default = Options(memory_limit=1, threads=1)
    p.add_argument("--loss", choices=LOSSES, default=default.loss)
    p.add_argument("--sizes", type=numbers, default=default.sizes, metavar="N,N", help="batch sizes")
    p.add_argument("--dims", type=numbers, default=default.dims, metavar="D,D", help="embedding widths")
    p.add_argument("--per-class", type=int, default=default.per_class, help="samples of each class")
    p.add_argument("--data", choices=DATA, default=default.data, help="trained: mining leaves few pairs")
    p.add_argument("--dtype", choices=DTYPES, default=default.dtype)
    p.add_argument("--device", choices=DEVICES, default=default.device)
    p.add_argument("--phase", choices=PHASES, default=default.phase)
    p.add_argument("--ref", type=int, metavar="M", help="against M references without gradient, not the batch itself")
    p.add_argument("--variants", type=names, default=DEFAULT, help=f"of {', '.join(VARIANTS)}, or module:function")
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
    p.add_argument("--out", type=Path, default=RESULTS, metavar="FOLDER", help="for the JSON and the PNG")
    p.add_argument("--plot", type=Path, metavar="FILE.json", help="only redraw the PNG beside this file")
    p.add_argument("--table", type=Path, metavar="FILE.json", help="only print this file's Markdown table")
    return p


def main(arguments: list[str] | None = None) -> None:
    p = parser()
    given = vars(p.parse_args(arguments))
    if given["table"]:
        print(report.markdown(report.read(given["table"])))
        return
    if given["plot"]:
        print(plot.draw(report.read(given["plot"]), given["plot"].with_suffix(".png")))
        return
    limit = given.pop("memory_limit")
    try:
        whole = machine.gpu_bytes() if given["device"] == "cuda" else machine.memory_bytes()
        bytes_limit = int(SHARE_OF_MEMORY * whole if limit is None else limit * GB)
        options = Options.of({**given, "memory_limit": bytes_limit})
    except ValueError as error:
        p.error(str(error))
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # as in the probes: no worker beside what is timed
    torch.set_num_threads(options.threads)
    with Progress() as progress:
        document = suite.run(options, progress, lambda document: report.write(document, given["out"]))
    path = report.write(document, given["out"])
    report.print_table(document)
    print(path)
    print(plot.draw(document, path.with_suffix(".png")))


if __name__ == "__main__":
    main()
