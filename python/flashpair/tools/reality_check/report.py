"""The results: a table, a picture, and all numbers as JSON."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...core.extras import extra
from ...metrics import Interval, confidence_interval
from .data import Data
from .protocol import Protocol
from .record import write as write_whole
from .study import METRICS, UNTRAINED, Outcome

with extra("reality-check", "a comparison's table"):
    from rich.table import Table

TITLES = {"precision_at_1": "P@1", "r_precision": "R-Precision", "map_at_r": "MAP@R"}
COLOURS = {"separated": "#1b6ca8", "concatenated": "#d1495b"}


def percent(runs: Sequence[float]) -> Interval:
    return confidence_interval([100 * run for run in runs])


def tables(outcomes: Sequence[Outcome], protocol: Protocol) -> list[Table]:
    """Test metrics in percent with their 95 % intervals, separated and concatenated, the best MAP@R first."""
    made = []
    for kind, models in (("separated", 1), ("concatenated", protocol.folds)):
        found = Table(f"{kind}, {models * protocol.embedding_size}-d", *(f"{TITLES[m]}, %" for m in METRICS), box=None)
        for column in found.columns[1:]:
            column.justify = "right"
        for outcome in ranked(outcomes, kind):
            found.add_row(outcome.name, *(str(percent(getattr(outcome, kind)[m])) for m in METRICS))
        made.append(found)
    return made


def ranked(outcomes: Sequence[Outcome], kind: str) -> list[Outcome]:
    return sorted(outcomes, key=lambda o: statistics.fmean(getattr(o, kind)["map_at_r"]), reverse=True)


def settings_table(outcomes: Sequence[Outcome]) -> Table:
    """What was found to be the best of each loss."""
    found = Table("loss", "trials", "validation MAP@R, %", "hyper-parameters", box=None)
    for outcome in outcomes:
        if outcome.name != UNTRAINED:
            values = ", ".join(f"{name} {value:.3g}" for name, value in outcome.values.items())
            found.add_row(outcome.name, str(outcome.trials), f"{100 * outcome.validation:.2f}", values)
    return found


def interval(runs: Sequence[float]) -> dict[str, float | None]:
    """As JSON takes it, which has no NaN."""
    found = confidence_interval(runs)
    return {"mean": found.mean, "half_width": found.half_width if len(runs) > 1 else None}


def document(outcomes: Sequence[Outcome], data: Data, protocol: Protocol) -> dict[str, Any]:
    return {
        "what": "A Metric Learning Reality Check (Musgrave et al., ECCV 2020), by flashpair",
        "units": "metrics from 0 to 1 on the test classes, one number a repeat; intervals: mean and half-width, 95 %",
        "data": {"title": data.title, "samples": len(data.labels), "classes": int(data.labels.max()) + 1},
        "protocol": vars(protocol),
        "losses": [
            {**o._asdict(), "intervals": {
                kind: {m: interval(runs) for m, runs in getattr(o, kind).items()}
                for kind in COLOURS}}
            for o in outcomes
        ],
    }  # fmt: skip


def draw(outcomes: Sequence[Outcome], data: Data, protocol: Protocol, path: Path) -> None:
    """MAP@R of each loss, separated and concatenated, with intervals, as a PNG."""
    with extra("reality-check", "the picture of a comparison"):
        from matplotlib.figure import Figure

    shown = ranked(outcomes, "separated")[::-1]
    figure = Figure(figsize=(7.5, 1.6 + 0.42 * len(shown)), layout="constrained")
    axes = figure.add_subplot()
    for place, (kind, colour) in enumerate(COLOURS.items()):
        intervals = [percent(getattr(outcome, kind)["map_at_r"]) for outcome in shown]
        heights = [row + 0.12 * (1 - 2 * place) for row in range(len(shown))]
        size = protocol.embedding_size * (protocol.folds if kind == "concatenated" else 1)
        axes.errorbar(
            [i.mean for i in intervals], heights, xerr=[i.half_width for i in intervals], fmt="o", color=colour,
            markersize=4, capsize=3, label=f"{kind}, {size}-d",
        )  # fmt: skip
    axes.set_yticks(range(len(shown)), [outcome.name for outcome in shown], parse_math=False)
    axes.set_xlabel(f"MAP@R on the test classes, %; mean of {protocol.repeats} repeats, 95 % interval")
    axes.set_title(
        f"{data.title}: {protocol.trials} trials a loss, {protocol.folds} folds", fontsize=11, parse_math=False
    )
    axes.grid(axis="x", alpha=0.3)
    axes.legend(fontsize=9)
    figure.savefig(path, dpi=150)


def write(outcomes: Sequence[Outcome], data: Data, protocol: Protocol, out: Path) -> None:
    write_whole(out / "results.json", document(outcomes, data, protocol))
    draw(outcomes, data, protocol, out / "results.png")
