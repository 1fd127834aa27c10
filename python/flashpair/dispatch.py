"""Which implementation runs: by name, or the fastest one that can."""

from __future__ import annotations

import torch
from torch import Tensor

from . import extension

IMPLEMENTATIONS = ("reference", "tiled", "fused", "onchip")


def obstacles(impl: str, device: torch.device) -> list[str]:
    """Every reason why `impl` cannot run on `device` here; empty if it can."""
    return list(_obstacles(impl, device.type))


def _obstacles(impl: str, device: str) -> tuple[str, ...]:
    if impl == "reference":
        return ()
    found = []
    if impl == "tiled":
        if device != "cpu":
            found.append(f"tiled runs on the CPU in this version, and the tensors are on {device}")
        module = extension.load()
        if isinstance(module, str):
            found.append(f"tiled needs the compiled extension: {module}")
        return tuple(found)
    if device != "cuda":
        found.append(f"{impl} needs a CUDA device, and the tensors are on {device}")
    found.append(f"this version of flashpair has no {impl} kernels yet")
    return tuple(found)


# What torch.compiler.assume_constant_result sets, without importing torch._dynamo: what is built does not change.
_obstacles._dynamo_marked_constant = True  # type: ignore[attr-defined]


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
    reasons = obstacles(impl, x.device)
    if reasons:
        raise RuntimeError(f"impl={impl!r} cannot run: {'; '.join(reasons)}")
    return impl
