"""Sums over blocks of positives, so that losses of single positive pairs need memory linear in N."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from ..core.similarity import no_autocast

Block = TypeVar("Block")
Run = Callable[[Block], tuple[Tensor, ...]]


def sum_of_blocks(run: Run[Block], blocks: Sequence[Block], kept: int, device: torch.device) -> list[Tensor]:
    """The sums over all blocks of the tensors that run(block) returns.

    Args:
        run: a function of a block, which returns tensors of the same shapes for each.
        blocks: the blocks.
        kept: with more blocks than this, backward recomputes each block, and nothing is kept for it.
        device: the device of the tensors.
    """
    recompute = len(blocks) > kept and torch.is_grad_enabled()
    sums: list[Tensor] = []
    for block in blocks:
        if not recompute:
            parts = run(block)
        elif torch.compiler.is_compiling():
            parts = checkpoint(run, block, use_reentrant=False)
        else:
            parts = _recomputed(run, block, device)
        sums = [total + part for total, part in zip(sums, parts, strict=True)] if sums else list(parts)
    return sums


def _recomputed(run: Run[Block], block: Block, device: torch.device) -> tuple[Tensor, ...]:
    """run(block), which keeps no tensors: backward runs it again when it asks for the first one.

    torch.utils.checkpoint would do the same, but its first call imports the compiler: seconds, and 150 MB.
    """
    count, recomputed = 0, dict[int, Tensor]()

    def forget(_: Tensor) -> int:
        nonlocal count
        count += 1
        return count - 1

    def remember(place: int) -> Tensor:
        if place not in recomputed:
            every: list[Tensor] = []
            with torch.enable_grad(), no_autocast(device.type), saved_tensors_hooks(_into(every), _never):
                run(block)
            if len(every) != count:
                raise RuntimeError(
                    f"a loss saved {len(every)} tensors when backward recomputed it, and {count} in its forward pass"
                )
            recomputed.update(enumerate(every))
        return recomputed.pop(place)

    with saved_tensors_hooks(forget, remember):
        return run(block)


def _into(every: list[Tensor]) -> Callable[[Tensor], None]:
    def keep(t: Tensor) -> None:
        every.append(t.detach())

    return keep


def _never(_: None) -> Tensor:
    raise RuntimeError("a backward pass ran while a loss was recomputed for its saved tensors")
