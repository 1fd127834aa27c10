"""Rows that are equal: their similarities are the same number, and nothing is decided by how a product was rounded."""

from __future__ import annotations

import functools

import pytest
import torch
from conftest import needs_extension
from helpers import PAIR_CRITERIA, assert_same

import flashpair
from flashpair import miners, nearest
from flashpair.core.similarity import dense_pairs

# The smallest sizes at which a vendor's product rounds a column by where it stands, and larger ones.
SIZES = [(7, 16), (9, 5), (17, 17), (50, 33), (129, 16)]
IMPLS = ["reference", pytest.param("tiled", marks=needs_extension)]


def copied(n, d, seed, dtype=torch.float32):
    """Rows (n, d) of which each stands three times or so, with labels that do not look at that, and which is which."""
    generator = torch.Generator().manual_seed(seed)
    which = torch.randint(max(2, n // 3), (n,), generator=generator)
    rows = torch.randn(max(2, n // 3), d, generator=generator, dtype=dtype)[which]
    return rows, torch.randint(3, (n,), generator=generator), which


@pytest.mark.parametrize("unit", [False, True])
@pytest.mark.parametrize("distance", ["dot", "euclidean"])
@pytest.mark.parametrize("impl", ["reference", pytest.param("screened", marks=needs_extension)])
def test_neighbours_that_are_equal_stand_by_index(impl, distance, unit):
    for n, d in SIZES:
        for seed in range(3):
            x, _, which = copied(n, d, seed)
            values, indices = nearest(x, n - 1, distance=distance, normalize=unit, impl=impl)
            twins = which[indices[:, 1:]] == which[indices[:, :-1]]
            assert (values[:, 1:] == values[:, :-1])[twins].all()
            assert (indices[:, 1:] > indices[:, :-1])[twins].all()


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("distance", ["cosine", "euclidean"])
def test_a_copy_of_the_positive_is_as_near_as_it(distance, normalize):
    for n, d in SIZES:
        for seed in range(3):
            x, labels, which = copied(n, d, seed)
            same, copy = labels[:, None] == labels, which[:, None] == which
            positive = same & ~torch.eye(n, dtype=torch.bool)
            ties = sum(int((copy[p] & ~same[a]).sum()) for a, p in positive.nonzero().tolist())
            for kind, wanted in (("semihard_all", 0), ("hard_all", ties), ("violating", ties)):
                _, p, q = miners.TripletMarginMiner(0.2, distance, kind, normalize=normalize)(x, labels)
                assert int((which[p] == which[q]).sum()) == wanted, kind


# Tuplet margin's slope is infinite where a row and its copy are a positive pair.
FORMS = {name: make for name, make in PAIR_CRITERIA.items() if name != "TupletMarginLoss"} | {
    "MultiSimilarityLoss(epsilon=0.0)": functools.partial(flashpair.MultiSimilarityLoss, epsilon=0.0),
    "BinomialDevianceLoss(epsilon=0.0)": functools.partial(flashpair.BinomialDevianceLoss, epsilon=0.0),
    "MinedPairLoss(epsilon=0.0)": functools.partial(flashpair.MinedPairLoss, epsilon=0.0),
    "TripletMarginLoss(0.2, 'cosine', 'semihard')": functools.partial(
        flashpair.TripletMarginLoss, 0.2, "cosine", "semihard"
    ),
}


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", FORMS)
def test_a_gradient_to_be_differentiated_again_is_the_same_gradient(name, impl):
    """It is taken of the dense matrix, with the same pairs in every window, and the same of equal extremes."""
    for n, d in SIZES[:4]:
        for seed in range(2):
            x, labels, _ = copied(n, d, seed, torch.float64)
            x = x.requires_grad_()
            loss = FORMS[name](impl=impl, reduction="sum")(x, labels)
            plain, again = (torch.autograd.grad(loss, x, retain_graph=True, create_graph=g)[0] for g in (False, True))
            assert_same(again.detach(), plain, least=loss.item())


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("power", [1, 2])
def test_second_derivatives_between_equal_rows(power, impl):
    """A squared distance has them: 2 towards each other. The hinges are all open, or shut, by far."""
    x, labels, _ = copied(6, 3, 1, torch.float64)
    criterion = (
        flashpair.NCALoss(impl=impl, normalize=False)
        if power == 1
        else flashpair.TripletMarginLoss(100.0, power=2, normalize=False, impl=impl)
    )
    assert torch.autograd.gradgradcheck(lambda t: criterion(t, labels), (x.requires_grad_(),))


@pytest.mark.parametrize("distance", ["dot", "euclidean", "squared_euclidean"])
def test_the_dense_matrix_twice_differentiable(distance):
    x, _, _ = copied(5, 3, 0, torch.float64)
    y = torch.cat([x[:2], x[2:] + 1]) if distance == "squared_euclidean" else x + torch.linspace(1, 2, 3)
    assert torch.autograd.gradgradcheck(
        lambda a, b: dense_pairs(a, b, distance), (x.requires_grad_(), y.detach().requires_grad_())
    )


@needs_extension
@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("size", SIZES[2:])
def test_a_row_and_its_copy_are_no_positive_under_a_margin_of_1(size, power):
    """Whose cosine is 1 but for rounding, which may not make it one of those above 0 that a loss is averaged over."""
    x, _, which = copied(*size, 2)
    labels = which % 2
    unit = torch.nn.functional.normalize(x.double())
    s, same = unit @ unit.T, labels[:, None] == labels
    pos = torch.where(same & (which[:, None] != which), 1 - s, 0.0)
    neg = torch.where(same, 0.0, (s - 0.5).relu())
    of = [t**power / power for t in (pos, neg)]
    truth = sum(t.sum() / (t > 0).sum().clamp_min(1) for t in of)
    for impl in ("reference", "tiled", "screened"):
        for rows in (x, x.double()):
            loss = flashpair.ContrastiveLoss(1.0, 0.5, "cosine", power, impl=impl)(rows, labels)
            assert abs(loss.item() - truth.item()) < 1e-5 * truth.item()


@pytest.mark.parametrize("impl", IMPLS)
def test_three_equal_rows_are_no_angular_triplet_above_0(impl):
    for n, d in SIZES[1:4]:
        x, labels, which = copied(n, d, 2, torch.float64)
        unit = torch.nn.functional.normalize(x)
        t2, terms = torch.tan(torch.deg2rad(torch.tensor(40.0, dtype=torch.float64))) ** 2, []
        for a, p in ((labels[:, None] == labels) & ~torch.eye(n, dtype=torch.bool)).nonzero().tolist():
            for q in (labels != labels[a]).nonzero()[:, 0].tolist():
                middle = (unit[a] + unit[p]) / 2
                h = (unit[a] - unit[p]).square().sum() - 4 * t2 * (unit[q] - middle).square().sum()
                terms += [h.item()] if h > 1e-12 and not which[a] == which[p] == which[q] else []
        truth = sum(terms) / max(1, len(terms))
        for rows in (x, x.float()):
            loss = flashpair.AngularLoss(40.0, "hinge", reduction="nonzero", impl=impl)(rows, labels)
            assert abs(loss.item() - truth) < 1e-5 * max(truth, 1.0)
