"""How rows become one number: every word that each loss takes, and terms written down one by one."""

from __future__ import annotations

import pytest
import torch
from conftest import needs_extension
from helpers import CRITERIA, assert_same, batch, made
from torch import nn

IMPLS = ["reference", pytest.param("tiled", marks=needs_extension)]
# What "mean" divides by in a batch of 10 classes of 4 and a single sample, where it is not N = 41: classes with a pair,
# ordered positive pairs, triplets.
MEANS = {
    "NPairsLoss": 10, "NPairsLoss('ovo')": 10, "NPairsLoss('all_pairs')": 120, "LiftedStructureLoss": 120,
    "NTXentLoss": 120, "TupletMarginLoss": 120, "AngularLoss": 120, "AngularLoss(form='hinge')": 4440,
    "TripletMarginLoss": 4440, "TripletMarginLoss(distance='cosine', smooth=True)": 4440,
    "TripletMarginLoss(power=2)": 4440, "TripletMarginLoss(triplets='semihard')": 120,
    "TripletMarginLoss(triplets='semihard_all')": 4440,
}  # fmt: skip
MINED = ("MultiSimilarityLoss", "LiftedStructureStarLoss(epsilon=0.1)", "BinomialDevianceLoss(epsilon=0.1)")
MINED += ("MinedPairLoss",)
# Rows that have a loss: those with a pair of either side, where not those with a positive.
PER_SIDE = ("ContrastiveLoss", "SNRContrastiveLoss", "BinomialDevianceLoss", "BinLiftedLoss")
SHARES = ("CircleLoss(over='batch')", "IntraPairVarianceLoss", "HistogramLoss", "ProxyAnchorLoss")


def _rows_with_a_loss(name, rows):
    if name in MINED:
        return int((rows != 0).sum())
    if name in ("NPairsLoss", "NPairsLoss('ovo')"):
        return 10
    per_side = name.startswith(PER_SIDE) or name in ("MultiSimilarityLoss(epsilon=None)", "MarginLoss")
    return 41 if per_side or hasattr(made(name, 6), "weight") else 40


LEARNED = torch.tensor(1.2).double()  # a Parameter is of torch's default dtype


class _Pairs:
    """Dense similarities and distances of normalised embeddings, and which pairs and triplets there are."""

    def __init__(self, x, labels):
        self.x = nn.functional.normalize(x)
        self.s, self.d = self.x @ self.x.T, torch.cdist(self.x, self.x, compute_mode="donot_use_mm_for_euclid_dist")
        same = labels[:, None] == labels
        self.pos, self.neg = same & ~torch.eye(len(x)).bool(), ~same
        self.triplets = self.pos[:, :, None] & self.neg[:, None, :]

    def gaps(self, z):
        """z_ap - z_an of every triplet."""
        return (z[:, :, None] - z[:, None, :])[self.triplets]

    def band(self):
        gap = -self.gaps(self.s)  # s_an - s_ap
        return (gap + 0.2) * ((gap < 0) & (gap > -0.2))

    def nearest_farther(self):
        """Of each positive pair with its nearest negative that is farther, or else the farthest."""
        negatives = self.d.masked_fill(~self.neg, torch.inf)[:, None, :].expand(-1, len(self.x), -1)
        near = negatives.masked_fill(negatives <= self.d[:, :, None], torch.inf).amin(2)
        last = self.d.masked_fill(~self.neg, -torch.inf).amax(1, keepdim=True)
        return [(self.d - torch.where(near.isinf(), last, near) + 0.2)[self.pos].relu()]

    def ratios(self):
        centred = self.x - self.x.mean(1, keepdim=True)
        r = torch.cdist(centred, centred).square() / centred.square().sum(1, keepdim=True)
        return [(r[self.pos] - 0.1).relu(), (1.2 - r[self.neg]).relu()]

    def angles(self):
        middle = (self.x[:, None] + self.x[None]) / 2
        far = torch.cdist(middle.flatten(0, 1), self.x).square().view(len(self.x), len(self.x), -1)
        return (self.d.square()[:, :, None] - 4 / 3 * far)[self.triplets].relu()  # tan(30 degrees)^2 is 1 / 3

    def boundary(self, beta):
        return (self.d + (0.2 - beta)).relu(), ((0.2 + beta) - self.d).relu()

    def boundary_of_triplets(self):
        pos, neg = self.boundary(1.2)
        return [torch.cat([pos[:, :, None].expand_as(self.triplets)[self.triplets],
                           neg[:, None, :].expand_as(self.triplets)[self.triplets]])]  # fmt: skip


