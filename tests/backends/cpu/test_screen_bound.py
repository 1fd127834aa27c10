"""The bound of docs/screened-mining.md against what would break it: no pair that counts is lost, at any threshold, of
any size.

`make sanitize` runs this file on a build with address and undefined-behaviour checks.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from conftest import needs_extension
from helpers import batch
from hypothesis import given, settings
from hypothesis import strategies as st

import flashpair
from flashpair import Reduction, row_reduce

pytestmark = needs_extension


# Whole numbers over powers of two, whose products and sums are exact in every order and precision: a window's strict
# comparison then has one answer, and no pair may be lost or won by it.
@settings(max_examples=150, deadline=None)
@given(
    n=st.sampled_from([2, 17, 130, 300]),
    m=st.sampled_from([None, 1, 140, 300]),
    d=st.sampled_from([1, 2, 3, 4, 5, 31, 64, 130]),
    levels=st.sampled_from([1, 3, 40]),
    outlier=st.booleans(),
    spread=st.sampled_from([0, 3, 40]),
    distance=st.sampled_from(["dot", "euclidean"]),
    side=st.sampled_from(["negatives", "all"]),
    low=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 10**6),
)
def test_no_pair_is_lost_or_won_at_a_threshold(n, m, d, levels, outlier, spread, distance, side, low, dtype, seed):
    generator = torch.Generator().manual_seed(seed)

    def whole(rows):
        x = torch.randint(-levels, levels + 1, (rows, d), generator=generator).to(dtype)
        if outlier:
            x[torch.rand(rows, generator=generator) < 0.1, 0] = 250.0
        x[torch.rand(rows, generator=generator) < 0.05] = 0
        x[rows // 2 :: 7] = x[0].clone()  # duplicates
        if distance == "dot":  # powers of two, row by row; of distances they would not add up exactly
            x *= 2.0 ** torch.randint(-spread, spread + 1, (rows, 1), generator=generator).to(dtype)
        return x, torch.randint(5, (rows,), generator=generator)

    x, labels = whole(n)
    y, ref_labels = (None, None) if m is None else whole(m)
    refs = x if y is None else y
    z = (x.double() @ refs.double().T).numpy()
    if distance == "euclidean":
        z = np.sqrt(((x.double()[:, None] - refs.double()[None]) ** 2).sum(2).numpy())  # torch's rounds otherwise
    z = torch.from_numpy(z).to(dtype)
    # each row's threshold is one of its own similarities, or one rounding beside it
    at = z.gather(1, torch.randint(z.shape[1], (n, 1), generator=generator))[:, 0]
    beside = torch.nextafter(at, torch.tensor(torch.inf if seed % 2 else -torch.inf, dtype=dtype))
    threshold = torch.where(torch.rand(n, generator=generator) < 0.5, at, beside)
    window = {"lower" if low else "upper": threshold}
    extreme = "max" if low else "min"
    reductions = [Reduction("count", side, **window), Reduction(extreme, side, **window)]
    count, value = row_reduce(
        x, labels, *reductions, ref_emb=y, ref_labels=ref_labels, distance=distance, impl="screened"
    )
    (alone,) = row_reduce(
        x, labels, reductions[1], ref_emb=y, ref_labels=ref_labels, distance=distance, impl="screened"
    )
    chosen = (z > threshold[:, None]) if low else (z < threshold[:, None])
    chosen &= (labels[:, None] != (labels if y is None else ref_labels)[None]) | (side == "all")
    if y is None:
        chosen.fill_diagonal_(False)
    none = -torch.inf if low else torch.inf
    truth = getattr(torch.where(chosen, z, none), extreme)(1).values
    assert torch.equal(count, chosen.sum(1).to(dtype))
    assert torch.equal(value, truth) and torch.equal(alone, truth)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_estimates_own_rounding_is_in_the_bound(dtype):
    """One coordinate leaves nothing to quantise: what is lost are roundings alone, and one product has one result."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(600, 1, generator=generator).to(dtype).exp()
    labels, z = torch.arange(600), x @ x.T
    assert torch.equal(z, x * x.T)
    for rank, (side, towards) in itertools.product(range(10), (("lower", -torch.inf), ("upper", torch.inf))):
        at = z.sort(1, descending=side == "lower").values[:, rank]
        beside = torch.nextafter(at, torch.tensor(towards, dtype=dtype))
        r = Reduction("count", "negatives", **{side: beside})
        with flashpair.screening() as seen:
            (found,) = row_reduce(x, labels, r, impl="screened")
        assert seen.whole < seen.tiles
        chosen = (z > beside[:, None]) if side == "lower" else (z < beside[:, None])
        assert torch.equal(found, chosen.fill_diagonal_(False).sum(1).to(dtype))


