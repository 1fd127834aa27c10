"""Time and peak memory over N as two log-log panels for each D, labelled at the ends of the curves.

Of a sweep (live.py), time over the share of live pairs, a panel for each N and D.
"""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from . import machine
from .options import FLOOR, FLOOR_TWO, FLOORS, Options
from .report import Document, is_sweep, percent, print_table, variants_of, write
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


class Abscissa(NamedTuple):
    """What runs along the bottom: a case's key, its name, and where the ticks are."""

    key: str
    name: str
    ticks: dict[float, str]
    ends: tuple[float, float]


class Death(NamedTuple):
    """The first size at which a variant went over a limit, which one, and in words."""

    n: float
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


def curves(document: Document, cases: list[dict[str, Any]], what: str, key: str) -> list[Curve]:
    """Of some cases of the document, over what they have as `key`."""
    found, others = [], iter(OTHERS * 9)
    for name in variants_of(document):
        colour = COLOURS.get(name) or next(others)
        records = [(c[key], c["variants"][name]) for c in cases if name in c["variants"]]
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


def _over_sizes(cases: list[dict[str, Any]]) -> Abscissa:
    sizes = sorted({c["n"] for c in cases})
    return Abscissa("n", "batch size N", {n: f"{n:,}" for n in sizes}, (sizes[0] / 1.15, sizes[-1] * 1.15))


def _over_shares(cases: list[dict[str, Any]]) -> Abscissa:
    key = "live_share_of_negatives"
    low = min(c[key] for c in cases)
    ticks = {10.0**k: percent(10.0**k) for k in range(math.floor(math.log10(low)), 1)}
    return Abscissa(key, "negatives that mining keeps (the last point: random embeddings)", ticks, (low / 1.3, 1.3))


def _axes(axes: Axes, what: str, along: Abscissa, values: list[float]) -> None:
    show = duration if what == "time" else size
    low, high = min(values, default=1.0) / 1.5, max(values, default=10.0) * 1.5
    axes.set(xscale="log", yscale="log", ylim=(low, high))
    axes.set_xticks(list(along.ticks), list(along.ticks.values()))
    axes.set_xlim(along.ends)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_locator(LogLocator(10, subs=(1.0,) if high / low > 50 else (1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: show(value)))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(which="both", length=0, labelsize=9, labelcolor=INK)
    axes.grid(color=GRID, lw=0.8)
    axes.set_axisbelow(True)
    axes.spines[:].set_visible(False)
    axes.set_xlabel(along.name, fontsize=9, color=INK)


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


def _panel(axes: Axes, found: list[Curve], what: str, options: Options, along: Abscissa) -> None:
    drawn = [c for c in found if c.points]
    ends = [c.end(what, options) for c in drawn]
    _axes(axes, what, along, [v for c in drawn for _, v in c.points] + [value for _, value in ends])
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
        records = [c["variants"][name] for c in document["cases"] if name in c["variants"]]
        if not any(r["status"] == "ok" for r in records):
            absent.append(f"{name}: {records[0]['words']}")
    if any(r["status"].startswith("over_") for c in document["cases"] for r in c["variants"].values()):
        absent.append("A cross: over a limit at that size; drawn at that limit, or where the slope before it leads.")
    lines = [machine.words(document["machine"], options.threads, options.device == "cuda"), *absent]
    return "\n".join(line if len(line) < 180 else line[:179] + "…" for line in lines)


def _draw_sizes(document: Document, options: Options) -> Figure:
    high = HEAD + PANEL * len(options.dims) + FOOT
    figure, grid = plt.subplots(len(options.dims), 2, figsize=(13, high), squeeze=False)
    figure.subplots_adjust(left=0.06, right=0.84, wspace=0.68, hspace=0.35, top=1 - HEAD / high, bottom=FOOT / high)
    along = _over_sizes(document["cases"])
    for d, line in zip(options.dims, grid, strict=True):
        cases = [c for c in document["cases"] if c["d"] == d]
        for axes, what in zip(line, ("time", "memory"), strict=True):
            _panel(axes, curves(document, cases, what, along.key), what, options, along)
            head = "Time of a step" if what == "time" else "Peak memory beyond inputs and gradient"
            axes.set_title(f"{head}, D = {d}", loc="left", fontsize=11, color=INK, pad=10)
    return figure


def _draw_shares(document: Document, options: Options) -> Figure:
    each = list(dict.fromkeys((c["n"], c["d"]) for c in document["cases"]))
    high = HEAD + (PANEL + 0.6) * len(each) + FOOT
    figure, grid = plt.subplots(len(each), 1, figsize=(9.5, high), squeeze=False)
    figure.subplots_adjust(left=0.09, right=0.7, hspace=0.4, top=1 - HEAD / high, bottom=(FOOT + 0.1) / high)
    for (n, d), axes in zip(each, grid[:, 0], strict=True):
        cases = [c for c in document["cases"] if (c["n"], c["d"]) == (n, d)]
        along = _over_shares(cases)
        _panel(axes, curves(document, cases, "time", along.key), "time", options, along)
        axes.set_title(f"Time of a step, N = {n:,}, D = {d}", loc="left", fontsize=11, color=INK, pad=10)
    return figure


def draw(document: Document, path: Path) -> Path:
    options = Options.of(document["options"])
    figure = (_draw_shares if is_sweep(document) else _draw_sizes)(document, options)
    high = figure.get_figheight()
    figure.suptitle(options.title, x=0.01, y=1 - 0.12 / high, ha="left", va="top", fontsize=13, weight="bold")
    figure.text(0.01, 0.1 / high, _footnote(document, options), fontsize=8, color=PALE, va="bottom")
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path


def publish(document: Document, folder: Path) -> None:
    """What a finished run leaves: its JSON and PNG in `folder`, its table and both paths in the terminal."""
    path = write(document, folder)
    print_table(document)
    print(path)
    print(draw(document, path.with_suffix(".png")))
