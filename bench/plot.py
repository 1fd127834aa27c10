"""Time and peak memory over N as two log-log panels for each D, labelled at the ends of the curves."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from . import machine
from .options import FLOOR, FLOOR_TWO, FLOORS, Options
from .report import Document, variants_of
from .units import duration, size

COLOURS = {
    "flashpair": "#0a66c2",
    "reference": "#7a7a7a",
    "compiled": "#c8680c",
    "pytorch-metric-learning": "#a0399c",
    FLOOR: "#222222",
    FLOOR_TWO: "#222222",
}
OTHERS = ("#2a8c4a", "#b8860b", "#cc3344")
INK, PALE, GRID = "#222222", "#666666", "#e4e4e4"
LABEL_GAP = 0.07  # of a panel's height, from label to label
LABEL_AT = 1.07  # of a panel's width
PANEL, HEAD, FOOT = 4.2, 0.95, 0.85  # inches of height


class Death(NamedTuple):
    """The first size at which a variant went over a limit, which one, and in words."""

    n: int
    status: str
    words: str


class Curve(NamedTuple):
    name: str
    colour: str
    points: list[tuple[float, float]]
    death: Death | None

    def end(self, what: str, options: Options) -> tuple[float, float]:
        """The last point, or where the variant died: on the limit it ran into, or further along its slope."""
        n, value = self.points[-1]
        if self.death is None:
            return n, value
        if (what, self.death.status) == ("memory", "over_memory"):
            return self.death.n, float(options.memory_limit)
        if (what, self.death.status) == ("time", "over_time"):
            return self.death.n, options.time_limit
        slope = 2.0
        if len(self.points) > 1:
            n0, value0 = self.points[-2]
            slope = math.log(value / value0) / math.log(n / n0)
        return self.death.n, value * (self.death.n / n) ** slope


def _value(record: dict[str, Any], what: str) -> float | None:
    if record["status"] != "ok":
        return None
    return record["seconds"]["median"] if what == "time" else record.get("memory", {}).get("peak_extra")


def curves(document: Document, d: int, what: str) -> list[Curve]:
    found, others = [], iter(OTHERS * 9)
    for name in variants_of(document):
        colour = COLOURS.get(name) or next(others)
        records = [(c["n"], c["variants"][name]) for c in document["cases"] if c["d"] == d]
        points = [(float(n), value) for n, r in records if (value := _value(r, what))]
        deaths = [Death(n, r["status"], r["words"]) for n, r in records if r["status"].startswith("over_")]
        found.append(Curve(name, colour, points, deaths[0] if deaths else None))
    return found


def _spread(heights: list[float]) -> list[float]:
    """Heights moved apart by LABEL_GAP, in their order, and back under the top of the panel."""
    order = sorted(range(len(heights)), key=heights.__getitem__)
    placed = list(heights)
    for below, k in pairwise(order):
        placed[k] = max(placed[k], placed[below] + LABEL_GAP)
    top = 0.96
    for k in reversed(order):
        placed[k] = min(placed[k], top)
        top = placed[k] - LABEL_GAP
    return placed


def _axes(axes: Axes, what: str, sizes: list[int], values: list[float]) -> None:
    show = duration if what == "time" else size
    low, high = min(values, default=1.0) / 1.5, max(values, default=10.0) * 1.5
    axes.set(xscale="log", yscale="log", ylim=(low, high), xlim=(sizes[0] / 1.15, sizes[-1] * 1.15))
    axes.set_xticks(sizes, [f"{n:,}" for n in sizes])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_locator(LogLocator(10, subs=(1.0,) if high / low > 50 else (1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: show(value)))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(which="both", length=0, labelsize=9, labelcolor=INK)
    axes.grid(color=GRID, lw=0.8)
    axes.set_axisbelow(True)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("batch size N", fontsize=9, color=INK)


def _style(name: str) -> dict[str, Any]:
    if name in FLOORS:
        return {"lw": 1.2, "ls": (0, (4, 2) if name == FLOOR else (1, 1.5))}
    return (
        {"lw": 2.8, "marker": "o", "ms": 6, "zorder": 4} if name == "flashpair" else {"lw": 1.6, "marker": "o", "ms": 4}
    )


def _label(axes: Axes, curve: Curve, end: tuple[float, float], height: float) -> None:
    words = curve.name if curve.death is None else f"{curve.name}: {curve.death.words}"
    if curve.death is not None and len(words) > 32:
        words = words.replace(": ", ":\n", 1)
    line = {"arrowstyle": "-", "color": curve.colour, "lw": 0.6, "alpha": 0.5, "shrinkA": 2, "shrinkB": 5}
    axes.annotate(
        words,
        xy=end,
        xytext=(LABEL_AT, height),
        textcoords="axes fraction",
        color=curve.colour,
        fontsize=9,
        va="center",
        weight="bold" if curve.name == "flashpair" else "normal",
        arrowprops=line,
        annotation_clip=False,
    )


def _panel(axes: Axes, found: list[Curve], what: str, options: Options, sizes: list[int]) -> None:
    drawn = [c for c in found if c.points]
    ends = [c.end(what, options) for c in drawn]
    _axes(axes, what, sizes, [v for c in drawn for _, v in c.points] + [value for _, value in ends])
    for curve, end in zip(drawn, ends, strict=True):
        axes.plot(*zip(*curve.points, strict=True), color=curve.colour, **_style(curve.name))
        if curve.death is not None:
            axes.plot(*zip(curve.points[-1], end, strict=True), color=curve.colour, lw=1.1, ls=":")
            axes.plot(*end, color=curve.colour, marker="x", ms=8, mew=2.2, zorder=5, clip_on=False)
    to_panel = axes.transData + axes.transAxes.inverted()
    heights = _spread([float(to_panel.transform(end)[1]) for end in ends])
    for curve, end, height in zip(drawn, ends, heights, strict=True):
        _label(axes, curve, end, height)


def _footnote(document: Document, options: Options) -> str:
    """The machine, and who is not in the picture at all."""
    absent = []
    for name in variants_of(document):
        records = [c["variants"][name] for c in document["cases"]]
        if not any(r["status"] == "ok" for r in records):
            absent.append(f"{name}: {records[0]['words']}")
    if any(r["status"].startswith("over_") for c in document["cases"] for r in c["variants"].values()):
        absent.append("A cross: over a limit at that size; drawn at that limit, or where the slope before it leads.")
    lines = [machine.words(document["machine"], options.threads, options.device == "cuda"), *absent]
    return "\n".join(line if len(line) < 180 else line[:179] + "…" for line in lines)


def draw(document: Document, path: Path) -> Path:
    options = Options.of(document["options"])
    high = HEAD + PANEL * len(options.dims) + FOOT
    figure, grid = plt.subplots(len(options.dims), 2, figsize=(13, high), squeeze=False)
    figure.subplots_adjust(left=0.06, right=0.84, wspace=0.68, hspace=0.35, top=1 - HEAD / high, bottom=FOOT / high)
    sizes = sorted({c["n"] for c in document["cases"]})
    for d, line in zip(options.dims, grid, strict=True):
        for axes, what in zip(line, ("time", "memory"), strict=True):
            _panel(axes, curves(document, d, what), what, options, sizes)
            head = "Time of a step" if what == "time" else "Peak memory beyond inputs and gradient"
            axes.set_title(f"{head}, D = {d}", loc="left", fontsize=11, color=INK, pad=10)
    figure.suptitle(options.title, x=0.01, y=1 - 0.12 / high, ha="left", va="top", fontsize=13, weight="bold")
    figure.text(0.01, 0.1 / high, _footnote(document, options), fontsize=8, color=PALE, va="bottom")
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path
