"""Chooses the implementation that runs: the one that the caller names, or for `auto` the best for device and size.

A batch gets its `Route` once (`route_pairs`, `route_chunks`). For a call of some reductions of the batch, `route_call`
may choose another implementation. `small_batch_backend` says what computes a whole loss in one call.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..backends import extension
from ..backends.cpu import screened
from ..core import transforms
from ..core.call import Call
from ..core.problem import accumulator
from ..core.reduction import BUILT_IN, TRANSFORMS

IMPLEMENTATIONS = ("reference", "tiled", "screened", "fused", "onchip")
WIDEST_FUSED = 256  # the largest D for which `fused` accumulates a row block's gradient in registers
# `auto` takes onchip up to this N and M, and up to this many multiply-adds. There, launches cost more than arithmetic.
ONCHIP_SIDE, ONCHIP_WORK = 2048, 2**28
# `tiled` on the CPU computes a loss in one call up to this many pairs, and this N and M. Beyond, that saves nothing.
WHOLE_PAIRS, WHOLE_SIDE = 1024**2, 8192
TAKES_CHUNKS = ("tiled", "fused")  # implementations that keep nothing for backward that depends on all references


def interpreted() -> bool:
    """Whether Triton interprets its kernels, which then take CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


@functools.lru_cache(maxsize=1)
def _triton() -> str:
    """Why Triton cannot be used; empty if it can."""
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return f"it needs Triton: {error} (pip install 'flashpair[triton]')"
    return ""


def _onchip(device: str) -> str:
    """Why the CUDA kernel cannot be used on a type of device; empty if it can. `onchip.limits` checks each device."""
    module = extension.onchip()
    if isinstance(module, str):
        return f"onchip needs flashpair built with CUDA: {module}"
    if device == "cuda" and module.emulated:
        return "FLASHPAIR_ONCHIP names a module that was built for the CPU"
    return ""


def unsupported_reasons(impl: str, device: torch.device) -> list[str]:
    """Every reason why `impl` cannot run on `device` here; empty if it can."""
    return list(_unsupported_reasons(impl, device.type))


def _unsupported_reasons(impl: str, device: str) -> tuple[str, ...]:
    """As `unsupported_reasons`, by the type of the device."""
    if impl == "reference":
        return ()
    if impl in ("tiled", "screened") and device == "cpu":
        module = extension.load()
        return (f"{impl} needs the compiled extension: {module}",) if isinstance(module, str) else ()
    reasons = []
    emulated = (impl == "fused" and interpreted()) or (impl == "onchip" and extension.emulated())
    if device != "cuda" and not (emulated and device == "cpu"):
        also = "" if impl != "fused" else " (or TRITON_INTERPRET=1 set before Python starts)"
        where = "CPU or CUDA" if impl in ("tiled", "screened") else "CUDA"
        reasons.append(f"{impl} needs a {where} device{also}, not {device} tensors")
    if impl == "onchip":
        if reason := _onchip(device):
            reasons.append(reason)
    elif _triton():
        reasons.append(f"{impl} on a GPU: {_triton()}")
    return tuple(reasons)


# As torch.compiler.assume_constant_result does, but without importing torch._dynamo: the reasons do not change.
_unsupported_reasons._dynamo_marked_constant = True  # type: ignore[attr-defined]


def check_name(impl: str) -> None:
    """Raises ValueError for an unknown implementation."""
    if impl != "auto" and impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl must be one of auto, {', '.join(IMPLEMENTATIONS)}, got {impl!r}")


class Route(NamedTuple):
    """The choice of a backend for a batch.

    Attributes:
        backend: one of `IMPLEMENTATIONS`.
        named: the caller named it, so that no other may run in its place.
        dtype: the dtype that embeddings are given to the backend in: their own 16-bit dtype if the backend takes it,
            else float32 or float64.
        reasons: why the implementation that `auto` prefers cannot run; empty if it can.
    """

    backend: str
    named: bool
    dtype: torch.dtype
    reasons: tuple[str, ...] = ()


def _require(impl: str, reasons: Sequence[str]) -> None:
    """Raises RuntimeError, with all reasons, if the implementation that the caller named cannot run."""
    if reasons:
        raise RuntimeError(f"impl={impl!r} cannot run: {'; '.join(reasons)}")


