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
kept: list[torch.Tensor] = []  # rows (N, D) that the kernels have made of embeddings, in the caller's order


def _everywhere(stack: contextlib.ExitStack, old: Callable[..., Any], new: Callable[..., Any]) -> None:
    """Replaces a function in every module that has imported it."""
    for name, module in list(sys.modules.items()):
        if name.startswith("flashpair"):
            for attribute, value in list(vars(module).items()):
                if value is old:
                    stack.enter_context(mock.patch.object(module, attribute, new))


def _native(impl: str, x: torch.Tensor, y: torch.Tensor | None) -> bool:
    return impl != "reference" and x.dtype in (torch.bfloat16, torch.float16) and (y is None or y.dtype == x.dtype)


def _sorted_rows(x: torch.Tensor, order: torch.Tensor, *, unit: bool, impl: str) -> torch.Tensor:
    found = rows._KernelRows.apply(x.contiguous(), order, unit)
    kept.append(torch.empty_like(found.detach()).index_copy(0, order, found.detach()))
    return found


@contextlib.contextmanager
def gpu(arch: str) -> Iterator[None]:
    """Until it ends, `impl` on CPU tensors means what it means on a GPU of that architecture."""
    with contextlib.ExitStack() as stack:
        modules = {impl: importlib.import_module(name) for impl, name in SCHEDULES.items()}
        _everywhere(stack, ops.schedule_of, lambda impl, device: modules[impl])
        _everywhere(stack, rows.sorted_rows, _sorted_rows)
        _everywhere(stack, dispatch.native, _native)
        _everywhere(stack, dispatch.choose_whole, lambda *args: "")
        _everywhere(stack, dispatch._obstacles, lambda impl, device: ())
        stack.enter_context(mock.patch.object(configs, "family", lambda device: FAMILIES[arch]))
        stack.enter_context(mock.patch.object(blocked, "BLOCK", BLOCK))
        stack.enter_context(chip(arch))
        yield
