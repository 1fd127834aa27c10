"""The engine on CPU tensors as if they were on a GPU: its schedules of the GPU, their kernels run by the executor."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from flashpair.backends.triton.kernels import configs

from flashpair.backends.triton import tiled
from flashpair.engine import dispatch, row_reduce_op, sorted_rows

from .launch import chip

FAMILIES = {"sm_80": configs.AMPERE, "sm_90": configs.HOPPER}
SCHEDULES = ("tiled", "fused", "screened")
BLOCK = 128  # of `tiled`, so that small batches have several
kept: list[torch.Tensor] = []  # rows (N, D) that the kernels have made of embeddings, in the caller's order


def _everywhere(stack: contextlib.ExitStack, old: Callable[..., Any], new: Callable[..., Any]) -> None:
    """Replaces a function in every module that has imported it."""
    for name, module in list(sys.modules.items()):
        if name.startswith("flashpair"):
            for attribute, value in list(vars(module).items()):
                if value is old:
                    stack.enter_context(mock.patch.object(module, attribute, new))


def _compute_dtype(
    backend: str, x: torch.Tensor, y: torch.Tensor | None, of: Callable[..., torch.dtype] = dispatch.compute_dtype
) -> torch.dtype:
    native = backend != "reference" and x.dtype in (torch.bfloat16, torch.float16) and (y is None or y.dtype == x.dtype)
    return x.dtype if native else of(backend, x, y)


def _sorted_rows(
    x: torch.Tensor,
    order: torch.Tensor,
    *,
    normalize: bool,
    impl: str,
    of: Callable[..., torch.Tensor] = sorted_rows.sorted_rows,
) -> torch.Tensor:
    found = of(x, order, normalize=normalize, impl="fused")  # whose rows are the kernels' on every device
    kept.append(torch.empty_like(found.detach()).index_copy(0, order, found.detach()))
    return found


def _small_batch_backend(impl: str, *rest: Any, of: Callable[..., str] = dispatch.small_batch_backend) -> str:
    return of(impl, *rest) if impl == "onchip" else ""


def _unsupported_reasons(
    impl: str, device: str, of: Callable[..., tuple[str, ...]] = dispatch._unsupported_reasons
) -> tuple[str, ...]:
    return of(impl, device) if impl == "onchip" else ()


_unsupported_reasons._dynamo_marked_constant = True  # type: ignore[attr-defined]


@contextlib.contextmanager
def gpu(arch: str) -> Iterator[None]:
    """Until it ends, `impl` on CPU tensors means what it means on a GPU of that architecture.

    `onchip` is what flashpair.backends.extension finds, or onchip.py's.
    """
    with contextlib.ExitStack() as stack:
        modules = {impl: row_reduce_op.triton_backend(impl) for impl in SCHEDULES}
        _everywhere(stack, row_reduce_op.backend_module, lambda impl, device: modules[impl])
        _everywhere(stack, sorted_rows.sorted_rows, _sorted_rows)
        _everywhere(stack, dispatch.compute_dtype, _compute_dtype)
        _everywhere(stack, dispatch.small_batch_backend, _small_batch_backend)
        _everywhere(stack, dispatch._unsupported_reasons, _unsupported_reasons)
        stack.enter_context(mock.patch.object(configs, "family", lambda device: FAMILIES[arch]))
        stack.enter_context(mock.patch.object(tiled, "BLOCK", BLOCK))
        stack.enter_context(chip(arch))
        yield
