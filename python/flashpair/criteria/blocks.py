"""Losses of each positive pair: a block of places in the list of positives at a time, so that memory stays linear."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

Block = TypeVar("Block")


def sum_of_blocks(run: Callable[[Block], tuple[Tensor, ...]], blocks: Sequence[Block], kept: int) -> list[Tensor]:
    """What run(block) returns, added up over the blocks. Of up to `kept` blocks all is kept for backward; of more,
    nothing is, and backward runs each again."""
    again = len(blocks) > kept and torch.is_grad_enabled()
    sums: list[Tensor] = []
    for block in blocks:
        if again:
            found = checkpoint(run, block, use_reentrant=False, preserve_rng_state=False)
        else:
            found = run(block)
        sums = [total + part for total, part in zip(sums, found, strict=True)] if sums else list(found)
    return sums