@pytest.mark.parametrize("d", [1, 8])
def test_distances_that_are_rounding_noise_count_as_zero(d):
    x = torch.cat([batch(300, d, 1, torch.float32)[0]] * 2)
    r = Reduction("count", "negatives", upper=torch.tensor(1e-12))
    (found,) = row_reduce(x, torch.arange(600), r, distance="euclidean", impl="screened")
    assert (found >= 1).all()


@pytest.mark.parametrize("norm", [1e-30, 1e-22, 1e-17, 1e15, 1e18])
def test_norms_near_the_ends_of_the_range(norm):
    """Squares that underflow or come near overflow: a row is its own rounding error, or nothing is proved of it."""
    x, labels = batch(300, 8, 4, torch.float32)
    x[::2] *= norm
    highest = (x @ x.T).sort(1, descending=True).values
    r = Reduction("count", "negatives", lower=highest[:, 8] / 2 + highest[:, 9] / 2)  # between two: none at the edge
    found, truth = (row_reduce(x, labels, r, impl=impl)[0] for impl in ("screened", "reference"))
    assert torch.equal(found, truth)


@pytest.mark.parametrize("side", ["lower", "upper"])
def test_steps_whose_product_overflows(side):
    """Rows of 3e37 against rows of 1e-6: similarities of 1e33 that float32 holds."""
    x = batch(300, 128, 1, torch.float32)[0] * 1e-6
    y = torch.zeros(1, 128)
    y[0, 0] = 3e37 if side == "lower" else -3e37
    x[:, 0] = x.abs().sum(1)
    r = Reduction("count", "negatives", **{side: torch.tensor(1e25 if side == "lower" else -1e25)})
    more = {"ref_emb": y, "ref_labels": torch.tensor([-1])}
    found, truth = (row_reduce(x, torch.arange(300), r, impl=i, **more)[0] for i in ("screened", "reference"))
    assert torch.equal(found, truth) and truth.sum() > 100


def test_distances_whose_squares_overflow():
    """Float32's squares of norms of 1e20 are infinite, and float64's are more than a screen in float32 can hold."""
    x = torch.full((40, 4), 1e20)
    x[20:] = 2e19
    r = Reduction("count", "negatives", upper=torch.tensor(1.0))
    found, truth = (
        row_reduce(x, torch.arange(40), r, distance="euclidean", impl=impl)[0] for impl in ("screened", "reference")
    )
    assert torch.equal(found, truth)
    x, y = torch.tensor([[0.2e19]], dtype=torch.float64), torch.tensor([[2.646e19]], dtype=torch.float64)
    r = Reduction("count", "negatives", upper=torch.tensor(2.569e19, dtype=torch.float64))
    more = {"ref_emb": y, "ref_labels": torch.tensor([1]), "distance": "euclidean"}
    assert row_reduce(x, torch.tensor([0]), r, impl="screened", **more)[0].item() == 1


@pytest.mark.parametrize("norm", [0.0, 1e-9])
def test_halves_carry_their_rounding(norm):
    """An anchor at nought: the distance is the reference's norm, and its square in float32 all there is to err."""
    y = batch(400, 8, 1, torch.float64)[0]
    x = torch.full((400, 8), norm, dtype=torch.float64)
    distances = torch.cdist(x[:1], y)[0]
    threshold = distances.sort().values[5] * (1 + torch.linspace(1e-9, 1e-6, 400, dtype=torch.float64))
    r = Reduction("count", "negatives", upper=threshold)
    more = {"ref_emb": y, "ref_labels": torch.arange(400) + 400, "distance": "euclidean", "impl": "screened"}
    (found,) = row_reduce(x, torch.arange(400), r, **more)
    assert torch.equal(found, (distances < threshold[:, None]).sum(1).double())


def test_a_zero_threshold_and_tiny_rows():
    """Products that underflow to zero or to the least number above it: `z > 0` must not lose one."""
    x, labels = batch(260, 3, 1, torch.float32)
    x = x.abs() * 2.0**-76
    r = Reduction("count", "negatives", lower=torch.tensor(0.0))
    found, truth = (row_reduce(x, labels, r, impl=impl)[0] for impl in ("screened", "reference"))
    assert 0 < truth.sum() < 260 * 259
    assert (found - truth).abs().max() <= 2  # a sum of three products that each round to nought or to the least
