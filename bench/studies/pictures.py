"""The pictures of the documentation, redrawn from the committed numbers: `python -m bench pictures`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from flashpair.tools import plot_style
from flashpair.tools.reality_check import Outcome, Protocol
from flashpair.tools.reality_check import report as reality_report

from ..harness import plot, report
from ..harness.arguments import PICTURES, RESULTS
from . import training_report, weights

SOURCES = {
    "batch-size": "batch-size.json",
    "live-pairs": "live-pairs.json",
    "training": "training.json",
    "reality-check-digits": "reality-check-digits.json",
}
NAMES = (*SOURCES, *(f"weights-{name}" for name in weights.PICTURES))


def draw_reality_check(source: Path, path: Path) -> None:
    """Of what `python -m flashpair reality-check` left as results.json."""
    document = json.loads(source.read_text(encoding="utf-8"))
    outcomes = [Outcome(**{name: loss[name] for name in Outcome._fields}) for loss in document["losses"]]
    reality_report.draw(outcomes, document["data"]["title"], Protocol(**document["protocol"]), path)


def draw(name: str, folder: Path) -> Path:
    path = folder / f"{name}.png"
    if name == "reality-check-digits":
        draw_reality_check(RESULTS / SOURCES[name], path)
    elif name in SOURCES:
        drawn_by = training_report if name == "training" else plot
        drawn_by.draw(report.read(RESULTS / SOURCES[name]), path)
    else:
        plot_style.save(weights.PICTURES[name.removeprefix("weights-")](), path)
    return path


def main(arguments: list[str] | None = None) -> None:
    p = argparse.ArgumentParser(prog="python -m bench pictures", description=__doc__)
    p.add_argument("--names", nargs="+", choices=NAMES, default=NAMES, help="(all)")
    p.add_argument("--out", type=Path, default=PICTURES, metavar="FOLDER", help="(docs/pictures)")
    given = p.parse_args(arguments)
    given.out.mkdir(parents=True, exist_ok=True)
    for name in given.names:
        print(draw(name, given.out))
