"""Small tiles for the GPU's backends in Triton's interpreter, so that little batches have every edge of every axis."""

from __future__ import annotations

import pytest

# rows, columns, depth and slab of a Config
TILES = {
    "one chunk": (32, 16, 64, 64),
    "square tiles, many chunks": (16, 16, 16, 16),
    "chunks, one slab": (32, 32, 16, 64),
}
every_tile = pytest.mark.parametrize("tiles", TILES, indirect=True)
both = pytest.mark.parametrize("schedule", ["fused", "tiled"], indirect=True)
