"""A run of training.py as a table and a picture, from the JSON alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from rich.console import Console
from rich.table import Table

from flashpair.tools import plot_style

from ..harness import machine
from ..harness.plot import LOOKS, OTHERS, line_of
from ..harness.report import BUSY, NARROWEST, Document, percent
from ..harness.units import duration

Record = dict[str, Any]


def _median(point: Record, variant: str) -> str:
    return duration(point["seconds"][variant]["median"]) if variant in point["seconds"] else ""


def told(point: Record) -> str:
    times = ", ".join(f"{v} {_median(point, v)}" for v in point["seconds"])
    return f"step {point['step']:,}, {percent(point['live_share'])} live pairs: {times}"


def markdown(document: Document) -> str:
    """One row for each training: the time of the loss in all steps together, by variant."""
    runs = list(document["runs"].values())
    variants = list(dict.fromkeys(v for run in runs for v in run["run_seconds"]))
    lines = ["| training | N | steps | live pairs | " + " | ".join(variants) + " |"]
    lines.append("|---|" + "---:|" * (3 + len(variants)))
    for run in runs:
        live = " to ".join(percent(run["points"][k]["live_share"]) for k in (0, -1))
        seconds = ("" if (s := run["run_seconds"].get(v)) is None else duration(s) for v in variants)
        lines.append(f"| {run['title']} | {run['n']:,} | {run['steps']:,} | {live} | {' | '.join(seconds)} |")
    what = "Time of the loss in all steps together, forward and backward, by the trapezoidal rule over the timed steps."
    return "\n".join([*lines, "", f"{what} {machine.words(document['machine'], document['options']['threads'])}."])


def print_table(document: Document, console: Console | None = None) -> None:
    console = console or Console()
    console.width = max(console.width, NARROWEST)
    for run in document["runs"].values():
        variants = list(run["run_seconds"])
        table = Table(title=f"{run['title']}: N = {run['n']:,}, D = {run['d']}", title_justify="left", pad_edge=False)
        for name in ("step", "loss", "live pairs", "screened", *variants):
            table.add_column(name, justify="right")
        for point in run["points"]:
            seen = point["screening"]
            screened = percent(1 - seen["whole"] / seen["tiles"]) if seen["tiles"] else "none"
            label = f"{point['step']:,}", f"{point['loss']:.3f}", percent(point["live_share"]), screened
            table.add_row(*label, *(_median(point, v) for v in variants))
        table.add_section()
        whole = [run["run_seconds"][v] for v in variants]
        table.add_row("all", "", "", "", *("" if seconds is None else duration(seconds) for seconds in whole))
        console.print(table)
        if run["baseline"]:
            console.print(f"without pytorch-metric-learning: {run['baseline']}", highlight=False, markup=False)
        before, after = (run["retrieval"][when]["map_at_r"] for when in ("before", "after"))
        console.print(f"MAP@R of classes not trained on: {before:.3f} before, {after:.3f} after\n", highlight=False)
    console.print(machine.words(document["machine"], document["options"]["threads"]), highlight=False)
    points = [p for run in document["runs"].values() for p in run["points"]]
    busy = max(p["cores_used_by_others"] or 0.0 for p in points)
    if busy > BUSY:
        console.print(f"[yellow]Times are doubtful: other processes kept up to {busy:.1f} cores busy[/]")


def _times(axes: Axes, run: Record) -> None:
    others = iter(OTHERS * 9)
    for variant in run["run_seconds"]:
        points = [p for p in run["points"] if variant in p["seconds"]]
        at, seconds = [p["step"] for p in points], [p["seconds"][variant]["median"] for p in points]
        look = LOOKS.get(variant) or next(others)
        axes.plot(at, seconds, **{**line_of(variant, look), "ms": 3.5}, label=variant)
    axes.set_title(f"{run['title']}\nN = {run['n']:,}, D = {run['d']}")


def _shares(axes: Axes, run: Record) -> None:
    alive = [p for p in run["points"] if p["live_share"] > 0]
    at, shares = [p["step"] for p in alive], [p["live_share"] for p in alive]
    axes.plot(at, shares, color=plot_style.INK, lw=1.3, marker=".", ms=4)
    axes.set_xlabel("training step")


def _log(axes: Axes, show: Callable[[float], str], name: str) -> None:
    axes.set_yscale("log")  # replaces locators and formatters
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(10, subs=(1.0,) if high / low > 50 else (1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: show(value)))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_ylabel(f"{name}\n(log scale)")


@plot_style.styled()
def draw(document: Document, path: Path) -> Path:
    """Of each run a column: the loss's time over the steps, and below it the share of live pairs."""
    title = "Multi-Similarity with mining over a training"
    said = (
        "Above: forward and backward of the loss alone, at some of the steps. Below: the pairs that mining keeps then."
    )
    foot = machine.words(document["machine"], document["options"]["threads"])
    figure = plot_style.page(4.6, title, said, foot, key=True)
    runs = list(document["runs"].values())
    grid = figure.subplots(2, len(runs), squeeze=False, sharex="col", height_ratios=(2, 1))
    for run, times, shares in zip(runs, *grid, strict=True):
        _times(times, run)
        _shares(shares, run)
        _log(times, duration, "time of the loss")
        _log(shares, percent, "live pairs")
    plot_style.legend(figure, grid[0, 0].get_lines())
    plot_style.save(figure, path)
    return path
