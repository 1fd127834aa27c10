"""The style of flashpair's pictures, those of `python -m flashpair` and those of `python -m bench`.

A picture is WIDTH inches wide, for a page that shows it 800 pixels wide: there a point is 1.4 pixels.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..core.extras import extra

if TYPE_CHECKING:
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure

WIDTH, DPI = 8.0, 200  # inches, pixels an inch
TITLE, TEXT, SMALL = 12, 9, 8  # points
TITLE_LETTERS, SMALL_LETTERS = 78, 122  # that fit into a line
MARGIN, KEY = 0.1, 0.3  # inches: around the texts, and for a legend under the title
LINE = 1.4 / 72  # inches of height of a line of text, for each point
THIN, THICK, DASHED = 1.6, 2.4, (0, (4, 1.5))

# Ordered by lightness, far enough apart that a grey print and any kind of colour vision tell them from one another.
INK, BLUE, PURPLE, GREEN, GREY, ORANGE, SKY = (
    "#222222", "#08459a", "#a03a8c", "#1f8a63", "#909090", "#e69f00", "#94d0f5",
)  # fmt: skip
COLOURS = (INK, BLUE, PURPLE, GREEN, GREY, ORANGE, SKY)
PALE, GRID, FILL, EMPTY = "#5a5a5a", "#e4e4e4", "#dcebf8", "#f7f7f7"
SIMILARITY_MAP = "Greys"


class Look(NamedTuple):
    """A series' colour and marker. Each of the two alone identifies the series."""

    colour: str
    marker: str


LOOKS = (
    Look(BLUE, "o"), Look(ORANGE, "^"), Look(GREY, "s"), Look(PURPLE, "D"), Look(GREEN, "v"), Look(SKY, "P"),
    Look(INK, "X"),
)  # fmt: skip

RC: dict[str, Any] = {
    "font.size": TEXT,
    "text.color": INK,
    "axes.titlesize": TEXT + 1,
    "axes.titlelocation": "left",
    "axes.titlepad": 6,
    "axes.labelsize": TEXT,
    "axes.labelcolor": INK,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.spines.left": False,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.spines.bottom": False,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "lines.linewidth": THIN,
    "lines.markersize": 4.5,
    "legend.fontsize": TEXT,
    "legend.frameon": False,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.labelsize": TEXT,
    "ytick.labelsize": TEXT,
    **{f"{axis}tick.{which}.size": 0 for axis in "xy" for which in ("major", "minor")},
}


@contextmanager
def styled() -> Iterator[None]:
    """Applies the style to everything drawn inside, or by a function under `@styled()`, whatever matplotlibrc says."""
    with extra("reality-check", "a picture"):
        from matplotlib import style
    with style.context(["default", RC]):
        yield


def wrapped(text: str, letters: int) -> str:
    """Breaks each line of a text into lines of so many letters."""
    return "\n".join("\n".join(textwrap.wrap(line, letters)) for line in text.splitlines())


def page(high: float, title: str, said: str = "", foot: str = "", key: bool = False) -> Figure:
    """A figure with a title, a line under it, and one at the foot.

    Args:
        high: inches for the panels, between title and foot. key: whether to leave room for `legend`.
    """
    with extra("reality-check", "a picture"):
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine

    title, said, foot = wrapped(title, TITLE_LETTERS), wrapped(said, SMALL_LETTERS), wrapped(foot, SMALL_LETTERS)

    def height(text: str, size: int) -> float:
        return (text.count("\n") + 1) * size * LINE if text else 0.0

    first = MARGIN + height(title, TITLE) + 0.04
    top = first + height(said, SMALL) + MARGIN + KEY * key
    bottom = height(foot, SMALL) + MARGIN if foot else MARGIN / 2
    whole = top + high + bottom
    at = MARGIN / 2 / WIDTH
    engine = ConstrainedLayoutEngine(rect=(at, bottom / whole, 1 - 2 * at, high / whole))
    figure = Figure(figsize=(WIDTH, whole), layout=engine)
    figure.text(at, 1 - MARGIN / whole, title, fontsize=TITLE, weight="bold", va="top", parse_math=False)
    figure.text(at, 1 - first / whole, said, fontsize=SMALL, color=PALE, va="top", parse_math=False)
    figure.text(at, MARGIN / 2 / whole, foot, fontsize=SMALL, color=PALE, va="bottom", parse_math=False)
    return figure


def legend(figure: Figure, handles: Iterable[Any]) -> None:
    """Puts the legend in one line under the title; the page must have room for it."""
    handles = list(handles)
    engine = figure.get_layout_engine()
    assert engine is not None
    left, bottom, _, high = engine.get()["rect"]
    figure.legend(
        handles=handles, loc="lower left", bbox_to_anchor=(left, bottom + high), ncols=len(handles), borderaxespad=0.2
    )


def weights_map() -> ListedColormap:
    """Colours for values above zero, ever darker. The first differs from white, which means no value."""
    with extra("reality-check", "a picture"):
        from matplotlib import colormaps
        from matplotlib.colors import ListedColormap

    whole, steps = colormaps["YlGnBu"], 256
    return ListedColormap([whole(0.14 + 0.86 * k / (steps - 1)) for k in range(steps)], name="weights")


def save(figure: Figure, path: Path) -> None:
    figure.savefig(path, dpi=DPI)
