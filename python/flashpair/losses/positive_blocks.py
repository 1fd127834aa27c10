"""Losses of each positive pair: a block of places in the list of positives at a time, so that memory stays linear."""

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
    """What run(block) returns, added up over the blocks. Of up to `kept` blocks all is kept for backward; of more,
    nothing is, and backward runs each again, on the same device."""
    again = len(blocks) > kept and torch.is_grad_enabled()
    sums: list[Tensor] = []
    for block in blocks:
        if not again:
            found = run(block)
        elif torch.compiler.is_compiling():
            found = checkpoint(run, block, use_reentrant=False)
        else:
            found = _forgotten(run, block, device)
        sums = [total + part for total, part in zip(sums, found, strict=True)] if sums else list(found)
    return sums


def _forgotten(run: Run[Block], block: Block, device: torch.device) -> tuple[Tensor, ...]:
    """run(block), which backward runs again at the first tensor that it asks for: torch.utils.checkpoint, without the
    150 MB and the seconds that its first call takes to import the compiler."""
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
