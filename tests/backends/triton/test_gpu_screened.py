"""`screened`'s compiled kernels on a GPU: parity at every width, as accurate as dense code, same bits.

Part of bench.gpu_proof; skipped where torch finds no GPU. Streams, graphs and compile: test_gpu.py.
"""

from __future__ import annotations

import pytest
import torch
from helpers import assert_as_good_as, assert_same

from flashpair import MultiSimilarityLoss, Reduction, row_reduce
from flashpair.tools.check import value_and_gradient

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

if torch.cuda.is_available():
    from flashpair.backends.triton import screened_tiles


def _clusters(n, d, noise, dtype):
    """Unit rows about the centres of classes of four."""
    generator = torch.Generator().manual_seed(n + d)
    labels = torch.arange(n) // 4
    centres = torch.randn(n // 4 + 1, d, generator=generator, dtype=torch.float64)
    x = centres[labels] + noise * torch.randn(n, d, generator=generator, dtype=torch.float64)
    return torch.nn.functional.normalize(x).to(dtype).cuda(), labels.cuda()


@pytest.fixture
def found(monkeypatch):
    """How many candidates each screen lists, and how many blocks are dense."""
    seen, find = [], screened_tiles.ScreenedTiles.find

    def spy(self, group, values):
        one = find(self, group, values)
        seen.append((int((one.keys != screened_tiles.LAST).sum()), int(one.dense.sum())))
        return one

    monkeypatch.setattr(screened_tiles.ScreenedTiles, "find", spy)
    return seen


@pytest.mark.parametrize("n", [1, 127, 128, 129, 256, 1000, 3000])
@pytest.mark.parametrize("d", [1, 33, 64, 128, 300, 1024])
@pytest.mark.parametrize("references", [False, True], ids=["square", "references"])
def test_parity_in_float64(n, d, references, found):
    x, labels = _clusters(n, d, 0.5, torch.float64)
    results = []
    for impl in ("screened", "reference"):
        inputs = [x.clone().requires_grad_(), (x[: n // 2 + 1] + 0.01).requires_grad_()][: 1 + references]
        more = {"ref_emb": inputs[1], "ref_labels": labels[: n // 2 + 1]} if references else {}
        loss = MultiSimilarityLoss(impl=impl)(inputs[0], labels, **more)
        results.append([loss.detach(), *torch.autograd.grad(loss, inputs)])
    for f, t in zip(*results, strict=True):
        assert_same(f, t)
    assert n < 1000 or d < 64 or found[0][0] > 0


@pytest.mark.parametrize("distance", ["dot", "euclidean"])
def test_hinges_windows_and_extremes(distance, found):
    x, labels = _clusters(2000, 96, 0.5, torch.float64)
    near, far = (0.3, -0.3) if distance == "dot" else (1.62, 1.15)
    scale = torch.tensor(1.5, device="cuda", dtype=torch.float64, requires_grad=True)
    results = []
    for impl in ("screened", "reference"):
        a = x.clone().requires_grad_()
        terms = [
            Reduction("sum", "negatives", "hinge", scale=scale, offset=-1.5 * near),
            Reduction("sum", "negatives", "hinge", scale=-scale, offset=1.5 * far),
            Reduction("max", "negatives"),
            Reduction("min", "negatives"),
            Reduction("logsumexp", "negatives", scale=scale, lower=near, upper=near + 0.05),
        ]
        rows = row_reduce(a, labels, *terms, distance=distance, impl=impl)
        total = sum((k + 1) * torch.where(row.isfinite(), row, 0.0).sum() for k, row in enumerate(rows))
        results.append([*(row.detach() for row in rows), *torch.autograd.grad(total, [a, scale])])
    for f, t in zip(*results, strict=True):
        assert_same(f, t)
    assert all(candidates > 0 for candidates, _ in found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_as_accurate_as_dense_code_and_the_same_bits_a_hundred_times(dtype, found):
    x, labels = _clusters(4096, 128, 0.6, dtype)
    truth = value_and_gradient(MultiSimilarityLoss(impl="reference", normalize=False), x.double(), labels)
    eager = value_and_gradient(MultiSimilarityLoss(impl="reference", normalize=False), x, labels)
    criterion = MultiSimilarityLoss(impl="screened", normalize=False)
    first = value_and_gradient(criterion, x, labels)
    for f, e, t in zip(first, eager, truth, strict=True):
        if dtype == torch.float32:
            assert_as_good_as(f, e, t)
        else:
            assert (f.double() - t).norm() <= 4 * torch.finfo(dtype).eps * t.norm()
    for _ in range(100):
        assert all(torch.equal(a, b) for a, b in zip(first, value_and_gradient(criterion, x, labels), strict=True))
    assert found[0][0] > 0
