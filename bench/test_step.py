"""One training step under pytest-benchmark, to compare commits on one machine:

    python -m pytest bench --benchmark-enable --benchmark-autosave
    python -m pytest bench --benchmark-enable --benchmark-compare

Without --benchmark-enable each step runs once, as a test of its result.
"""

from __future__ import annotations

import pytest
import torch

from flashpair import MultiSimilarityLoss
from flashpair.engine import dispatch
from flashpair.tools.check import batch, value_and_gradient


@pytest.mark.parametrize("n", [64, 256, 1024])
@pytest.mark.parametrize("impl", ["tiled", "reference"])
def test_multi_similarity(benchmark, impl, n):
    if reasons := dispatch.unsupported_reasons(impl, torch.device("cpu")):
        pytest.skip("; ".join(reasons))
    x, labels = batch(n, 128, 4, torch.float32)
    truth = value_and_gradient(MultiSimilarityLoss(impl="reference"), x.double(), labels)
    for found, exact in zip(
        benchmark(value_and_gradient, MultiSimilarityLoss(impl=impl), x, labels), truth, strict=True
    ):
        torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=1e-5 * exact.abs().max().item())
