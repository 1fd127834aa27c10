"""Logits of any size on the GPU's schedules: softmaxes are taken relative to their largest term, whatever it is."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_as_good_as, assert_same, gradients, relative

from flashpair import (
    Bound,
    LiftedStructureStarLoss,
    MultiSimilarityLoss,
    NPairsLoss,
    NTXentLoss,
    Reduction,
    SupConLoss,
    row_reduce,
)
from flashpair.backends import extension as built
from flashpair.engine.dispatch import interpreted
from flashpair.tools.check import value_and_gradient

triton = pytest.importorskip("triton")
needs_interpreter = pytest.mark.skipif(
    not interpreted(), reason="there is a GPU: tests/backends/triton/test_gpu.py runs the kernels"
)

if interpreted():
    from flashpair.backends.triton import screened, tiled
    from flashpair.engine import row_reduce_op

LABELS = torch.arange(70) // 3
LABELS[-1] = -1  # a row without positives
SCALES = {"1.3": 1.3, "-0.7": -0.7, "50.3": 50.3, "learned": 3.3, "learned, negative": -3.3, "learned, 0": 0.0}
UNNORMALISED = {
    "NTXent": lambda impl: NTXentLoss(0.1, normalize=False, impl=impl),
    "SupCon": lambda impl: SupConLoss(0.1, normalize=False, impl=impl),
    "N-pairs": lambda impl: NPairsLoss(impl=impl),
    "N-pairs, all pairs": lambda impl: NPairsLoss("all_pairs", impl=impl),
    "Multi-Similarity": lambda impl: MultiSimilarityLoss(2.3, 50.7, epsilon=None, normalize=False, impl=impl),
    "lifted structure": lambda impl: LiftedStructureStarLoss(2.3, 50.7, normalize=False, impl=impl),
}


@pytest.fixture(params=["fused", "tiled", "screened"])
def schedule(request, monkeypatch):
    """Runs `fused`, or another module of the GPU in its place."""
    if request.param != "fused":
        module = {"tiled": tiled, "screened": screened}[request.param]
        monkeypatch.setattr(row_reduce_op, "backend_module", lambda impl, device: module)
        monkeypatch.setattr(tiled, "BLOCK", 64)
    return request.param


def rows(n, d, size, dtype):
    return (torch.randn(n, d, generator=torch.Generator().manual_seed(5), dtype=torch.float64) * size).to(dtype)


def logsumexps(x, impl, scale, learned):
    x = x.clone().requires_grad_()
    factor = torch.tensor(scale, dtype=x.dtype, requires_grad=True) if learned else scale
    terms = [Reduction("logsumexp", side, scale=factor) for side in ("negatives", "all")]
    values = row_reduce(x, LABELS, *terms, Reduction("logsumexp", "positives", scale=factor), impl=impl)
    values = (*values[:2], torch.where(LABELS < 0, 0.0, values[2]))
    return [*(v.detach() for v in values), *gradients(values, [x, factor] if learned else [x])]


@needs_interpreter
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("size", [1.0, 30.0, 1e3, 1e4, 1e14])
def test_float32(size, scale, schedule):
    x, known, learned = rows(70, 24, size, torch.float32), SCALES[scale], "learned" in scale
    found = logsumexps(x, "fused", known, learned)
    eager, truth = (logsumexps(t, "reference", known, learned) for t in (x, x.double()))
    for f, e, t in zip(found[:3], eager, truth, strict=False):
        assert_as_good_as(f, e, t)
    # The scale is one number, in which two sums may be equal by chance.
    for f, e, t in zip(found[3:], eager[3:], truth[3:], strict=True):
        assert f.isfinite().all()
        assert relative(f, t) <= 4 * relative(e, t) + 2e-6


@needs_interpreter
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("size", [1.0, 1e3, 1e12])
def test_float64(size, scale):
    # In 12 digits less, so that every similarity is exact: its last bit would decide between terms of e^1000.
    x, known, learned = (rows(70, 24, 16.0, torch.float64).round() / 16) * size, SCALES[scale], "learned" in scale
    found, truth = (logsumexps(x, impl, known, learned) for impl in ("fused", "reference"))
    for f, t in zip(found, truth, strict=True):
        assert_same(f, t)


@needs_interpreter
@pytest.mark.parametrize("scale", [1.3, -50.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1.0, 1e4, 1e14])
def test_equal_largest_terms_share_the_gradient(size, dtype, scale, schedule):
    """Of the softmax relative to the largest term; log(2) is nothing beside it."""
    x = rows(70, 24, size, dtype)
    x[40:44] = x[2]
    a, b = x.clone().requires_grad_(), x.double().requires_grad_()
    value = row_reduce(a, torch.arange(70), Reduction("logsumexp", "negatives", scale=scale), impl="fused")[0]
    z = (b @ b.T).detach()
    z = torch.stack([z[:, 2 if 40 <= j < 44 else j] for j in range(70)], 1)  # their bits, too
    weight = torch.softmax((z * scale).fill_diagonal_(-torch.inf), 1) * scale
    found, truth = gradients((value,), [a])[0], torch.autograd.grad((weight * (b @ b.T)).sum(1) @ upstream(70), b)[0]
    assert relative(found, truth) <= 1e3 * torch.finfo(dtype).eps


def upstream(n):
    """That of `gradients`."""
    return torch.randn(n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@needs_interpreter
@pytest.mark.parametrize("name", UNNORMALISED)
@pytest.mark.parametrize("size", [30.0, 1e4])
def test_losses(name, size, schedule):
    x = rows(48, 16, size, torch.float32)
    labels = torch.arange(48) // 4
    make = UNNORMALISED[name]
    loss, gradient = value_and_gradient(make("fused"), x, labels)
    eager = value_and_gradient(make("reference"), x, labels)
    truth = value_and_gradient(make("reference"), x.double(), labels)
    assert torch.isfinite(loss)
    assert torch.isfinite(gradient).all()
    assert relative(loss, truth[0]) <= 4 * relative(eager[0], truth[0]) + 1e-6
    assert relative(gradient, truth[1]) <= 4 * relative(eager[1], truth[1]) + 1e-6


@needs_interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("n", "d"), [(2, 17), (3, 17), (64, 17), (100, 33)])
def test_a_window_bound_to_an_extreme_of_its_own_pairs(n, d, dtype, schedule):
    """All but the hardest, and all below the best positive: the extreme itself stays out of both passes."""
    if schedule == "screened":
        pytest.skip("screened refuses it")
    x, labels = torch.randn(n, d, dtype=torch.float64).to(dtype), torch.arange(n) // (2 if n > 3 else 1)
    for of, side in (("negatives", "negatives"), ("positives", "all"), ("all", "positives")):

        def both(impl, x=x, of=of, side=side):
            x = x.clone().requires_grad_()
            top = Reduction("max", of, detach=True)
            value = row_reduce(x, labels, top, Reduction("sum", side, upper=Bound(top, 0.0)), impl=impl)[1]
            return [value.detach(), *gradients((value,), [x])]

        for f, t in zip(both("fused"), both("reference"), strict=True):
            assert (f - t).abs().max() <= 1e3 * torch.finfo(dtype).eps * (1 + t.abs().max())


@pytest.mark.skipif(not built.emulated(), reason="no compiler to build the emulated kernel with")
@pytest.mark.parametrize("name", UNNORMALISED)
@pytest.mark.parametrize("size", [1.0, 30.0, 1e3, 1e4, 1e14])
def test_onchip(name, size, chip):
    if isinstance(UNNORMALISED[name]("auto"), (NTXentLoss, SupConLoss)):
        pytest.skip("no loss that onchip takes")
    chip(16)
    x, labels = rows(48, 16, size, torch.float32), torch.arange(48) // 4
    make = UNNORMALISED[name]
    found = value_and_gradient(make("onchip"), x, labels)
    eager = value_and_gradient(make("reference"), x, labels)
    truth = value_and_gradient(make("reference"), x.double(), labels)
    for f, e, t in zip(found, eager, truth, strict=True):
        assert torch.isfinite(f).all()
        assert relative(f, t) <= 4 * relative(e, t) + 1e-6
