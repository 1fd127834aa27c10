"""The results: a table, a picture, and all numbers as JSON."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...core.extras import extra
from ...metrics import Interval, confidence_interval
from ..plot_style import BLUE, ORANGE, THIN, Look, legend, page, save, styled
from .data import Data
from .protocol import Protocol
from .record import write as write_whole
from .study import METRICS, UNTRAINED, Outcome

with extra("reality-check", "a comparison's table"):
    from rich.table import Table

TITLES = {"precision_at_1": "P@1", "r_precision": "R-Precision", "map_at_r": "MAP@R"}
LOOKS = {"separated": Look(BLUE, "o"), "concatenated": Look(ORANGE, "s")}


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
    """The best hyper-parameters of each loss."""
    found = Table("loss", "trials", "validation MAP@R, %", "hyper-parameters", box=None)
    for outcome in outcomes:
        if outcome.name != UNTRAINED:
            values = ", ".join(f"{name} {value:.3g}" for name, value in outcome.values.items())
            found.add_row(outcome.name, str(outcome.trials), f"{100 * outcome.validation:.2f}", values)
    return found


def interval(runs: Sequence[float]) -> dict[str, float | None]:
    """An interval for JSON, which has no NaN."""
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
                for kind in LOOKS}}
            for o in outcomes
        ],
    }  # fmt: skip


@styled()
def draw(outcomes: Sequence[Outcome], title: str, protocol: Protocol, path: Path) -> None:
    """MAP@R of each loss, separated and concatenated, with intervals, as a PNG.

    Args:
        title: the data's.
    """
    shown = ranked(outcomes, "separated")[::-1]
    said = f"{protocol.trials} trials a loss, {protocol.folds} folds; mean of {protocol.repeats} repeats"
    bars = ", bars: 95 % interval" if protocol.repeats > 1 else ""
    figure = page(0.7 + 0.45 * len(shown), f"MAP@R of losses: {title}", said + bars, key=True)
    axes = figure.add_subplot()
    handles = []
    for place, (kind, look) in enumerate(LOOKS.items()):
        intervals = [percent(getattr(outcome, kind)["map_at_r"]) for outcome in shown]
        heights = [row + 0.14 * (1 - 2 * place) for row in range(len(shown))]
        models = protocol.folds if kind == "concatenated" else 1
        drawn = axes.errorbar(
            [i.mean for i in intervals], heights, xerr=[i.half_width for i in intervals], fmt=look.marker,
            color=look.colour, lw=THIN, markersize=5.5, capsize=4, capthick=THIN,
            label=f"{kind}: {models} {'models' if models > 1 else 'model'}, {models * protocol.embedding_size}-d",
        )  # fmt: skip
        handles.append(drawn)
    axes.set_yticks(range(len(shown)), [outcome.name for outcome in shown], parse_math=False)
    axes.set(xlabel="MAP@R on the test classes (%)", ylabel="loss", ylim=(-0.5, len(shown) - 0.5))
    axes.grid(axis="y", visible=False)
    legend(figure, handles)
    save(figure, path)


def write(outcomes: Sequence[Outcome], data: Data, protocol: Protocol, out: Path) -> None:
    write_whole(out / "results.json", document(outcomes, data, protocol))
    draw(outcomes, data.title, protocol, out / "results.png")
