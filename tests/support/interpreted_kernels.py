"""What tests of the Triton kernels through the interpreter share: tiles, `fused` or `tiled`, the comparison."""

from __future__ import annotations

import pytest
from helpers import (
    assert_same,
    gradients,
)

from flashpair.engine.dispatch import interpreted

pytest.importorskip("triton")
interpreted_alone = pytest.mark.skipif(
    not interpreted(), reason="there is a GPU: tests/backends/triton/test_gpu.py runs the kernels"
)

if interpreted():
    from flashpair.backends.triton.kernels import configs

    from flashpair.backends.triton import tiled
    from flashpair.engine import row_reduce_op

    TILES = {
        "one chunk": configs.Config(32, 16, 64, 64, (4, 1), (4, 1)),
        "square tiles, many chunks": configs.Config(16, 16, 16, 16, (4, 1), (4, 1)),
        "chunks, one slab": configs.Config(32, 32, 16, 64, (4, 1), (4, 1)),
    }
else:
    TILES = {}


@pytest.fixture
def tiles(request, monkeypatch):
    """Runs the engine with one of TILES."""
    config = TILES[getattr(request, "param", "one chunk")]

    def choose(family, dtype, d):
        widest = configs.power_of_two(d)
        return config._replace(depth=min(config.depth, widest), slab=min(config.slab, widest))

    monkeypatch.setattr(configs, "choose", choose)
    return config


@pytest.fixture
def schedule(request, monkeypatch):
    """`fused`, or `tiled` in its place with blocks of two tiles."""
    if request.param == "tiled":
        monkeypatch.setattr(row_reduce_op, "backend_module", lambda impl, device: tiled)
        monkeypatch.setattr(tiled, "BLOCK", 64)
    return request.param


every_tile = pytest.mark.parametrize("tiles", TILES, indirect=True)
both = pytest.mark.parametrize("schedule", ["fused", "tiled"], indirect=True)


def compare(make, x, labels, y=None, ref_labels=None):
    """A criterion's rows and gradients under a random upstream gradient, fused against the reference."""
    results = []
    for impl in ("fused", "reference"):
        inputs = [t.detach().clone().requires_grad_() for t in (x, y) if t is not None]
        more = {"ref_emb": inputs[1], "ref_labels": ref_labels} if y is not None else {}
        rows = make(impl=impl, reduction="none")(inputs[0], labels, **more)
        results.append([rows.detach(), *gradients((rows,), inputs)])
    for found, truth in zip(*results, strict=True):
        assert_same(found, truth)
