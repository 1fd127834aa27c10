"""Gradients that are computed in forward, where all processes communicate, so that backward only multiplies."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ..core.chunks import only_once
from .collectives import Ranks


class EagerGradient(torch.autograd.Function):
    """The sum of the processes' shares, with this process's gradients computed in forward, where all communicate."""

    @staticmethod
    def forward(
        ctx: Any, ranks: Ranks, share: Callable[..., Tensor], needs: list[bool], *inputs: Tensor | None
    ) -> Tensor:
        leaves = [None if t is None else t.detach() for t in inputs]
        wanted = {k: t for k, t in enumerate(leaves) if t is not None and needs[min(k, 2)]}
        for t in wanted.values():  # here, too, where only others want it: they wait for this process's part
            t.requires_grad_()
        with torch.set_grad_enabled(bool(wanted)), kept():
            mine = share(*leaves)
        ctx.found = {}
        if wanted:
            found = torch.autograd.grad(mine, list(wanted.values()), allow_unused=True)
            ctx.found = dict(zip(wanted, found, strict=True))
        return ranks.sum(mine.detach())

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        only_once()
        found = [ctx.found.get(k) if need else None for k, need in enumerate(ctx.needs_input_grad[3:])]
        return None, None, None, *(None if part is None else part * g for part in found)


@contextlib.contextmanager
def kept() -> Iterator[None]:
    """What is computed inside keeps its tensors, also within torch.utils.checkpoint, which would compute, and so
    communicate, again for them: here in forward, or in backward on those processes alone that have any."""
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    if top is not None and top(True) is None:
        yield
        return
    with torch.autograd.graph.saved_tensors_hooks(_keep, _unchanged):
        yield


def _keep(t: Tensor) -> tuple[Tensor, int]:
    return t.detach(), t._version  # detached: what keeps its own output would never be freed


def _unchanged(kept: tuple[Tensor, int]) -> Tensor:
    t, version = kept
    if t._version != version:
        raise RuntimeError("a tensor that the loss's gradient needs was changed in place after the loss was computed")
    return t
