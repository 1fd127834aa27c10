"""Sums of dot products over negatives or all pairs, which `tiled` has without the pairs (transform/linear.h)."""

from __future__ import annotations

import pytest
import torch
from conftest import needs_extension
from helpers import assert_as_good_as, assert_same, assert_same_bits, batch, gradients

from flashpair import Reduction, make_pairs

pytestmark = needs_extension
LABELS = {
    "classes of four": torch.arange(60) // 4,
    "one class": torch.zeros(60, dtype=torch.int64),
    "all single": torch.arange(60),
    "one negative beside many positives": (torch.arange(60) == 17).long(),
    "empty": torch.zeros(0, dtype=torch.int64),
    "one sample": torch.zeros(1, dtype=torch.int64),
}


def sums(impl, side, x, labels, y=None, ref_labels=None, learned=True):
    """Row values, and the gradients of x, y, scale and offset, one sum in a call with another that has no window."""
    x = x.clone().requires_grad_()
    y = None if y is None else y.clone().requires_grad_()
    scale = torch.tensor(1.7, dtype=x.dtype, requires_grad=True) if learned else 1.7
    generator = torch.Generator().manual_seed(5)
    offset = torch.randn(x.shape[0], generator=generator, dtype=torch.float64).to(x.dtype).requires_grad_()
    pairs = make_pairs(x, labels, ref_emb=y, ref_labels=ref_labels, impl=impl)
    own = offset if impl == "reference" else offset[pairs.label_order.order]
    rows = pairs.reduce(Reduction("sum", side, scale=scale, offset=own), Reduction("logsumexp", "negatives"))
    rows = tuple(pairs.restore(row) for row in rows)
    inputs = [t for t in (x, y, scale, offset) if isinstance(t, torch.Tensor)]
    finite = tuple(torch.where(row > -torch.inf, row, 0.0) for row in rows)
    return *(row.detach() for row in rows), *gradients(finite, inputs)


@pytest.mark.parametrize("learned", [True, False])
@pytest.mark.parametrize("side", ["negatives", "all"])
@pytest.mark.parametrize("pattern", LABELS)
def test_of_a_batch(pattern, side, learned):
    labels = LABELS[pattern]
    x = batch(len(labels), 21, 4, torch.float64)[0]
    found, truth = (sums(impl, side, x, labels, learned=learned) for impl in ("tiled", "reference"))
    for f, t in zip(found, truth, strict=True):
        assert_same(f, t)


@pytest.mark.parametrize("side", ["negatives", "all"])
@pytest.mark.parametrize("shift", [0, 7, 1000])
def test_against_references(shift, side):
    """Classes without a reference, and references without an anchor, before, between and after the others."""
    x, labels = batch(70, 9, 4, torch.float64)
    y, ref_labels = batch(133, 9, 3, torch.float64, seed=1)
    found, truth = (sums(impl, side, x, labels + shift, y, ref_labels) for impl in ("tiled", "reference"))
    for f, t in zip(found, truth, strict=True):
        assert_same(f, t)


@pytest.mark.parametrize("side", ["negatives", "all"])
@pytest.mark.parametrize("pattern", ["classes of four", "one negative beside many positives"])
def test_nothing_is_lost_beside_much(pattern, side):
    """Rows of one direction, so that a difference of two large sums would lose what a few negatives are."""
    labels = LABELS[pattern].repeat(20)
    labels[60:] += 0 if pattern == "classes of four" else -labels[60:]
    x = batch(len(labels), 16, 4, torch.float64)[0] * 0.01 + 1
    truth = sums("reference", side, x, labels)
    eager, found = (sums(impl, side, x.float(), labels) for impl in ("reference", "tiled"))
    for f, e, t in zip(found, eager, truth, strict=True):
        assert_as_good_as(f, e, t)


def test_no_negatives_are_exactly_nothing():
    x = batch(50, 8, 4, torch.float32)[0].requires_grad_()
    (rows,) = make_pairs(x, torch.zeros(50, dtype=torch.int64), impl="tiled").reduce(Reduction("sum", "negatives"))
    (gradient,) = torch.autograd.grad(rows.sum(), x)
    assert rows.count_nonzero() == 0
    assert gradient.count_nonzero() == 0


def test_same_bits_and_what_is_not_finite():
    x, labels = batch(300, 8, 4, torch.float32)
    assert_same_bits(lambda: sums("tiled", "negatives", x, labels), (1, 2, 3))
    x[5, 3] = torch.inf
    assert all(t.isnan().all() for t in sums("tiled", "negatives", x, labels)[:2])


def test_second_derivatives():
    x, labels = batch(9, 3, 3, torch.float64)

    def rows(t):
        return make_pairs(t, labels, impl="tiled").reduce(Reduction("sum", "negatives"))[0].square()

    assert torch.autograd.gradgradcheck(rows, (x.requires_grad_(),))
