"""Euclidean distances on the GPU's schedules: close rows lose no digits, nor does their gradient."""

from __future__ import annotations

import pytest
import torch
from helpers import relative

from flashpair import GeneralizedLiftedStructureLoss, Reduction, row_reduce
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

LABELS = torch.arange(48) // 4


@pytest.fixture(params=["fused", "tiled", "screened"])
def schedule(request, monkeypatch):
    """Runs `fused`, or another module of the GPU in its place."""
    if request.param != "fused":
        module = {"tiled": tiled, "screened": screened}[request.param]
        monkeypatch.setattr(row_reduce_op, "backend_module", lambda impl, device: module)
        monkeypatch.setattr(tiled, "BLOCK", 64)
    return request.param


def clusters(gap, dtype, n=48, d=20):
    """Eight rows around each of a few centres, `gap` from it; two are the same as another."""
    generator = torch.Generator().manual_seed(7)
    centres = torch.randn(n // 8, d, generator=generator, dtype=torch.float64).repeat_interleave(8, 0)
    x = (centres + gap * torch.randn(n, d, generator=generator, dtype=torch.float64)).to(dtype)
    x[5], x[9] = x[2], x[2]
    return x


def by_subtraction(x, y, distance):
    d2 = ((x[:, None] - y[None]) ** 2).sum(-1)
    return d2 if distance != "euclidean" else torch.where(d2 > 0, torch.where(d2 > 0, d2, 1.0).sqrt(), 0.0)


@needs_interpreter
@pytest.mark.parametrize("refs", [False, True])
@pytest.mark.parametrize("gap", [1.0, 0.1, 1e-5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("distance", ["euclidean", "squared_euclidean"])
def test_close_rows(distance, dtype, gap, refs, schedule):
    x = clusters(gap, dtype).requires_grad_()
    y = clusters(gap, dtype)[:40].flip(0).requires_grad_() if refs else None
    terms = Reduction("logsumexp", "negatives", scale=-1.0), Reduction("sum", "positives")
    terms = (*terms, Reduction("min", "negatives", detach=True))
    more = {"ref_emb": y, "ref_labels": LABELS[:40].flip(0)} if refs else {}
    values = row_reduce(x, LABELS, *terms, distance=distance, impl="fused", **more)
    leaves = [x, y] if refs else [x]
    found = torch.autograd.grad(values[0].sum() + values[1].sum(), leaves)

    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    z = by_subtraction(wide[0], wide[-1], distance)
    same = LABELS[:, None] == (LABELS[:40].flip(0) if refs else LABELS)[None]
    positives = same if refs else same & ~torch.eye(48, dtype=torch.bool)
    truth = [torch.logsumexp(torch.where(same, -torch.inf, -z), 1), torch.where(positives, z, 0.0).sum(1)]
    truth.append(torch.where(same, torch.inf, z).amin(1))
    right = torch.autograd.grad(truth[0].sum() + truth[1].sum(), wide)
    eps = torch.finfo(torch.float32 if dtype == torch.bfloat16 else dtype).eps
    for f, t in zip(values, truth, strict=True):
        assert relative(f.detach(), t.detach()) <= 16 * eps
    assert values[2][2] == 0.0  # rows that are equal, and no others
    assert values[2].count_nonzero() == truth[2].count_nonzero()
    for f, t in zip(found, right, strict=True):
        assert relative(f, t) <= (0.01 if dtype == torch.bfloat16 else 64 * eps)


@pytest.mark.skipif(not built.emulated(), reason="no compiler to build the emulated kernel with")
@pytest.mark.parametrize("gap", [1.0, 0.1, 1e-5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_onchip(dtype, gap, chip):
    chip(16)
    x = clusters(gap, dtype)
    make = GeneralizedLiftedStructureLoss(distance="euclidean", normalize=False, impl="onchip")
    found = value_and_gradient(make, x, LABELS)
    wide = x.double().requires_grad_()
    z, same = by_subtraction(wide, wide, "euclidean"), LABELS[:, None] == LABELS[None]
    others = ~torch.eye(48, dtype=torch.bool)
    near = torch.logsumexp(torch.where(same & others, z, -torch.inf), 1)
    loss = (near + torch.logsumexp(torch.where(same, -torch.inf, 1.0 - z), 1)).clamp_min(0.0).mean()
    truth = loss.detach(), torch.autograd.grad(loss, wide)[0]
    for f, t in zip(found, truth, strict=True):
        assert relative(f, t) <= 64 * torch.finfo(dtype).eps
