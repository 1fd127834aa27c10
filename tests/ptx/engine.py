"""The engine on CPU tensors as if they were on a GPU: its schedules of the GPU, their kernels run by the executor."""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from flashpair.kernels import configs

from flashpair import blocked, dispatch, ops, rows

from .launch import chip

FAMILIES = {"sm_80": configs.AMPERE, "sm_90": configs.HOPPER}
SCHEDULES = {"tiled": "flashpair.blocked", "fused": "flashpair.fused", "screened": "flashpair.sifted"}
BLOCK = 128  # of `blocked`, so that small batches have several


def _everywhere(stack: contextlib.ExitStack, old: Callable[..., Any], new: Callable[..., Any]) -> None:
    """Replaces a function in every module that has imported it."""
    for name, module in list(sys.modules.items()):
        if name.startswith("flashpair"):
            for attribute, value in list(vars(module).items()):
                if value is old:
                    stack.enter_context(mock.patch.object(module, attribute, new))


def _native(impl: str, x: torch.Tensor, y: torch.Tensor | None) -> bool:
    return impl != "reference" and x.dtype in (torch.bfloat16, torch.float16) and (y is None or y.dtype == x.dtype)


def _sorted_rows(
    x: torch.Tensor, order: torch.Tensor, *, unit: bool, impl: str, of: Callable[..., torch.Tensor] = rows.sorted_rows
) -> torch.Tensor:
    return of(x, order, unit=unit, impl="fused")  # whose rows are the kernels' on every device


def _choose_whole(impl: str, *rest: Any, of: Callable[..., str] = dispatch.choose_whole) -> str:
    return of(impl, *rest) if impl == "onchip" else ""


def _obstacles(impl: str, device: str, of: Callable[..., tuple[str, ...]] = dispatch._obstacles) -> tuple[str, ...]:
    return of(impl, device) if impl == "onchip" else ()


_obstacles._dynamo_marked_constant = True  # type: ignore[attr-defined]


@contextlib.contextmanager
def gpu(arch: str) -> Iterator[None]:
    """Until it ends, `impl` on CPU tensors means what it means on a GPU of that architecture.

    `onchip` is what flashpair.extension finds, or onchip.py's.
    """
    with contextlib.ExitStack() as stack:
        modules = {impl: importlib.import_module(name) for impl, name in SCHEDULES.items()}
        _everywhere(stack, ops.schedule_of, lambda impl, device: modules[impl])
        _everywhere(stack, rows.sorted_rows, _sorted_rows)
        _everywhere(stack, dispatch.native, _native)
        _everywhere(stack, dispatch.choose_whole, _choose_whole)
        _everywhere(stack, dispatch._obstacles, _obstacles)
        stack.enter_context(mock.patch.object(configs, "family", lambda device: FAMILIES[arch]))
        stack.enter_context(mock.patch.object(blocked, "BLOCK", BLOCK))
        stack.enter_context(chip(arch))
        yield
