"""Fixtures of the interpreted kernels' tests."""

from __future__ import annotations

import pytest
from small_tiles import TILES


@pytest.fixture
def tiles(request, monkeypatch):
    """Runs the engine with one of TILES."""
    from flashpair.backends.triton.kernels import configs

    config = configs.Config(*TILES[getattr(request, "param", "one chunk")], (4, 1), (4, 1))

    def choose(family, dtype, d):
        widest = configs.power_of_two(d)
        return config._replace(depth=min(config.depth, widest), slab=min(config.slab, widest))

    monkeypatch.setattr(configs, "choose", choose)
    return config


@pytest.fixture
def schedule(request, monkeypatch):
    """`fused`, or `tiled` in its place with blocks of two tiles."""
    from flashpair.backends.triton import tiled
    from flashpair.engine import row_reduce_op

    if request.param == "tiled":
        monkeypatch.setattr(row_reduce_op, "schedule_of", lambda impl, device: tiled)
        monkeypatch.setattr(tiled, "BLOCK", 64)
    return request.param
