"""Table 1 of Wang et al., CVPR 2019: which similarities the weight of a negative pair depends on, S, P and N.

studies/dependence.py defines the three and looks for them by moving similarities; here its finding is held against the
table, row by row, also of the ablation's Table 2. Where a definition decides:

Triplet: a weight is a count of triplets, of steps 0 and 1, so that only finite moves see what it depends on.
Histogram: its bins stand still. Moved by whole bins the weights stay, which is the table's "not S"; by a part of a bin
    they do not.
Lifted structure: eq. 6's hinge compares negatives with positives, which makes a P where it closes. With the margin 1
    and similarities in [-1, 1] it cannot close for three negatives or more (LSE_P(1 - s) >= 0, LSE_N(s) >= log 3 - 1
    > 0), and the paper speaks of the open hinge; with a low margin it does close.

At odds with the table, and tested as the mathematics has it:

N-pairs: printed as N, because the supplement takes it for lifted structure with one positive. But its weight is
    e^n / (e^p + sum e^n), NCA's, which has a P in the same table: lifted structure's two logarithms are a sum, whose
    derivative splits, N-pair's one logarithm does not split.
Binomial_m (Table 2): printed as SP. Eq. 9 divides by the number of negatives, of which mining keeps more or fewer as
    they come near the positives, each by itself: the number depends on the other negatives, so there is an N. But for
    that divisor there is none. The same holds of mining alone with means in place of sums.
"""

from __future__ import annotations

import pytest
import torch

import flashpair
from bench.studies import weights as pictures
from bench.studies.dependence import (
    OTHERS,
    PAIR,
    PUBLISHED,
    SHIFT,
    STUDIED,
    Dependence,
    dependence,
    labels,
    moved,
    random_similarities,
    weights,
)
from flashpair.tools.check import batch

TRUE = {**PUBLISHED, "N-pairs": "PN", "Binomial_m": "SPN"}
SUM = {"reduction": "sum"}


@pytest.mark.parametrize("name", STUDIED)
def test_the_published_table(name):
    assert dependence(STUDIED[name]).word == TRUE[name]


