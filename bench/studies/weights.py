"""Pictures of General Pair Weighting, what each loss of pairs gives to a pair: `python -m bench weights`.

weights-curves.png  |w| of one negative, and of one positive, of an anchor over the pair's own similarity, others fixed
weights-maps.png    |W| of a small clustered batch, sorted by class, by flashpair.pair_weights
weights-table.png   which similarities a negative's weight depends on, found by trying (dependence.py)
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from torch import Tensor

import flashpair
from flashpair.losses.base import Criterion

from ..harness.arguments import RESULTS
from ..harness.plot import GRID, INK, PALE
from .dependence import OTHERS, PUBLISHED, STUDIED, dependence, weights

LOSSES = {**STUDIED, **OTHERS}
POSITIVE, NEGATIVE = "#2a8c4a", "#cc3344"
CLASSES, PER_CLASS, WIDTH = 8, 4, 8
ANCHOR, OWN_POSITIVE, OWN_NEGATIVE = 0, 1, PER_CLASS + 1
POINTS = 201
COLUMNS = 7
DECADES = 4  # of a map's colours


def batch(seed: int = 0, noise: float = 0.35) -> tuple[Tensor, Tensor]:
    """Clustered unit embeddings (N, D) in float64, sorted by label (N,)."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(CLASSES, WIDTH, generator=generator, dtype=torch.float64)
    labels = torch.arange(CLASSES).repeat_interleave(PER_CLASS)
    x = torch.nn.functional.normalize(centres)[labels]
    x = x + noise * torch.randn(len(labels), WIDTH, generator=generator, dtype=torch.float64)
    return torch.nn.functional.normalize(x), labels


def of_unit_vectors(distance: str, s: Tensor) -> Tensor:
    """The criterion's z of a cosine."""
    squared = (2 - 2 * s).clamp_min(0)
    return {"dot": s, "euclidean": squared.sqrt(), "squared_euclidean": squared}[distance]


def curve(criterion: Criterion, other: int, at: Tensor) -> Tensor:
    """|w| of the pair of the anchor and `other` where its similarity is each of `at`, and no other one moves."""
    x, labels = batch()
    s, found = x @ x.T, []
    for own in at:
        s[ANCHOR, other] = s[other, ANCHOR] = own
        found.append(weights(criterion, s, labels, of_unit_vectors)[ANCHOR, other])
    return torch.stack(found)


def _bare(axes: Axes, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=9, color=INK, pad=4)
    axes.tick_params(length=0, labelsize=7, labelcolor=PALE)
    axes.spines[:].set_visible(False)


def _grid(title: str, said: str) -> tuple[Figure, list[Axes]]:
    rows = math.ceil((len(LOSSES) + 1) / COLUMNS)
    figure, grid = plt.subplots(rows, COLUMNS, figsize=(2.15 * COLUMNS, 2.15 * rows + 1.1), squeeze=False)
    high = figure.get_figheight()
    figure.subplots_adjust(
        left=0.03, right=0.99, wspace=0.28, hspace=0.38, top=1 - 1.05 / high, bottom=0.35 / high
    )  # fmt: skip
    figure.text(0.01, 1 - 0.12 / high, title, fontsize=14, weight="bold", color=INK, va="top")
    figure.text(0.01, 1 - 0.43 / high, said, fontsize=9, color=PALE, va="top")
    panels = list(grid.flat)
    for axes in panels[len(LOSSES) + 1 :]:
        axes.set_visible(False)
    return figure, panels


def draw_curves() -> Figure:
    said = (
        "Of one anchor, over the pair's own similarity, in the sum of all rows' losses. The anchor's other pairs stay"
    )
    said = f"{said} where the strokes under each panel show them, and so do all pairs of other anchors."
    figure, (key, *panels) = _grid("Weight |w| of a negative and of a positive pair", said)
    x, labels = batch()
    row = x[ANCHOR] @ x.T
    others = torch.arange(len(labels)) != ANCHOR
    same = (labels == labels[ANCHOR]) & others
    at = torch.linspace(-0.995, 0.995, POINTS, dtype=torch.float64)
    for (name, criterion), axes in zip(LOSSES.items(), panels, strict=False):
        for other, colour, mask in ((OWN_NEGATIVE, NEGATIVE, ~same & others), (OWN_POSITIVE, POSITIVE, same)):
            axes.plot(at.tolist(), curve(criterion, other, at).tolist(), color=colour, lw=1.8)
            where = row[mask & (torch.arange(len(labels)) != other)].tolist()
            below = axes.get_xaxis_transform()
            axes.plot(where, [-0.04] * len(where), "|", color=colour, ms=5, transform=below, clip_on=False)
        _bare(axes, name)
        axes.set(xlim=(-1, 1), xticks=(-1, 0, 1))
        axes.set_ylim(0, max(axes.get_ylim()[1], 1e-12) * 1.05)
        axes.locator_params(axis="y", nbins=3)
        axes.tick_params(axis="x", pad=9)
        axes.grid(color=GRID, lw=0.7)
        axes.set_axisbelow(True)
    key.set_axis_off()
    for height, colour, word in ((0.75, NEGATIVE, "the negative"), (0.5, POSITIVE, "the positive")):
        key.plot((0, 0.2), (height, height), color=colour, lw=1.8)
        key.text(0.26, height, word, color=colour, fontsize=10, va="center")
    key.text(0, 0.2, "|: the other pairs\nacross: similarity", color=PALE, fontsize=9, va="center")
    key.set(xlim=(0, 1), ylim=(0, 1))
    return figure


