"""The picture of a demo: loss curves, how far they are apart, retrieval before and after."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from flashpair.tools import plot_style
from flashpair.tools.plot_style import BLUE, DASHED, FILL, GREEN, GREY, INK, ORANGE, SKY, SMALL, THICK

LEAST = 1e-17
METRICS = {"precision_at_1": "P@1", "r_precision": "R-Precision", "map_at_r": "MAP@R"}


@plot_style.styled()
def draw(document: dict[str, Any], path: Path) -> None:
    """Saves the picture of what `demo.study` returned."""
    foot = f"torch {document['versions']['torch']}, flashpair {document['versions']['flashpair']}"
    figure = plot_style.page(6.6, "Trained on the digits 0-4, with flashpair and with the reference", foot=foot)
    figure.get_layout_engine().set(hspace=0.05)
    panels = figure.subplot_mosaic([["curves", "differences"], ["metrics", "metrics"]], height_ratios=(1.25, 1))
    curves(panels["curves"], document)
    differences(panels["differences"], document)
    metrics(panels["metrics"], document)
    plot_style.save(figure, path)


def curves(ax: Axes, document: dict[str, Any]) -> None:
    runs = document["runs"]
    name = next(iter(runs))
    reference = runs[name]["reference"]
    ax.plot(runs[reference]["losses"], color=SKY, lw=6, solid_capstyle="round", label=reference)
    ax.plot(runs[name]["losses"], color=BLUE, lw=1.2, label=name)
    ax.set(title="Training loss", xlabel="training step", ylabel="Multi-Similarity loss (no unit)")
    ax.legend(loc="upper right")


def differences(ax: Axes, document: dict[str, Any]) -> None:
    """The largest difference so far: single steps agree by chance."""
    runs = document["runs"]
    lines = {
        name: (run["losses"], runs[run["reference"]]["losses"])
        for name, run in runs.items()
        if name != run["reference"]
    }
    first = next(iter(runs))
    lines[f"{first}, same embeddings"] = runs[first]["losses"], runs[first]["eager"]
    looks = ((BLUE, "-"), (GREY, DASHED), (GREEN, "-."), (ORANGE, "-"))
    for (name, (found, expected)), (colour, style) in zip(lines.items(), looks, strict=True):
        a, b = np.array(found), np.array(expected)
        apart = np.abs(a - b) / np.maximum(np.abs(b), LEAST)
        ax.semilogy(np.maximum.accumulate(np.maximum(apart, LEAST)), color=colour, ls=style, lw=THICK, label=name)
    eps = np.finfo(np.float32).eps
    ax.axhline(eps, color=INK, lw=0.9, ls=":", label="one rounding of float32")
    ax.set(title="Largest difference from the reference so far", xlabel="training step")
    ax.set(ylabel="relative difference (log scale)", ylim=(LEAST / 2, 1))
    ax.legend(fontsize=SMALL, loc=(0.28, 0.22))


def metrics(ax: Axes, document: dict[str, Any]) -> None:
    name = next(iter(document["runs"]))
    after = document["runs"][name]["after"]
    reference = document["runs"][document["runs"][name]["reference"]]["after"]
    before, pixels = document["start"]["untrained"], document["start"]["raw pixels"]
    rows = np.arange(len(METRICS))[::-1]

    def values(of: dict[str, float]) -> list[float]:
        return [of[key] for key in METRICS]

    ax.hlines(rows, values(before), values(after), color=FILL, lw=5)
    ax.plot(values(pixels), rows, "|", color=INK, ms=16, mew=2, label="raw pixels")
    ax.plot(values(before), rows, "o", color="white", mec=BLUE, ms=9, label="untrained")
    ax.plot(values(reference), rows, "o", color=SKY, ms=14, label="trained: reference")
    ax.plot(values(after), rows, "o", color=BLUE, ms=8, label=f"trained: {name}")
    for row, value in zip(rows, values(after), strict=True):
        ax.annotate(f"{value:.3f}", (value, row), (0, 12), textcoords="offset points", ha="center")
    ax.set_yticks(rows, list(METRICS.values()))
    ax.set(title="Retrieval of the unseen digits 5-9", xlabel="metric (0 to 1)", ylabel="metric")
    ax.set(xlim=(0.4, 1.03), ylim=(-0.5, len(METRICS) - 0.4))
    ax.grid(axis="y", visible=False)
    ax.legend(fontsize=SMALL, loc="lower right")