# Losses that average terms: the terms of each kind, written down one by one.
TERMS = {
    "ContrastiveLoss": lambda p: [p.d[p.pos], (1 - p.d[p.neg]).relu()],
    "ContrastiveLoss(0.9, 0.2, 'cosine')": lambda p: [(0.9 - p.s[p.pos]).relu(), (p.s[p.neg] - 0.2).relu()],
    "ContrastiveLoss(power=2)": lambda p: [p.d[p.pos].square() / 2, (1 - p.d[p.neg]).relu().square() / 2],
    "SNRContrastiveLoss": _Pairs.ratios,
    "TripletMarginLoss": lambda p: [(p.gaps(p.d) + 0.2).relu()],
    "TripletMarginLoss(distance='cosine', smooth=True)": lambda p: [nn.functional.softplus(0.2 - p.gaps(p.s))],
    "TripletMarginLoss(power=2)": lambda p: [(p.gaps(p.d.square()) + 0.2).relu()],
    "TripletMarginLoss(triplets='semihard')": _Pairs.nearest_farther,
    "TripletMarginLoss(triplets='semihard_all')": lambda p: [p.band()],
    "AngularLoss(form='hinge')": lambda p: [p.angles()],
    "MarginLoss": lambda p: [torch.cat([p.boundary(LEARNED)[0][p.pos], p.boundary(LEARNED)[1][p.neg]])],
    "MarginLoss(mode='triplets')": _Pairs.boundary_of_triplets,
}


def _of_terms(name, x, labels):
    """ "sum", "nonzero" and "mean_pairs" of a loss of TERMS, and what is added beside the terms."""
    kinds = TERMS[name](_Pairs(x, labels))
    sums, above = [k.sum() for k in kinds], [(k > 0).sum() for k in kinds]
    if name == "SNRContrastiveLoss":  # a mean over embeddings, added to every row
        extra = 0.1 * nn.functional.normalize(x).sum(1).abs().mean()
        sums_and_more, more = sum(sums) + 41 * extra, extra
    else:  # nu times the rows' boundaries, divided as the pairs are
        extra = 41 * 0.01 * LEARNED if name == "MarginLoss" else 0.0
        sums_and_more, more = sum(sums) + extra, extra / above[0]
    averages = [sum(s / n for s, n in zip(sums, counts, strict=True)) + more
                for counts in (above, [k.numel() for k in kinds])]  # fmt: skip
    return sums_and_more, *averages


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", CRITERIA)
def test_reductions_agree_with_the_rows(name, impl):
    x, labels = batch(41, 6, 4, torch.float64)  # 41 is 10 classes of 4 and a single sample
    words = CRITERIA[name]().averagings
    found = {word: CRITERIA[name](impl=impl, reduction=word)(x, labels) for word in words}
    assert set(words) >= {"mean", "sum", "none", "mean_valid", "nonzero"}
    rows = found["none"]
    assert rows.shape == ((200,) if name == "ProxyAnchorLoss" else (41,))
    assert rows.any()
    assert_same(found["sum"], rows.sum())
    if name in SHARES:
        for word in set(words) - {"none"}:
            assert_same(found[word], rows.sum())
        return
    assert_same(found["mean"], rows.sum() / MEANS.get(name, 41))
    assert_same(found["mean_valid"], rows.sum() / _rows_with_a_loss(name, rows))
    if name not in TERMS:
        assert_same(found["nonzero"], rows[rows > 0].mean() if (rows > 0).any() else rows.sum() * 0)
        return
    total, nonzero, mean_pairs = _of_terms(name, x, labels)
    assert_same(found["sum"], total)
    assert_same(found["nonzero"], nonzero)
    if "mean_pairs" in words:
        assert_same(found["mean_pairs"], mean_pairs)


def test_every_loss_of_terms_has_them_written_down():
    """What the rows' own `terms` say, so that a new loss of terms is not averaged by rows unseen."""
    x, labels = batch(41, 6, 4, torch.float64)
    for name in CRITERIA:
        criterion = made(name, 6, impl="reference", reduction="nonzero")
        if name == "SoftTripleLoss":
            continue  # has no pairs
        rows = criterion.row_losses(criterion.pairs_of(*criterion.check(x, labels, None, None), "reference"))
        assert bool(rows.terms) == (name in TERMS), name
        assert rows.shares == (name in SHARES), name