@pytest.mark.parametrize(
    ("criterion", "word"),
    [
        (flashpair.GeneralizedLiftedStructureLoss(-1.5, **SUM), "PN"),  # the hinge closes
        (flashpair.MinedPairLoss(weights="row_mean", **SUM), "PN"),
        (flashpair.BinLiftedLoss(normalized=True, **SUM), "SN"),
        (flashpair.TripletMarginLoss(0.2, "cosine", smooth=True, **SUM), "P"),
        (flashpair.TripletMarginLoss(0.2, "euclidean", **SUM), "P"),
        (flashpair.ContrastiveLoss(1.0, 0.5, "cosine", 2, **SUM), "S"),
        (flashpair.ContrastiveLoss(1.0, 0.5, "cosine", reduction="nonzero"), "SN"),  # divided by those above 0
        (flashpair.NCALoss(**SUM), "PN"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_definitions_that_decide(criterion, word):
    assert dependence(criterion).word == word


OTHER_WORDS = {
    "Triplet, hardest": "PN", "NT-Xent": "PN", "SupCon": "PN", "Circle": "SPN", "Margin": "S", "SNR": "S",
    "FastAP": "PN", "Lifted, original": "PN", "N-pairs, one-vs-one": "P", "Intra-pair variance": "SN",
}  # fmt: skip


@pytest.mark.parametrize("name", OTHER_WORDS)
def test_losses_outside_of_the_table(name):
    assert dependence(OTHERS[name]).word == OTHER_WORDS[name]


class Planted(flashpair.Criterion):
    """A negative's weight is f(s, the sum of the positives', the sum of the negatives'), whatever f is given."""

    def __init__(self, slope):
        super().__init__(normalize=False, reduction="sum", impl="reference")
        self.slope = slope

    def row_losses(self, pairs):
        pos, neg = pairs.masks["positives"], pairs.masks["negatives"]
        z = pairs.z.detach()
        of_row = (torch.where(mask, z, 0.0).sum(1, keepdim=True) for mask in (pos, neg))
        losses = torch.where(neg, self.slope(z, *of_row) * pairs.z, 0.0).sum(1)
        return flashpair.RowLosses(losses, neg.any(1), len(losses))


@pytest.mark.parametrize(
    ("slope", "word"),
    [
        (lambda s, p, n: torch.ones_like(s), ""),
        (lambda s, p, n: s.exp(), "S"),
        (lambda s, p, n: (2 * s - p).exp(), "P"),  # two positives a row
        (lambda s, p, n: (2 * s > p).double() + 1, "P"),
        (lambda s, p, n: (6 * s - n).exp(), "N"),  # six negatives
        (lambda s, p, n: (6 * s - n).exp() + (2 * s - p).exp(), "PN"),
        (lambda s, p, n: (0 * s + p).exp(), "SP"),
        (lambda s, p, n: (0 * s + n - p).exp() + 1, "SPN"),
        (lambda s, p, n: 1 + 1e-5 * torch.tanh(6 * s - n), "N"),
    ],
)
def test_what_was_planted_is_found(slope, word):
    assert dependence(Planted(slope)).word == word


def test_words():
    assert [Dependence(*map(bool, bits)).word for bits in ((1, 0, 0), (0, 1, 1), (0, 0, 0))] == ["S", "PN", ""]


@pytest.mark.parametrize("which", "SPN")
def test_a_move_leaves_the_rest_alone(which):
    generator = torch.Generator().manual_seed(1)
    s, who = random_similarities(generator, -0.6, 0.6), labels()
    same = who[:, None] == who
    mine = torch.zeros_like(same)
    mine[PAIR] = mine[PAIR[::-1]] = True
    off = ~torch.eye(len(who), dtype=torch.bool)
    assert not same[PAIR]
    for after in moved(generator, s, which, PAIR):
        change = after - s
        assert torch.equal(after, after.T)
        assert after[off].abs().max() <= 1
        if which == "S":
            assert change[PAIR].abs() > SHIFT / 2
            assert (change - change[PAIR]).abs().max() < 1e-12
        else:
            moves = same & off if which == "P" else ~same & ~mine
            assert (change[moves] != 0).all()
            assert (change[off & ~moves] == 0).all()


def test_weights_of_similarities_are_those_of_embeddings():
    x, who = batch(12, 5, 3, torch.float64)
    x = torch.nn.functional.normalize(x)
    for name in ("Binomial", "Triplet", "MS", "NCA", "N-pairs", "Histogram"):
        found, truth = weights(STUDIED[name], x @ x.T, who), flashpair.pair_weights(STUDIED[name], x, who).abs()
        torch.testing.assert_close(found, truth, rtol=1e-9, atol=1e-12)


def negative_and_rest(seed):
    """Similarities, the pair's own, its anchor's positives', its anchor's negatives'."""
    s, who = random_similarities(torch.Generator().manual_seed(seed)), labels()
    anchor, other = PAIR
    same = (who == who[anchor]) & (torch.arange(len(who)) != anchor)
    return s, s[anchor, other], s[anchor][same], s[anchor][who != who[anchor]]


@pytest.mark.parametrize("seed", range(3))
def test_npairs_is_ncas_weight(seed):
    """Of one positive and the classes' second samples, as the criterion takes them."""
    s, own, pos, neg = negative_and_rest(seed)
    seconds = neg[1::3]
    expected = own.exp() / (pos[0].exp() + seconds.exp().sum())
    torch.testing.assert_close(weights(STUDIED["N-pairs"], s, labels())[PAIR], expected)
    expected = own.exp() / (pos.exp().sum() + neg.exp().sum())
    torch.testing.assert_close(weights(STUDIED["NCA"], s, labels())[PAIR], expected)


def test_mined_binomial_depends_on_negatives_by_their_number_alone():
    generator, criterion, numbers, seen = torch.Generator().manual_seed(0), STUDIED["Binomial_m"], set(), 0
    for seed in range(20):
        s, own, pos, _ = negative_and_rest(seed)
        if own <= pos.min() - 0.1:
            continue
        expected = 50 * torch.sigmoid(50 * (own - 0.5))
        for after in (s, *moved(generator, s, "N", PAIR)):
            number = int((after[PAIR[0]][labels() != 0] > pos.min() - 0.1).sum())
            torch.testing.assert_close(weights(criterion, after, labels())[PAIR] * number, expected)
            numbers.add(number)
            seen += 1
    assert seen > 20
    assert len(numbers) > 2


def test_histogram_bins_stand_still():
    criterion, moves = STUDIED["Histogram"], {True: 0, False: 0}
    for seed in range(10):
        s = random_similarities(torch.Generator().manual_seed(seed), -0.6, 0.6)
        before = weights(criterion, s, labels())
        for whole, by in ((True, SHIFT), (True, -SHIFT), (False, SHIFT / 2)):
            after = weights(criterion, s + by, labels())
            moves[whole] += not torch.allclose(before, after, rtol=1e-7, atol=1e-12)
    assert moves[True] == 0
    assert moves[False] > 5


def test_the_drawn_table_is_the_computed_one(monkeypatch):
    """Ticks where `dependence` says so, a ring where the paper says otherwise."""
    monkeypatch.setattr(pictures, "LOSSES", {"Contrastive": None, "Triplet": None, "SupCon": None})
    monkeypatch.setattr(pictures, "dependence", lambda criterion: Dependence(True, False, True))
    (axes,) = pictures.draw_table().axes
    ticks = {text.get_position() for text in axes.texts if text.get_text()}
    rings = {(int(line.get_xdata()[0]), int(line.get_ydata()[0])) for line in axes.lines if line.get_marker() == "o"}
    assert ticks == {(k, row) for k in range(3) for row in (0, 2)}
    assert rings == {(0, 2), (1, 0), (1, 1), (1, 2)}  # printed: S, P, and nothing


def test_curves_are_weights():
    at = torch.tensor([-0.2, 0.4, 0.6], dtype=torch.float64)
    negative, positive = pictures.OWN_NEGATIVE, pictures.OWN_POSITIVE
    contrastive, binomial = STUDIED["Contrastive"], STUDIED["Binomial"]
    assert pictures.curve(contrastive, negative, at).tolist() == [0, 0, 1]
    assert pictures.curve(contrastive, positive, at).tolist() == [1, 1, 1]
    number = (pictures.CLASSES - 1) * pictures.PER_CLASS
    expected = 50 / number * torch.sigmoid(50 * (at - 0.5))
    torch.testing.assert_close(pictures.curve(binomial, negative, at), expected)
    margin = pictures.curve(OTHERS["Margin"], negative, at)  # of the true distance, 1.4 is s = 0.02
    assert margin.tolist() == [0, 1, 1]


def test_maps_have_a_colour_bar(monkeypatch):
    """It names the quantity and its scale, and is the scale of every panel; one more is of the similarities."""
    names = ("MS", "Margin")
    monkeypatch.setattr(pictures, "LOSSES", {name: pictures.LOSSES[name] for name in names})
    figure = pictures.draw_maps()
    maps = {axes.get_title(loc="left"): axes.images[0] for axes in figure.axes if axes.images}
    bars = {
        bar.ax.get_xlabel().partition(",")[0]: bar for axes in figure.axes if (bar := getattr(axes, "_colorbar", None))
    }
    assert list(maps) == ["similarities", *names]
    assert list(bars) == ["weight |w|", "similarity s (cosine)"]
    weight, similarity = bars.values()
    assert "log scale" in weight.ax.get_xlabel()
    for name in names:
        assert maps[name].cmap == weight.mappable.cmap and maps[name].norm is weight.mappable.norm
        assert maps[name].get_array().max() == 1
    assert maps["similarities"].norm is similarity.mappable.norm
    assert maps["similarities"].cmap == similarity.mappable.cmap


def test_the_command_draws(tmp_path, monkeypatch, capsys):
    names = ("MS", "Margin", "N-pairs")
    monkeypatch.setattr(pictures, "LOSSES", {name: pictures.LOSSES[name] for name in names})
    monkeypatch.setattr(pictures, "POINTS", 5)
    pictures.main(["--out", str(tmp_path)])
    printed = capsys.readouterr().out.split()
    assert [line.rsplit("/")[-1] for line in printed] == [f"weights-{name}.png" for name in ("curves", "maps", "table")]
    for path in tmp_path.iterdir():
        assert path.stat().st_size > 10_000
