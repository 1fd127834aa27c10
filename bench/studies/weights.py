"""Pictures of General Pair Weighting, the weight that each loss gives to a pair: `python -m bench weights`.

weights-curves.png  |w| of one negative, and of one positive, of an anchor over the pair's own similarity, others fixed
weights-maps.png    |W| of a small clustered batch, sorted by class, by flashpair.pair_weights
weights-table.png   which similarities a negative's weight depends on, found by trying (dependence.py)
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from torch import Tensor

import flashpair
from flashpair.losses.base import Criterion
from flashpair.tools import plot_style
from flashpair.tools.plot_style import BLUE, EMPTY, FILL, GRID, INK, ORANGE, PALE, SMALL, TEXT

from ..harness.arguments import PICTURES as FOLDER
from .dependence import OTHERS, PUBLISHED, STUDIED, dependence, weights

LOSSES = {**STUDIED, **OTHERS}
NEGATIVE = {"color": BLUE, "lw": 2.2}
POSITIVE = {"color": ORANGE, "lw": 1.9, "ls": plot_style.DASHED}  # drawn last: the other shows in its gaps
CLASSES, PER_CLASS, WIDTH = 8, 4, 8
ANCHOR, OWN_POSITIVE, OWN_NEGATIVE = 0, 1, PER_CLASS + 1
POINTS = 201
CURVES_ACROSS, MAPS_ACROSS = 4, 5
PANEL = 1.4  # inches of height, with its title and ticks
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


def _panel(axes: Axes, title: str) -> None:
    axes.set_title(title, fontsize=TEXT, pad=3)
    axes.tick_params(labelsize=SMALL)


@plot_style.styled()
def draw_curves() -> Figure:
    said = (
        "One pair of an anchor moves, and the anchor's other pairs stay where the strokes under each panel show them; "
        "all pairs of other anchors stay, too. The loss is the sum of all rows' losses."
    )
    rows = math.ceil(len(LOSSES) / CURVES_ACROSS)
    figure = plot_style.page(PANEL * rows + 0.2, "Weight |w| of a negative and of a positive pair", said, key=True)
    panels = list(figure.subplots(rows, CURVES_ACROSS, squeeze=False).flat)
    for axes in panels[len(LOSSES) :]:
        axes.remove()
    x, labels = batch()
    row = x[ANCHOR] @ x.T
    others = torch.arange(len(labels)) != ANCHOR
    same = (labels == labels[ANCHOR]) & others
    at = torch.linspace(-0.995, 0.995, POINTS, dtype=torch.float64)
    for (name, criterion), axes in zip(LOSSES.items(), panels, strict=False):
        for other, look, mask in ((OWN_NEGATIVE, NEGATIVE, ~same & others), (OWN_POSITIVE, POSITIVE, same)):
            axes.plot(at.tolist(), curve(criterion, other, at).tolist(), **look)
            where = row[mask & (torch.arange(len(labels)) != other)].tolist()
            below = axes.get_xaxis_transform()
            axes.plot(where, [-0.05] * len(where), "|", color=look["color"], ms=5, transform=below, clip_on=False)
        _panel(axes, name)
        axes.set(xlim=(-1, 1), xticks=(-1, 0, 1))
        axes.set_ylim(0, max(axes.get_ylim()[1], 1e-12) * 1.05)
        axes.locator_params(axis="y", nbins=3)
        axes.tick_params(axis="x", pad=8)
    figure.supxlabel("the pair's similarity s (cosine)", fontsize=TEXT)
    figure.supylabel("the pair's weight |w| (no unit)", fontsize=TEXT)
    stroke = Line2D([], [], color=PALE, marker="|", ls="", ms=7, label="the anchor's other pairs")
    pair = [Line2D([], [], label=f"the {word} pair", **look) for word, look in
            (("negative", NEGATIVE), ("positive", POSITIVE))]  # fmt: skip
    plot_style.legend(figure, [*pair, stroke])
    return figure


@plot_style.styled()
def draw_maps() -> Figure:
    x, labels = batch()
    said = f"{CLASSES} classes of {PER_CLASS} embeddings, sorted; the lines part classes. White: no weight."
    rows = math.ceil((len(LOSSES) + 1) / MAPS_ACROSS)
    figure = plot_style.page(1.62 * rows + 0.75, "Weights |w| of all pairs of a small batch", said)
    bars, below = figure.subfigures(2, 1, height_ratios=(0.55, 1.62 * rows + 0.2))
    panels = list(below.subplots(rows, MAPS_ACROSS, squeeze=False).flat)
    for axes in panels[len(LOSSES) + 1 :]:
        axes.remove()
    panels = panels[: len(LOSSES) + 1]
    share, cosine = LogNorm(10.0**-DECADES, 1), Normalize(-1, 1)
    colours = plot_style.weights_map()
    panels[0].imshow((x @ x.T).numpy(), cmap=plot_style.SIMILARITY_MAP, norm=cosine, interpolation="nearest")
    _panel(panels[0], "similarities")
    for (name, criterion), axes in zip(LOSSES.items(), panels[1:], strict=True):
        w = flashpair.pair_weights(criterion, x, labels).abs()
        shown = torch.where(w > 0, (w / w.max().clamp_min(1e-12)).clamp_min(10.0**-DECADES), torch.nan)
        axes.imshow(shown.numpy(), cmap=colours, norm=share, interpolation="nearest")
        _panel(axes, name)
    for axes in panels:
        axes.set(xticks=[], yticks=[])
        for edge in range(0, len(labels) + 1, PER_CLASS):
            axes.axhline(edge - 0.5, color=GRID, lw=0.4)
            axes.axvline(edge - 0.5, color=GRID, lw=0.4)
    below.supxlabel("other embedding j", fontsize=TEXT)
    below.supylabel("anchor i", fontsize=TEXT)
    for axes, of, name in zip(
        bars.subplots(1, 2, width_ratios=(3, 2), gridspec_kw={"wspace": 0.12}),
        (ScalarMappable(share, colours), ScalarMappable(cosine, plot_style.SIMILARITY_MAP)),
        (f"weight |w|, of the panel's largest (log scale; $10^{{-{DECADES}}}$: or less)", "similarity s (cosine)"),
        strict=True,
    ):
        bar = figure.colorbar(of, cax=axes, orientation="horizontal")
        bar.set_label(name, fontsize=SMALL)
        bar.ax.tick_params(labelsize=SMALL)
    bar.set_ticks([-1, -0.5, 0, 0.5, 1])
    return figure


@plot_style.styled()
def draw_table() -> Figure:
    found = {name: dependence(criterion) for name, criterion in LOSSES.items()}
    words = "Found by moving similarities. Left of the line: losses of Wang et al. (2019), Tables 1 and 2; "
    figure = plot_style.page(
        2.4, "Which similarities a negative pair's weight depends on", f"{words}a ring: these say otherwise."
    )
    axes = figure.add_subplot()
    for k, (name, ticks) in enumerate(found.items()):
        for row, (letter, there) in enumerate(zip("SPN", ticks, strict=True)):
            axes.add_patch(Rectangle((k - 0.5, row - 0.5), 1, 1, color=FILL if there else EMPTY, lw=0))
            axes.text(k, row, "✓" if there else "", ha="center", va="center", fontsize=TEXT + 1)
            if there != (letter in PUBLISHED.get(name, ticks.word)):
                axes.plot(k, row, "o", ms=13, mfc="none", mec=ORANGE, mew=2)
    axes.set(xlim=(-0.5, len(found) - 0.5), ylim=(2.5, -0.5), ylabel="depends on")
    axes.set_yticks(range(3), ["S: its own", "P: relative to positives", "N: relative to negatives"])
    axes.set_xticks(range(len(found)), list(found), rotation=60, ha="left", rotation_mode="anchor")
    axes.xaxis.tick_top()
    axes.grid(visible=False)
    for edge in range(len(found) + 1):
        axes.axvline(edge - 0.5, color="white", lw=2)
    for edge in (0.5, 1.5):
        axes.axhline(edge, color="white", lw=2)
    axes.axvline(len(STUDIED) - 0.5, color=INK, lw=1)
    return figure


PICTURES = {"curves": draw_curves, "maps": draw_maps, "table": draw_table}


def main(arguments: list[str] | None = None) -> None:
    p = argparse.ArgumentParser(prog="python -m bench weights", description=__doc__.split("\n")[0])
    p.add_argument("--pictures", nargs="+", choices=PICTURES, default=list(PICTURES))
    p.add_argument("--out", type=Path, default=FOLDER, metavar="FOLDER", help="for the PNGs")
    given = p.parse_args(arguments)
    given.out.mkdir(parents=True, exist_ok=True)
    for name in given.pictures:
        path = given.out / f"weights-{name}.png"
        plot_style.save(PICTURES[name](), path)
        print(path)
