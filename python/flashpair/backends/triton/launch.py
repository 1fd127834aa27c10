"""How Triton kernels are launched: on their tensors' device and its current stream. Nothing here reads a tensor."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

TILES_PER_SPLIT = 4
ALIGNMENT = 16  # bytes, and elements: where a tensor's memory begins, or a row's, for one kernel to serve every N
TRITON = {torch.float32: tl.float32, torch.float64: tl.float64}


def run(
    kernel: Any, grid: tuple[int, ...], device: torch.device, *args: Any, warps: int, stages: int, **more: Any
) -> Any:
    """Launches, on `device` and its current stream; what was compiled comes back, None where nothing was."""
    if 0 in grid:
        return None
    options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True, **more}
    if device.type == "cuda" and torch.cuda.current_device() != device.index:
        with torch.cuda.device(device):
            return kernel[grid](*args, **options)
    return kernel[grid](*args, **options)


def at_most(registers: int) -> dict[str, int]:
    """The launch option that limits the registers of a thread; none for 0."""
    return {"maxnreg": registers} if registers else {}


def padded(count: int) -> int:
    """The least multiple of ALIGNMENT that is `count` or more: rows of so many all begin alike."""
    return -(-count // ALIGNMENT) * ALIGNMENT


def aligned(t: Tensor | None) -> Tensor | None:
    """A vector that begins where kernels may load wide. A row of a matrix may not, and they would be compiled anew."""
    return t if t is None or t.data_ptr() % ALIGNMENT == 0 else t.clone()


@functools.lru_cache(maxsize=16)
def processors(device: torch.device) -> int:
    return 4 if device.type == "cpu" else torch.cuda.get_device_properties(device).multi_processor_count


def choose_splits(row_blocks: int, tiles: int, device: torch.device, most: int = 64) -> int:
    """Among how many programs a row block's columns are shared: so many that the last wave of programs is full."""
    best, best_filled = 1, 0.0
    for splits in range(1, max(1, min(most, tiles // TILES_PER_SPLIT)) + 1):
        waves = row_blocks * splits / processors(device)
        filled = waves / math.ceil(waves) if waves else 1.0
        if filled > best_filled + 0.05:
            best, best_filled = splits, filled
    return best


def precision(dtype: torch.dtype) -> str:
    """How kernels multiply: float32 as torch's own products on a GPU would be, of one tf32 product or exact."""
    if dtype != torch.float32:
        return "ieee"
    chosen = getattr(torch.backends.cuda.matmul, "fp32_precision", None)  # torch 2.9; older words refuse to be mixed
    if chosen is None:
        chosen = "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"
    return "tf32" if chosen == "tf32" else "split"
