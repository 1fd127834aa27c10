"""Time and peak memory over N as two log-log panels for each D, labelled at the ends of the curves.

A sweep (live_pairs.py) is drawn as time over the share of live pairs, with a panel for each N and D.
"""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from flashpair.tools import plot_style
from flashpair.tools.plot_style import BLUE, GREEN, GREY, INK, ORANGE, PURPLE, SKY, TEXT, Look

from . import machine
from .options import GEMM_BOUND, GEMM_BOUND_TWO, GEMM_BOUNDS, Options, label
from .report import Document, is_sweep, percent, print_table, variants_of, write
from .units import duration, size

LOOKS = {
    "flashpair": Look(BLUE, "o"),
    "reference": Look(GREY, "s"),
    "compiled": Look(ORANGE, "^"),
    "pytorch-metric-learning": Look(PURPLE, "D"),
    GEMM_BOUND: Look(INK, ""),
    GEMM_BOUND_TWO: Look(INK, ""),
}
OTHERS = (Look(GREEN, "v"), Look(SKY, "P"), Look(INK, "X"))
LABEL_LINE = 0.075  # of a panel's height, for each line of a label
LABEL_AT = 1.05  # of a panel's width
PANEL = 2.75  # inches of height, with its title and the names of its axes


class Abscissa(NamedTuple):
    """The horizontal axis: the key of a case, its name, the ticks and the limits."""

    key: str
    name: str
    ticks: dict[float, str]
    ends: tuple[float, float]


class OverLimit(NamedTuple):
    """The first size at which a variant exceeded a limit, the status, and words for it."""

    n: float
    status: str
    words: str


class Curve(NamedTuple):
    name: str
    look: Look
    points: list[tuple[float, float]]
    over_limit: OverLimit | None

    def end(self, what: str, options: Options) -> tuple[float, float]:
        """The last point; if the variant exceeded a limit, a point on that limit, or further along the slope."""
        n, value = self.points[-1]
        if self.over_limit is None:
            return n, value
        if (what, self.over_limit.status) == ("memory", "over_memory"):
            return self.over_limit.n, float(options.memory_limit)
        if (what, self.over_limit.status) == ("time", "over_time"):
            return self.over_limit.n, options.time_limit
        slope = 2.0
        if len(self.points) > 1:
            n0, value0 = self.points[-2]
            slope = math.log(value / value0) / math.log(n / n0)
        return self.over_limit.n, value * (self.over_limit.n / n) ** slope


def _value(record: dict[str, Any], what: str) -> float | None:
    if record["status"] != "ok":
        return None
    return record["seconds"]["median"] if what == "time" else record.get("memory", {}).get("peak_extra")


def curves(document: Document, cases: list[dict[str, Any]], what: str, key: str) -> list[Curve]:
    """The curves of some cases of the document over their `key`."""
    found, others = [], iter(OTHERS * 9)
    for name in variants_of(document):
        look = LOOKS.get(name) or next(others)
        records = [(c[key], c["variants"][name]) for c in cases if name in c["variants"]]
        points = [(float(n), value) for n, r in records if (value := _value(r, what))]
        exceeded = [OverLimit(n, r["status"], r["words"]) for n, r in records if r["status"].startswith("over_")]
        found.append(Curve(name, look, points, exceeded[0] if exceeded else None))
    return found


def _spread(heights: list[float], lines: list[int]) -> list[float]:
    """Moves the middles of labels apart so that they do not overlap, keeping their order and the top of the panel."""
    order = sorted(range(len(heights)), key=heights.__getitem__)
    placed = list(heights)
    for below, k in pairwise(order):
        placed[k] = max(placed[k], placed[below] + LABEL_LINE * (lines[below] + lines[k]) / 2)
    top = 1.0
    for k in reversed(order):
        placed[k] = min(placed[k], top - LABEL_LINE * lines[k] / 2)
        top = placed[k] - LABEL_LINE * lines[k] / 2
    return placed


def _over_sizes(cases: list[dict[str, Any]]) -> Abscissa:
    sizes = sorted({c["n"] for c in cases})
    return Abscissa(
        "n", "batch size N (embeddings, log scale)", {n: f"{n:,}" for n in sizes}, (sizes[0] / 1.15, sizes[-1] * 1.15)
    )


def _over_shares(cases: list[dict[str, Any]]) -> Abscissa:
    key = "live_share_of_negatives"
    low = min(c[key] for c in cases)
    ticks = {10.0**k: percent(10.0**k) for k in range(math.floor(math.log10(low)), 1)}
    name = "share of the negatives that mining keeps (log scale); the last point: random embeddings"
    return Abscissa(key, name, ticks, (low / 1.3, 1.3))


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
    name = "time of a step" if what == "time" else "peak memory"
    axes.set(xlabel=along.name, ylabel=f"{name} (log scale)")


