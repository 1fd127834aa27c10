"""The picture of a demo: loss curves, how far they are apart, retrieval before and after."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes

PALE, DARK, GREY, RED, GREEN = "#a9c6e8", "#12355b", "#8a8a8a", "#c0392b", "#2e8b57"
FLOOR = 1e-17
METRICS = {"precision_at_1": "P@1", "r_precision": "R-Precision", "map_at_r": "MAP@R"}


def draw(document: dict[str, Any], path: Path) -> None:
    """Saves the picture of what `demo.study` returned."""
    figure, axes = plt.subplots(1, 3, figsize=(14, 4.4), layout="constrained")
    curves(axes[0], document)
    differences(axes[1], document)
    metrics(axes[2], document)
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def curves(ax: Axes, document: dict[str, Any]) -> None:
    runs = document["runs"]
    name = next(iter(runs))
    reference = runs[name]["reference"]
    ax.plot(runs[reference]["losses"], color=PALE, lw=6, solid_capstyle="round", label=reference)
    ax.plot(runs[name]["losses"], color=DARK, lw=1.2, label=name)
    ax.set(
        title="Training on the digits 0-4",
        xlabel="step",
        ylabel="Multi-Similarity loss",
    )
    ax.legend(frameon=False)


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
    for (name, (found, expected)), color in zip(lines.items(), (DARK, GREY, GREEN, RED), strict=True):
        a, b = np.array(found), np.array(expected)
        apart = np.abs(a - b) / np.maximum(np.abs(b), FLOOR)
        ax.semilogy(np.maximum.accumulate(np.maximum(apart, FLOOR)), color=color, lw=1.6, label=name)
    eps = np.finfo(np.float32).eps
    ax.axhline(eps, color="black", lw=0.8, ls=":")
    ax.annotate(
        "one rounding of float32",
        (1, eps),
        (0, -3),
        textcoords="offset points",
        ha="right",
        va="top",
        xycoords=ax.get_yaxis_transform(),
        fontsize=8,
    )
    ax.set(title="Largest difference from the reference so far", xlabel="step", ylabel="relative difference")
    ax.set_ylim(FLOOR / 2, 1)
    ax.legend(frameon=False, fontsize=8, loc=(0.3, 0.32))


def metrics(ax: Axes, document: dict[str, Any]) -> None:
    name = next(iter(document["runs"]))
    after = document["runs"][name]["after"]
    reference = document["runs"][document["runs"][name]["reference"]]["after"]
    before, pixels = document["start"]["untrained"], document["start"]["raw pixels"]
    rows = np.arange(len(METRICS))[::-1]

    def values(of: dict[str, float]) -> list[float]:
        return [of[key] for key in METRICS]

    ax.hlines(rows, values(before), values(after), color=PALE, lw=5)
    ax.plot(values(pixels), rows, "|", color=GREY, ms=16, mew=2, label="raw pixels")
    ax.plot(values(before), rows, "o", color="white", mec=DARK, ms=9, label="untrained")
    ax.plot(values(reference), rows, "o", color=PALE, ms=14, label="trained: reference")
    ax.plot(values(after), rows, "o", color=DARK, ms=8, label=f"trained: {name}")
    for row, value in zip(rows, values(after), strict=True):
        ax.annotate(f"{value:.3f}", (value, row), (0, 12), textcoords="offset points", ha="center")
    ax.set_yticks(rows, list(METRICS.values()))
    ax.set(title="Retrieval of the unseen digits 5-9", xlim=(0.4, 1.03), ylim=(-0.9, len(METRICS) - 0.5))
    ax.legend(frameon=False, fontsize=8, loc="lower right")