def draw_maps() -> Figure:
    x, labels = batch()
    said = (
        f"{CLASSES} classes of {PER_CLASS}, sorted; a row is an anchor. Colours reach from each panel's largest weight "
    )
    figure, (first, *panels) = _grid("Weights |W| of a small batch", f"{said}{DECADES} decades down; white: no weight.")
    first.imshow((x @ x.T).numpy(), cmap="gray_r", vmin=-1, vmax=1, interpolation="nearest")
    _bare(first, "similarities")
    first.set(xticks=[], yticks=[])
    for (name, criterion), axes in zip(LOSSES.items(), panels, strict=False):
        w = flashpair.pair_weights(criterion, x, labels).abs()
        most = max(w.max().item(), 1e-12)
        shown = torch.where(w > 0, w.clamp_min(most * 10.0**-DECADES), torch.nan)
        axes.imshow(shown.numpy(), cmap="YlGnBu", norm=LogNorm(most * 10.0**-DECADES, most), interpolation="nearest")
        _bare(axes, name)
        axes.set(xticks=[], yticks=[])
    for axes in (first, *panels[: len(LOSSES)]):
        for edge in range(0, len(labels) + 1, PER_CLASS):
            axes.axhline(edge - 0.5, color=GRID, lw=0.4)
            axes.axvline(edge - 0.5, color=GRID, lw=0.4)
    return figure


def draw_table() -> Figure:
    found = {name: dependence(criterion) for name, criterion in LOSSES.items()}
    figure, axes = plt.subplots(figsize=(0.43 * len(found) + 3.0, 4.1))
    figure.subplots_adjust(left=0.13, right=0.945, top=0.56, bottom=0.13)
    for k, (name, ticks) in enumerate(found.items()):
        for row, (letter, there) in enumerate(zip("SPN", ticks, strict=True)):
            axes.add_patch(plt.Rectangle((k - 0.5, row - 0.5), 1, 1, color="#dcebf8" if there else "#fafafa", lw=0))
            axes.text(k, row, "✓" if there else "", ha="center", va="center", fontsize=13, color=INK)
            if there != (letter in PUBLISHED.get(name, ticks.word)):
                axes.plot(k, row, "o", ms=19, mfc="none", mec=NEGATIVE, mew=1.6)
    axes.set(xlim=(-0.5, len(found) - 0.5), ylim=(2.5, -0.5))
    axes.set_yticks(
        range(3), ["S: its own", "P: relative to positives", "N: relative to negatives"], fontsize=9, color=INK
    )
    axes.set_xticks(
        range(len(found)), list(found), rotation=50, ha="left", rotation_mode="anchor", fontsize=9, color=INK
    )
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    for edge in range(len(found) + 1):
        axes.axvline(edge - 0.5, color="white", lw=2)
    for edge in (0.5, 1.5):
        axes.axhline(edge, color="white", lw=2)
    axes.axvline(len(STUDIED) - 0.5, color=PALE, lw=1)
    figure.text(
        0.005, 0.985, "Which similarities a negative pair's weight depends on", fontsize=13, weight="bold", va="top"
    )
    words = "Found by moving similarities. Left of the line: the losses of Wang et al., 2019, Tables 1 and 2; "
    figure.text(0.005, 0.03, words + "ringed: these say otherwise.", fontsize=9, color=PALE)
    return figure


PICTURES = {"curves": draw_curves, "maps": draw_maps, "table": draw_table}


def main(arguments: list[str] | None = None) -> None:
    p = argparse.ArgumentParser(prog="python -m bench weights", description=__doc__.split("\n")[0])
    p.add_argument("--pictures", nargs="+", choices=PICTURES, default=list(PICTURES))
    p.add_argument("--out", type=Path, default=RESULTS, metavar="FOLDER", help="for the PNGs")
    given = p.parse_args(arguments)
    given.out.mkdir(parents=True, exist_ok=True)
    for name in given.pictures:
        figure, path = PICTURES[name](), given.out / f"weights-{name}.png"
        figure.savefig(path, dpi=130)
        plt.close(figure)
        print(path)
