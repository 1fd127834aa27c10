"""Which implementation runs: by name, or the one that `auto` takes for the device and the size."""

from __future__ import annotations

import functools
import os

import torch
from torch import Tensor

from ..backends import extension

IMPLEMENTATIONS = ("reference", "tiled", "screened", "fused", "onchip")
WIDEST_FUSED = 256  # columns of D that a row block's gradient is accumulated over in registers
# Up to where `auto` takes onchip: N, M, and multiply-adds of a product. Launches cost more than arithmetic there.
ONCHIP_SIDE, ONCHIP_WORK = 2048, 2**28
# Up to where `tiled` on the CPU takes a loss whole: its pairs, and N, M. Beyond, its steps cost nothing beside them.
WHOLE_PAIRS, WHOLE_SIDE = 1024**2, 8192


def interpreted() -> bool:
    """Whether Triton's interpreter stands in for a GPU, so that its kernels take CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


@functools.lru_cache(maxsize=1)
def _triton() -> str:
    """Empty, or why Triton cannot be used."""
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return f"it needs Triton: {error} (pip install 'flashpair[triton]')"
    return ""


def _onchip(device: str) -> str:
    """Empty, or why the CUDA kernel cannot be used on devices of that type. onchip.limits looks at each device."""
    module = extension.onchip()
    if isinstance(module, str):
        return f"onchip needs flashpair built with CUDA: {module}"
    if device == "cuda" and module.emulated:
        return "the module that FLASHPAIR_ONCHIP names is a build for the host"
    return ""


def unsupported_reasons(impl: str, device: torch.device) -> list[str]:
    """Every reason why `impl` cannot run on `device` here; empty if it can."""
    return list(_unsupported_reasons(impl, device.type))


def _unsupported_reasons(impl: str, device: str) -> tuple[str, ...]:
    if impl == "reference":
        return ()
    if impl in ("tiled", "screened") and device == "cpu":
        module = extension.load()
        return (f"{impl} needs the compiled extension: {module}",) if isinstance(module, str) else ()
    found = []
    emulated = (impl == "fused" and interpreted()) or (impl == "onchip" and extension.emulated())
    if device != "cuda" and not (emulated and device == "cpu"):
        also = "" if impl != "fused" else " (or TRITON_INTERPRET=1 set before Python starts)"
        where = "CPU or CUDA" if impl in ("tiled", "screened") else "CUDA"
        found.append(f"{impl} needs a {where} device{also}, not {device} tensors")
    if impl == "onchip":
        if reason := _onchip(device):
            found.append(reason)
    elif _triton():
        found.append(f"{impl} on a GPU: {_triton()}")
    return tuple(found)


# What torch.compiler.assume_constant_result sets, without importing torch._dynamo: what is built does not change.
_unsupported_reasons._dynamo_marked_constant = True  # type: ignore[attr-defined]


def check_name(impl: str) -> None:
    if impl != "auto" and impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl must be one of auto, {', '.join(IMPLEMENTATIONS)}, got {impl!r}")


def choose(impl: str, x: Tensor, y: Tensor | None) -> str:
    """The implementation for embeddings x (N, D) and y (M, D) or None.

    An explicit name never falls back. `auto` goes by device and size and measures nothing: it takes on the CPU `tiled`,
    on a GPU `fused` up to D = 256 and `tiled` from there on, and the reference where these cannot run. (Of small
    batches on a GPU, a criterion asks `onchip` first.)

    Raises:
        ValueError: an unknown name. RuntimeError: a known one that cannot run here, with every reason.
    """
    check_name(impl)
    if impl == "onchip":
        raise RuntimeError("impl='onchip' cannot run: it computes whole criteria, not row reductions")
    if impl == "auto":
        best = "fused" if x.device.type == "cuda" and x.shape[1] <= WIDEST_FUSED else "tiled"
        return best if not unsupported_reasons(best, x.device) else "reference"
    reasons = unsupported_reasons(impl, x.device)
    if reasons:
        raise RuntimeError(f"impl={impl!r} cannot run: {'; '.join(reasons)}")
    return impl


def choose_small_batch(impl: str, x: Tensor, y: Tensor | None, one_pair: bool) -> str:
    """The implementation that is to compute a whole loss of x (N, D) and y (M, D) or None; empty for none.

    one_pair: the loss takes one pair of each class, so that its rows and columns are as many as classes.

    Raises:
        RuntimeError: ``impl="onchip"`` that cannot run here, with every reason.
    """
    (n, d), m = x.shape, (x if y is None else y).shape[0]
    if impl == "onchip":
        if reasons := unsupported_reasons(impl, x.device):
            raise RuntimeError(f"impl={impl!r} cannot run: {'; '.join(reasons)}")
        return impl
    if x.device.type == "cpu":
        most = n * m if not one_pair else (n // 2 if y is None else min(n, m)) ** 2
        small = impl in ("auto", "tiled") and most <= WHOLE_PAIRS and max(n, m) <= WHOLE_SIDE
        return "tiled" if small and not unsupported_reasons("tiled", x.device) else ""
    if impl != "auto" or x.device.type != "cuda" or max(n, m) > ONCHIP_SIDE or n * m * d > ONCHIP_WORK:
        return ""
    return "" if unsupported_reasons("onchip", x.device) else "onchip"


def native(impl: str, x: Tensor, y: Tensor | None) -> bool:
    """Whether embeddings stay in their 16 bits: where the GPU multiplies such numbers and adds in float32."""
    if impl == "reference" or x.dtype not in (torch.bfloat16, torch.float16) or (y is not None and y.dtype != x.dtype):
        return False
    return x.device.type == "cuda" or (impl == "fused" and x.dtype == torch.float16)  # no bfloat16 in the interpreter
