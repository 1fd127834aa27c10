"""A run of training.py as a table and a picture, from the JSON alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from rich.console import Console
from rich.table import Table

from ..harness import machine
from ..harness.plot import COLOURS, GRID, INK, OTHERS, PALE
from ..harness.report import BUSY, NARROWEST, Document, percent
from ..harness.units import duration

Record = dict[str, Any]


def _median(point: Record, variant: str) -> str:
    return duration(point["seconds"][variant]["median"]) if variant in point["seconds"] else ""


def told(point: Record) -> str:
    times = ", ".join(f"{v} {_median(point, v)}" for v in point["seconds"])
    return f"step {point['step']:,}, {percent(point['live_share'])} live: {times}"


def print_table(document: Document, console: Console | None = None) -> None:
    console = console or Console()
    console.width = max(console.width, NARROWEST)
    for run in document["runs"].values():
        variants = list(run["run_seconds"])
        table = Table(title=f"{run['title']}: N = {run['n']:,}, D = {run['d']}", title_justify="left", pad_edge=False)
        for name in ("step", "loss", "live", "screened", *variants):
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
        if run["peer"]:
            console.print(f"without pytorch-metric-learning: {run['peer']}", highlight=False, markup=False)
        before, after = (run["retrieval"][when]["map_at_r"] for when in ("before", "after"))
        console.print(f"MAP@R of classes not trained on: {before:.3f} before, {after:.3f} after\n", highlight=False)
    console.print(machine.words(document["machine"], document["options"]["threads"]), highlight=False)
    points = [p for run in document["runs"].values() for p in run["points"]]
    busy = max(p["cores_used_by_others"] or 0.0 for p in points)
    if busy > BUSY:
        console.print(f"[yellow]Times are doubtful: other processes kept up to {busy:.1f} cores busy[/]")


def _panel(axes: Axes, run: Record) -> Axes:
    """Times on the left axis; returns the right one, with the share of live pairs."""
    others = iter(OTHERS)
    for variant in run["run_seconds"]:
        points = [p for p in run["points"] if variant in p["seconds"]]
        ours = variant == "flashpair"
        axes.plot(
            [p["step"] for p in points],
            [p["seconds"][variant]["median"] for p in points],
            color=COLOURS.get(variant) or next(others),
            lw=2.4 if ours else 1.5,
            marker="o",
            ms=4 if ours else 3,
            zorder=4 if ours else 3,
            label=variant,
        )
    right = axes.twinx()
    alive = [p for p in run["points"] if p["live_share"] > 0]
    at, shares = [p["step"] for p in alive], [p["live_share"] for p in alive]
    right.plot(at, shares, color=PALE, lw=0.9, ls="--", label="live pairs (right axis)")
    for ax, show, colour in ((axes, duration, INK), (right, percent, PALE)):
        ax.set_yscale("log")  # replaces locators and formatters
        ax.yaxis.set_major_locator(LogLocator(10, subs=(1.0, 2.0, 5.0)))
        ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _, show=show: show(value)))
        ax.yaxis.set_minor_formatter(NullFormatter())
        ax.tick_params(which="both", length=0, labelsize=9, labelcolor=colour)
        ax.spines[:].set_visible(False)
    axes.grid(color=GRID, lw=0.8)
    axes.set_xlabel("training step", fontsize=9, color=INK)
    axes.set_title(f"{run['title']}, N = {run['n']:,}, D = {run['d']}", loc="left", fontsize=11, color=INK)
    return right


def draw(document: Document, path: Path) -> Path:
    runs = list(document["runs"].values())
    figure, grid = plt.subplots(1, len(runs), figsize=(6.8 * len(runs), 5.2), squeeze=False)
    figure.subplots_adjust(left=0.06, right=0.94, wspace=0.3, top=0.83, bottom=0.24)
    for run, axes in zip(runs, grid[0], strict=True):
        right = _panel(axes, run)
    lines = [*axes.get_lines(), *right.get_lines()]
    figure.legend(
        handles=lines, loc="lower center", ncols=len(lines), frameon=False, fontsize=9, bbox_to_anchor=(0.5, 0.06)
    )
    title = "Multi-Similarity with mining, forward and backward of the loss alone, over a training"
    figure.suptitle(title, x=0.01, ha="left", fontsize=13, weight="bold")
    words = machine.words(document["machine"], document["options"]["threads"])
    figure.text(0.01, 0.02, words, fontsize=8, color=PALE, va="bottom")
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path
