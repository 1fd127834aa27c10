"""Which implementation runs: by name, or the one that `auto` takes for the device and the size.

A batch gets its `Route` once (`route_pairs`, `route_chunks`, `route_small_batch`); of a call of some reductions,
`route_call` says whether another implementation computes it.
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
WIDEST_FUSED = 256  # columns of D that a row block's gradient is accumulated over in registers
# Up to where `auto` takes onchip: N, M, and multiply-adds of a product. Launches cost more than arithmetic there.
ONCHIP_SIDE, ONCHIP_WORK = 2048, 2**28
# Up to where `tiled` on the CPU takes a loss whole: its pairs, and N, M. Beyond, its steps cost nothing beside them.
WHOLE_PAIRS, WHOLE_SIDE = 1024**2, 8192
TAKES_CHUNKS = ("tiled", "fused")  # backends whose calls keep nothing that hangs on all references


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


# What torch.compiler.assume_constant_result sets, without importing torch._dynamo: what is built does not change.
_unsupported_reasons._dynamo_marked_constant = True  # type: ignore[attr-defined]


def check_name(impl: str) -> None:
    if impl != "auto" and impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl must be one of auto, {', '.join(IMPLEMENTATIONS)}, got {impl!r}")


class Route(NamedTuple):
    """What runs a batch.

    Attributes:
        backend: one of `IMPLEMENTATIONS`.
        named: the caller asked for it by name, so that no other may run in its place.
        dtype: what embeddings are computed in: their 16 bits where the backend takes these, else float32 or float64.
        reasons: why the implementation that `auto` prefers cannot run; empty where it does.
    """

    backend: str
    named: bool
    dtype: torch.dtype
    reasons: tuple[str, ...] = ()


def _require(impl: str, reasons: Sequence[str]) -> None:
    """RuntimeError: an implementation asked for by name that cannot run, with every reason."""
    if reasons:
        raise RuntimeError(f"impl={impl!r} cannot run: {'; '.join(reasons)}")


def route_pairs(impl: str, x: Tensor, y: Tensor | None) -> Route:
    """The route of embeddings x (N, D) and y (M, D) or None.

    An explicit name never falls back. `auto` goes by device and size and measures nothing: it takes on the CPU `tiled`,
    on a GPU `fused` up to D = 256 and `tiled` from there on, and the reference where these cannot run. (Of small
    batches on a GPU, a criterion asks `onchip` first.)

    Raises:
        ValueError: an unknown name. RuntimeError: a known one that cannot run here, with every reason.
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
    """Embeddings stay in their 16 bits where the GPU multiplies such numbers and adds in float32."""
    dtype = x.dtype if y is None else torch.promote_types(x.dtype, y.dtype)
    if backend == "reference" or x.dtype not in (torch.bfloat16, torch.float16) or dtype != x.dtype:
        return accumulator(dtype)
    native = x.device.type == "cuda" or (backend == "fused" and x.dtype == torch.float16)  # interpreted: no bfloat16
    return x.dtype if native else accumulator(dtype)


def route_chunks(impl: str, x: Tensor) -> Route:
    """The route of anchors x (N, D) whose references come in chunks.

    Raises:
        RuntimeError: an implementation that does not take chunks, or none that can run here.
    """
    route = route_pairs(impl, x, None)
    if route.backend not in TAKES_CHUNKS:
        why = f"impl={impl!r} cannot run" if route.named else "; ".join(route.reasons)
        raise RuntimeError(f"only {' and '.join(map(repr, TAKES_CHUNKS))} take references in chunks: {why}")
    return route._replace(dtype=accumulator(x.dtype))


def route_call(route: Route, call: Call, x: Tensor, refs: int) -> Route:
    """The route of a call of x (N, D) and `refs` references: another backend where the batch's own cannot compute it,
    or where another one is faster, unless the caller has named his.

    Raises:
        RuntimeError: a named implementation that cannot compute this call, with every reason.
    """
    device, d = x.device.type, x.shape[1]
    if any(t.transform >= len(BUILT_IN) for t in call.terms):
        names = [TRANSFORMS[t.transform] for t in call.terms if t.transform >= len(BUILT_IN)]
        reasons = tuple(why for name in names if (why := transforms.unsupported_reasons(name, route.backend, device)))
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
    """The route of a call whose references come in chunks: `screened` in place of `tiled` where it can; each chunk is
    screened if that is worth it."""
    if route.backend != "tiled" or x.device.type != "cpu" or screened.unsupported_reasons(call.terms, x.shape[1]):
        return route
    return route._replace(backend="screened")


def route_small_batch(impl: str, x: Tensor, y: Tensor | None, one_pair: bool) -> Route | None:
    """The route of a whole loss of x (N, D) and y (M, D) or None; None: none of them takes it.

    one_pair: the loss takes one pair of each class, so that its rows and columns are as many as classes.

    Raises:
        RuntimeError: ``impl="onchip"`` that cannot run here, with every reason.
    """
    (n, d), m, device = x.shape, (x if y is None else y).shape[0], x.device.type
    backend = "tiled" if device == "cpu" else "onchip"
    if impl == "onchip":
        _require(impl, _unsupported_reasons(impl, device))
        backend = impl
    elif device == "cpu":
        pairs = n * m if not one_pair else (n // 2 if y is None else min(n, m)) ** 2
        if impl not in ("auto", "tiled") or pairs > WHOLE_PAIRS or max(n, m) > WHOLE_SIDE:
            return None
    elif impl != "auto" or device != "cuda" or max(n, m) > ONCHIP_SIDE or n * m * d > ONCHIP_WORK:
        return None
    if _unsupported_reasons(backend, device):
        return None
    dtype = x.dtype if y is None else torch.promote_types(x.dtype, y.dtype)
    narrow = backend == "onchip" and dtype == x.dtype  # which takes 16 bits as they are
    return Route(backend, impl != "auto", dtype if narrow else accumulator(dtype))
