"""Embeddings in label order, normalised if asked for, and the gradient of that; kernels/rows.py."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...core.problem import accumulator
from . import launch
from .kernels import configs, rows


def _tiles(x: Tensor) -> dict[str, Any]:
    step = min(1024, configs.power_of_two(x.shape[1]))
    acc = launch.TRITON[accumulator(x.dtype)]
    return {"ROWS": 1024 // step, "STEP": step, "ACC": acc, "warps": 4, "stages": 1}


def gather_rows(x: Tensor, perm: Tensor, normalize: bool) -> tuple[Tensor, Tensor]:
    """x[perm] (N, D), normalised if asked for, and then the reciprocal norms (N,), else (0,)."""
    n, d = x.shape
    wide = accumulator(x.dtype)
    y, inverse = torch.empty_like(x), torch.empty(n if normalize else 0, dtype=wide, device=x.device)
    tiles = _tiles(x)
    launch.run(
        rows.gather_rows, (-(-n // tiles["ROWS"]),), x.device, x, perm, y, inverse, n, d,
        TINY=torch.finfo(wide).tiny ** 0.5, NORMALIZE=normalize, **tiles,
    )  # fmt: skip
    return y, inverse


def scatter_rows(g: Tensor, x: Tensor, perm: Tensor, inverse: Tensor, normalize: bool) -> Tensor:
    """The gradient of `gather_rows` in x, from g (N, D)."""
    n, d = x.shape
    dx, tiles = torch.empty_like(x), _tiles(x)
    grid = (-(-n // tiles["ROWS"]),)
    launch.run(rows.scatter_rows, grid, x.device, g, x, perm, inverse, dx, n, d, NORMALIZE=normalize, **tiles)
    return dx
