"""One training step of one loss, against baselines and the bare products: `python -m bench step`.

`--plot FILE.json` and `--table FILE.json` only draw what a run has left.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from ..harness import plot, report, suite
from ..harness.arguments import add_batches, add_common, add_table, options_of
from ..harness.options import DATA, DEVICES, DTYPES, LOSSES, PHASES, Options
from ..harness.progress import Progress


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m bench step", description="Time and memory of one training step, against baselines."
    )
    default = Options(memory_limit=1, threads=1)
    p.add_argument("--loss", choices=LOSSES, default=default.loss)
    add_batches(p, default)
    p.add_argument("--data", choices=DATA, default=default.data, help="trained: mining leaves few pairs")
    p.add_argument("--noise", type=float, default=default.noise, help="of trained data, within a class")
    p.add_argument("--intrinsic", type=int, default=default.intrinsic, help="of trained data, dimensions of centres")
    p.add_argument("--dtype", choices=DTYPES, default=default.dtype)
    p.add_argument("--device", choices=DEVICES, default=default.device)
    p.add_argument("--phase", choices=PHASES, default=default.phase)
    p.add_argument("--ref", type=int, metavar="M", help="against M references without gradient, not the batch itself")
    add_common(p, default)
    p.add_argument("--plot", type=Path, metavar="FILE.json", help="only redraw the PNG beside this file")
    add_table(p)
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
    options = options_of(p, given)
    with Progress() as progress:
        document = suite.run(options, progress, lambda document: report.write(document, given["out"]))
    plot.publish(document, given["out"])
