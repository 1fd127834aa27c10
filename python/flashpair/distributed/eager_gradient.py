"""Gradients that are computed in the forward pass, where all processes communicate. Backward only multiplies."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ..core.chunks import only_once
from .collectives import Ranks


class EagerGradient(torch.autograd.Function):
    """The sum of the processes' shares of a loss. Forward also computes this process's gradients.

    `share` is a function of the inputs, this process's share (). `needs` says whether any process needs gradients of
    the first input, of the second one, and of all others.
    """

    @staticmethod
    def forward(
        ctx: Any, ranks: Ranks, share: Callable[..., Tensor], needs: list[bool], *inputs: Tensor | None
    ) -> Tensor:
        leaves = [None if t is None else t.detach() for t in inputs]
        wanted = {k: t for k, t in enumerate(leaves) if t is not None and needs[min(k, 2)]}
        for t in wanted.values():  # even if only other processes need it: they wait for this process's part
            t.requires_grad_()
        with torch.set_grad_enabled(bool(wanted)), kept():
            own_share = share(*leaves)
        ctx.gradients = {}
        if wanted:
            gradients = torch.autograd.grad(own_share, list(wanted.values()), allow_unused=True)
            ctx.gradients = dict(zip(wanted, gradients, strict=True))
        return ranks.sum(own_share.detach())

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        only_once()
        gradients = [ctx.gradients.get(k) if need else None for k, need in enumerate(ctx.needs_input_grad[3:])]
        return None, None, None, *(None if gradient is None else gradient * g for gradient in gradients)


@contextlib.contextmanager
def kept() -> Iterator[None]:
    """A context in which autograd keeps its tensors, even within torch.utils.checkpoint.

    A checkpoint would compute the tensors again, and so communicate again: here in forward, or in backward on only
    those processes that have gradients.
    """
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    if top is not None and top(True) is None:
        yield
        return
    with torch.autograd.graph.saved_tensors_hooks(_keep, _unchanged):
        yield


def _keep(t: Tensor) -> tuple[Tensor, int]:
    return t.detach(), t._version  # detached, since a node that keeps its own output would never be freed


def _unchanged(kept: tuple[Tensor, int]) -> Tensor:
    t, version = kept
    if t._version != version:
        raise RuntimeError("a tensor that the loss's gradient needs was changed in place after the loss was computed")
    return t