def line_of(name: str, look: Look) -> dict[str, Any]:
    """How a variant's line is drawn: flashpair's stands out, the GEMM bounds have no markers."""
    if name in GEMM_BOUNDS:
        return {"color": look.colour, "lw": 1.3, "ls": plot_style.DASHED if name == GEMM_BOUND else (0, (1, 1.5))}
    if name == "flashpair":
        return {"color": look.colour, "marker": look.marker, "lw": plot_style.THICK, "ms": 5.5, "zorder": 4}
    return {"color": look.colour, "marker": look.marker, "zorder": 3}


def _words(curve: Curve) -> str:
    name = label(curve.name)
    words = name if curve.over_limit is None else f"{name}: {curve.over_limit.words}"
    return words.replace(": ", ":\n", 1) if curve.over_limit is not None and len(words) > 24 else words


def _label(axes: Axes, curve: Curve, end: tuple[float, float], height: float) -> None:
    """The text is dark, because light colours are hard to read; the stroke to the curve's end has its colour."""
    line = {"arrowstyle": "-", "color": curve.look.colour, "lw": 1.2, "shrinkA": 1, "shrinkB": 5}
    axes.annotate(
        _words(curve),
        xy=end,
        xytext=(LABEL_AT, height),
        textcoords="axes fraction",
        fontsize=TEXT,
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
        colour = curve.look.colour
        axes.plot(*zip(*curve.points, strict=True), **line_of(curve.name, curve.look))
        if curve.over_limit is not None:
            axes.plot(*zip(curve.points[-1], end, strict=True), color=colour, lw=1.1, ls=":")
            axes.plot(*end, color=colour, marker="x", ms=8, mew=2.2, zorder=5, clip_on=False)
    to_panel = axes.transData + axes.transAxes.inverted()
    heights = [float(to_panel.transform(end)[1]) for end in ends]
    heights = _spread(heights, [_words(curve).count("\n") + 1 for curve in drawn])
    for curve, end, height in zip(drawn, ends, heights, strict=True):
        _label(axes, curve, end, height)


def _footnote(document: Document, options: Options) -> str:
    """The machine, and the variants that are not in the picture."""
    absent = []
    for name in variants_of(document):
        records = [c["variants"][name] for c in document["cases"] if name in c["variants"]]
        if not any(r["status"] == "ok" for r in records):
            absent.append(f"{label(name)}: {records[0]['words']}")
    if any(r["status"].startswith("over_") for c in document["cases"] for r in c["variants"].values()):
        absent.append("A cross: over a limit at that size; drawn at that limit, or where the slope before it leads.")
    lines = [machine.words(document["machine"], options.threads, options.device == "cuda"), *absent]
    return "\n".join(line if len(line) < 180 else line[:179] + "…" for line in lines)


def _draw_sizes(document: Document, options: Options) -> Figure:
    foot = _footnote(document, options)
    figure = plot_style.page(2 * PANEL * len(options.dims), options.title, foot=foot)
    figure.get_layout_engine().set(hspace=0.05)
    panels = iter(figure.subplots(2 * len(options.dims), 1))
    along = _over_sizes(document["cases"])
    for d in options.dims:
        cases = [c for c in document["cases"] if c["d"] == d]
        for what, head in (("time", "Time of a step"), ("memory", "Peak memory beyond inputs and gradient")):
            axes = next(panels)
            _panel(axes, curves(document, cases, what, along.key), what, options, along)
            axes.set_title(f"{head}, D = {d}")
    return figure


def _draw_shares(document: Document, options: Options) -> Figure:
    each = list(dict.fromkeys((c["n"], c["d"]) for c in document["cases"]))
    figure = plot_style.page((PANEL + 0.75) * len(each), options.title, foot=_footnote(document, options))
    for (n, d), axes in zip(each, figure.subplots(len(each), 1, squeeze=False)[:, 0], strict=True):
        cases = [c for c in document["cases"] if (c["n"], c["d"]) == (n, d)]
        along = _over_shares(cases)
        _panel(axes, curves(document, cases, "time", along.key), "time", options, along)
        axes.set_title(f"Time of a step, N = {n:,}, D = {d}")
    return figure


@plot_style.styled()
def draw(document: Document, path: Path) -> Path:
    options = Options.of(document["options"])
    plot_style.save((_draw_shares if is_sweep(document) else _draw_sizes)(document, options), path)
    return path


def publish(document: Document, folder: Path) -> None:
    """Writes JSON and PNG of a finished run into `folder`; prints its table and both paths."""
    path = write(document, folder)
    print_table(document)
    print(path)
    print(draw(document, path.with_suffix(".png")))
