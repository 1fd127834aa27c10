"""The nearest neighbours, exactly: screened against the sorted dense matrix."""

from __future__ import annotations

import pytest
import torch
from conftest import needs_extension
from helpers import assert_same_bits, batch
from hypothesis import given, settings
from hypothesis import strategies as st

from flashpair import References, nearest

pytestmark = needs_extension


@settings(max_examples=100, deadline=None)
@given(
    n=st.sampled_from([1, 2, 3, 129, 300, 700]),
    m=st.sampled_from([None, 1, 5, 140, 600]),
    d=st.sampled_from([1, 3, 32, 65]),
    k=st.sampled_from([0, 1, 2, 7, 130]),
    levels=st.sampled_from([1, 5, 100]),
    distance=st.sampled_from(["dot", "euclidean"]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 10**6),
)
def test_the_very_neighbours_of_the_reference(n, m, d, k, levels, distance, dtype, seed):
    """Whole numbers: similarities exact in every order, many of them equal, which go by index."""
    generator = torch.Generator().manual_seed(seed)
    if distance == "euclidean":
        levels = min(levels, 5)  # torch's square roots are off by a rounding: no two that differ may be that close
    x = torch.randint(-levels, levels + 1, (n, d), generator=generator).to(dtype)
    y = None if m is None else torch.randint(-levels, levels + 1, (m, d), generator=generator).to(dtype)
    k = min(k, n - 1 if m is None else m)
    found, truth = (nearest(x, k, ref_emb=y, distance=distance, impl=impl) for impl in ("screened", "reference"))
    assert torch.equal(found.indices, truth.indices)
    assert torch.allclose(found.values, truth.values, rtol=1e-6)


@pytest.mark.parametrize("unit", [False, True])
@pytest.mark.parametrize("distance", ["dot", "euclidean"])
def test_of_clustered_embeddings_in_many_tiles(unit, distance):
    x, _ = batch(2100, 24, 4, torch.float64)
    found, truth = (nearest(x, 5, distance=distance, normalize=unit, impl=impl) for impl in ("screened", "reference"))
    assert torch.equal(found.indices, truth.indices)
    assert torch.allclose(found.values, truth.values, rtol=1e-12)


def test_twins_stand_by_index():
    """Equal rows in blocks that are computed whole and in blocks that are listed."""
    x, _ = batch(350, 33, 1, torch.float32)
    found = nearest(torch.cat([x, x]), 6, impl="screened")
    twins = found.values[:, 1:] == found.values[:, :-1]
    assert twins.sum() > 1000
    assert (found.indices[:, 1:] > found.indices[:, :-1])[twins].all()
    for row in found.indices[found.values[:, 0] > found.values[:, 1]]:
        assert (row[1:] % 350).unique().numel() <= 3, "a twin is never left out for a farther one"


def test_same_bits_whatever_the_threads():
    x, _ = batch(3000, 64, 4, torch.float32)
    assert_same_bits(lambda: nearest(x, 9), [1, 2, 3, 7])


@pytest.mark.parametrize("impl", ["screened", "reference"])
def test_what_is_not_finite_has_no_neighbours(impl):
    x, _ = batch(40, 4, 4, torch.float32)
    x[3, 1] = torch.nan
    values, indices = nearest(x, 3, impl=impl)
    assert values.isnan().all() and (indices == -1).all()


def test_of_references():
    x, labels = batch(40, 4, 4, torch.float32)
    found, truth = nearest(x[:9], 3, ref_emb=References(x, labels)), nearest(x[:9], 3, ref_emb=x)
    assert torch.equal(found.indices, truth.indices)


def test_what_cannot_be():
    x, _ = batch(10, 4, 2, torch.float32)
    for k, words in ((10, "at most 9, the number of references, got 10"), (-1, "at least 0, got -1")):
        with pytest.raises(ValueError, match=f"k must be {words}"):
            nearest(x, k)
    for k in (2.0, True, "2", None):
        with pytest.raises(TypeError, match=f"k must be an int, got {type(k).__name__}"):
            nearest(x, k)
    with pytest.raises(ValueError, match="ref_emb must have the width of embeddings"):
        nearest(x, 1, ref_emb=x[:, :2])
    with pytest.raises(ValueError, match="impl must be one of auto, screened, reference"):
        nearest(x, 1, impl="tiled")
    with pytest.raises(RuntimeError, match="screened takes D up to 131,072"):
        nearest(torch.zeros(3, 2**17 + 1), 1, impl="screened")
    with pytest.raises(RuntimeError, match="screened neighbours need a CPU"):
        nearest(x.to("meta"), 1, impl="screened")


def test_the_old_name_of_normalize_works_with_a_warning():
    x, _ = batch(20, 4, 4, torch.float32)
    with pytest.warns(DeprecationWarning, match="nearest: unit= is now called normalize="):
        old = nearest(3 * x, 3, unit=True)
    assert torch.equal(old.values, nearest(3 * x, 3, normalize=True).values)
