"""The command line: `python -m bench.gpu_proof OUT`."""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path

from .driver import Driver
from .plan import NAMES, limits


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m bench.gpu_proof", description="Proves and measures the GPU code on this machine."
    )
    p.add_argument("out", type=Path, metavar="OUT", help="folder of the results, at most eight files")
    p.add_argument("--minutes", type=float, default=9.0, help="that the whole run may take (%(default)g)")
    p.add_argument("--stages", default="", metavar="A,B", help=f"these alone, of {', '.join(NAMES)}")
    p.add_argument("--on-host", action="store_true", help="without a GPU, small: to test the proof itself")
    return p


def main(arguments: list[str] | None = None) -> int:
    p = parser()
    given = p.parse_args(arguments)
    only = tuple(name.strip() for name in given.stages.split(",") if name.strip())
    if not 0 < given.minutes <= 600:
        p.error(f"--minutes must be above 0 and at most 600, got {given.minutes:g}")
    if given.out.exists() and not given.out.is_dir():
        p.error(f"OUT must be a folder, {given.out} is a file")
    try:
        limits(only)
    except ValueError as error:
        p.error(f"--{error}")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as an interrupt, so that the summary is written
    return Driver(given.out.resolve(), "host" if given.on_host else "gpu", only, given.minutes).run()


if __name__ == "__main__":
    sys.exit(main())
