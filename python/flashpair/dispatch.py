"""Which implementation runs: by name, or the fastest one that can."""

from __future__ import annotations

import torch
from torch import Tensor

from . import extension

IMPLEMENTATIONS = ("reference", "tiled", "fused", "onchip")


def obstacles(impl: str, device: torch.device) -> list[str]:
    """Every reason why `impl` cannot run on `device` here; empty if it can."""
    if impl == "reference":
        return []
    found = []
    if impl == "tiled":
        if device.type != "cpu":
            found.append(f"tiled runs on the CPU in this version, and the tensors are on {device.type}")
        module = extension.load()
        if isinstance(module, str):
            found.append(f"tiled needs the compiled extension: {module}")
        return found
    if device.type != "cuda":
        found.append(f"{impl} needs a CUDA device, and the tensors are on {device.type}")
    found.append(f"this version of flashpair has no {impl} kernels yet")
    return found


def check_name(impl: str) -> None:
    if impl != "auto" and impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl must be one of auto, {', '.join(IMPLEMENTATIONS)}, got {impl!r}")


def choose(impl: str, x: Tensor, y: Tensor | None) -> str:
    """The implementation for embeddings x (N, D) and y (M, D) or None.

    An explicit name never falls back. `auto` takes `tiled` where it can run, else the reference.

    Raises:
        ValueError: an unknown name. RuntimeError: a known one that cannot run here, with every reason.
    """
    check_name(impl)
    if impl == "auto":
        return "tiled" if not obstacles("tiled", x.device) else "reference"
    if reasons := obstacles(impl, x.device):
        raise RuntimeError(f"impl={impl!r} cannot run: {'; '.join(reasons)}")
    return impl