def route_pairs(impl: str, x: Tensor, y: Tensor | None) -> Route:
    """The route of embeddings x (N, D) and references y (M, D) or None.

    A named implementation never falls back. `auto` decides by device and size, without measurements: `tiled` on the
    CPU; on a GPU `fused` up to D = 256 and `tiled` above; and the reference where these cannot run. (For small batches
    on a GPU, a criterion tries `onchip` first.)

    Raises:
        ValueError: `impl` is no implementation.
        RuntimeError: the named implementation cannot run here; the error gives all reasons.
    """
    check_name(impl)
    if impl == "onchip":
        _require(impl, ["it computes whole criteria, not row reductions"])
    if impl == "auto":
        best = "fused" if x.device.type == "cuda" and x.shape[1] <= WIDEST_FUSED else "tiled"
        reasons = _unsupported_reasons(best, x.device.type)
        backend = "reference" if reasons else best
        return Route(backend, False, compute_dtype(backend, x, y), reasons)
    _require(impl, _unsupported_reasons(impl, x.device.type))
    return Route(impl, True, compute_dtype(impl, x, y))


def compute_dtype(backend: str, x: Tensor, y: Tensor | None) -> torch.dtype:
    """The dtype of `Route` for x (N, D) and y (M, D) or None.

    16-bit embeddings stay as they are on a GPU, which multiplies them and accumulates in float32.
    """
    dtype = x.dtype if y is None else torch.promote_types(x.dtype, y.dtype)
    if backend == "reference" or x.dtype not in (torch.bfloat16, torch.float16) or dtype != x.dtype:
        return accumulator(dtype)
    native = x.device.type == "cuda" or (backend == "fused" and x.dtype == torch.float16)  # interpreted: no bfloat16
    return x.dtype if native else accumulator(dtype)


def route_chunks(impl: str, x: Tensor) -> Route:
    """The route of anchors x (N, D) whose references come in chunks.

    Raises:
        RuntimeError: the named implementation does not take chunks, or none that does can run here.
    """
    route = route_pairs(impl, x, None)
    if route.backend not in TAKES_CHUNKS:
        why = f"impl={impl!r} cannot run" if route.named else "; ".join(route.reasons)
        raise RuntimeError(f"only {' and '.join(map(repr, TAKES_CHUNKS))} take references in chunks: {why}")
    return route._replace(dtype=accumulator(x.dtype))


def route_call(route: Route, call: Call, x: Tensor, refs: int) -> Route:
    """The route of a call, if the caller named no implementation: another one may be faster for it, or the only one
    that can compute it.

    Args:
        route: the route of the batch.
        call: the constants of the call.
        x: (N, D), the anchors.
        refs: the number of references.

    Raises:
        RuntimeError: the named implementation cannot compute this call; the error gives all reasons.
    """
    device, d = x.device.type, x.shape[1]
    if any(t.transform >= len(BUILT_IN) for t in call.terms):
        names = [TRANSFORMS[t.transform] for t in call.terms if t.transform >= len(BUILT_IN)]
        reasons = tuple(r for name in names if (r := transforms.unsupported_reasons(name, route.backend, device)))
        if reasons and route.named:
            _require(route.backend, reasons)
        if reasons:
            return Route("reference", False, accumulator(x.dtype), reasons)
    if route.backend == "screened":
        _require("screened", screened.unsupported_reasons(call.terms, d))
    elif not route.named and route.backend == "tiled" and screened.worthwhile(x, refs):
        if not screened.unsupported_reasons(call.terms, d):
            return route._replace(backend="screened")
    return route


def route_chunked_call(route: Route, call: Call, x: Tensor) -> Route:
    """The route of a call of anchors x (N, D) whose references come in chunks.

    On the CPU it is `screened` in place of `tiled` if the call can be screened. Then each chunk is screened if it is
    large enough.
    """
    if route.backend != "tiled" or x.device.type != "cpu" or screened.unsupported_reasons(call.terms, x.shape[1]):
        return route
    return route._replace(backend="screened")


def small_batch_backend(impl: str, x: Tensor, y: Tensor | None, one_pair: bool) -> str:
    """The implementation that computes a whole loss in one call; empty: none does.

    Args:
        impl: as `Criterion` takes it.
        x: (N, D), the anchors.
        y: (M, D), the references, or None.
        one_pair: the loss takes one pair of each class, so that it has as many rows and columns as classes.

    Raises:
        RuntimeError: ``impl="onchip"`` cannot run here; the error gives all reasons.
    """
    (n, d), m, device = x.shape, (x if y is None else y).shape[0], x.device.type
    backend = "tiled" if device == "cpu" else "onchip"
    if impl == "onchip":
        _require(impl, _unsupported_reasons(impl, device))
        backend = impl
    elif device == "cpu":
        pairs = n * m if not one_pair else (n // 2 if y is None else min(n, m)) ** 2
        if impl not in ("auto", "tiled") or pairs > WHOLE_PAIRS or max(n, m) > WHOLE_SIDE:
            return ""
    elif impl != "auto" or device != "cuda" or max(n, m) > ONCHIP_SIDE or n * m * d > ONCHIP_WORK:
        return ""
    return "" if _unsupported_reasons(backend, device) else backend
