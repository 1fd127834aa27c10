"""Pictures: colours that a grey print tells apart; every axis is named, and no text is cut or covered."""

from __future__ import annotations

from itertools import combinations, pairwise

import matplotlib
import pytest
from matplotlib.colors import to_rgb
from matplotlib.text import Text

from bench.harness import plot
from bench.harness.arguments import PICTURES, RESULTS
from bench.studies import pictures, weights
from flashpair.tools import plot_style
from flashpair.tools.reality_check import report as reality_report


def lightness(colour) -> float:
    """CIE L*, 0 to 100, of which a good print shows a step of 2 or so; thin lines need more."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour)]
    luminance = sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))
    return 116 * luminance ** (1 / 3) - 16


def test_colours_differ_in_lightness():
    for one, other in combinations(plot_style.COLOURS, 2):
        assert abs(lightness(one) - lightness(other)) > 8, (one, other)
    assert max(map(lightness, plot_style.COLOURS)) < 82  # the paper has 100


def test_lines_differ_in_more_than_colour():
    for looks in (plot_style.LOOKS, [*plot.LOOKS.values(), *plot.OTHERS]):
        with_markers = [look for look in looks if look.marker]
        assert len({look.marker for look in with_markers}) == len({look.colour for look in with_markers})
        assert {look.colour for look in looks} <= set(plot_style.COLOURS)
    negative, positive = weights.NEGATIVE, weights.POSITIVE
    assert abs(lightness(negative["color"]) - lightness(positive["color"])) > 30
    assert negative.get("ls", "-") != positive["ls"]


def test_the_map_is_darker_all_the_way():
    shades = [lightness(plot_style.weights_map()(k / 50)) for k in range(51)]
    assert all(more < less for less, more in pairwise(shades))
    assert shades[0] < 96


def test_the_style_is_the_same_under_any_settings():
    with matplotlib.rc_context({"lines.linewidth": 9.0, "axes.facecolor": "black"}):
        with plot_style.styled():
            found = matplotlib.rcParams["lines.linewidth"], matplotlib.rcParams["axes.facecolor"]
        assert found == (plot_style.THIN, "white")
        assert matplotlib.rcParams["lines.linewidth"] == 9.0


def test_the_pages_pictures_are_those_that_can_be_redrawn():
    assert {path.stem for path in PICTURES.glob("*.png")} == set(pictures.NAMES)
    assert all((RESULTS / source).exists() for source in pictures.SOURCES.values())


def undrawn(axis):
    """Labels of ticks beyond an axis's ends, which are made but not drawn."""
    low, high = sorted(axis.get_view_interval())
    ticks = [*axis.get_major_ticks(), *axis.get_minor_ticks()]
    return {id(tick.label1) for tick in ticks if not low <= tick.get_loc() <= high}


def boxes(figure):
    """Of each text that is drawn: where it is; of an annotation without its stroke."""
    figure.draw_without_rendering()
    without = set().union(*(undrawn(axis) for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)))
    texts = [text for text in figure.findobj(Text) if text.get_visible() and text.get_text().strip()]
    return [(text.get_text(), Text.get_window_extent(text)) for text in texts if id(text) not in without]


@pytest.fixture(params=pictures.SOURCES)
def figure(request, tmp_path, monkeypatch):
    """Each picture of committed numbers, as it was saved."""
    saved = []
    for module in (plot_style, reality_report):
        monkeypatch.setattr(module, "save", lambda figure, path: saved.append(figure))
    pictures.draw(request.param, tmp_path)
    return saved[0]


def test_nothing_is_cut_or_covered_and_every_axis_is_named(figure):
    assert figure.get_figwidth() == plot_style.WIDTH
    found = boxes(figure)
    for words, box in found:
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1, words
    for (one, a), (other, b) in combinations(found, 2):
        across, up = min(a.x1, b.x1) - max(a.x0, b.x0), min(a.y1, b.y1) - max(a.y0, b.y0)
        assert across < 1 or up < 1, (one, other)
    columns = {}
    for axes in figure.axes:
        assert axes.get_ylabel()
        assert ("log scale" in axes.get_ylabel()) == (axes.get_yscale() == "log")
        columns[axes.get_position().x0] = axes  # the lowest comes last; those above it share its axis
    assert all(axes.get_xlabel() for axes in columns.values())
