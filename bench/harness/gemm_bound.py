"""The GEMM bound: the bare matrix products that a loss of all pairs cannot do without, by torch.mm.

It is three products of 2 N M D flop each: similarities S = X Y^T, then S Y, then S^T X. Forward and a backward that
keeps S need these. References without gradient need no S^T X, but a backward that does not keep S computes it again,
which also makes three; a backward that keeps S needs two. All outputs are allocated beforehand, so that no page fault
is counted. The bound does not use that S of a batch against itself is symmetric, so code that does can be faster.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .cases import Batch, Case
from .options import GEMM_BOUND

WHOLE = 2**28  # up to so many entries S is stored whole
BLOCK_ROWS = 2048
SLOWEST = 1e9  # flop per second


def bound_products(case: Case, variant: str) -> int:
    """How many products a bound has: one of a forward pass, three of a step, two of a step that keeps S."""
    return 1 if not case.options.backward else 3 if variant == GEMM_BOUND else 2


def products(case: Case, count: int = 3) -> list[str]:
    if count == 1:
        return ["S = X Y^T"]
    if case.both_learn:
        return ["S = X Y^T", "S Y", "S^T X"]
    return ["S = X Y^T", "S = X Y^T again", "S Y"] if count == 3 else ["S = X Y^T", "S Y"]


def block_rows(case: Case) -> int:
    rows, cols = case.pairs_shape
    return rows if rows * cols <= WHOLE else min(rows, BLOCK_ROWS)


def is_small(case: Case) -> bool:
    """Whether a case is certainly within the limits on any machine, so that no attempt is needed."""
    rows, cols = case.pairs_shape
    entries = block_rows(case) * cols + 4 * (rows + cols) * case.d
    fits = entries * case.compute_dtype.itemsize < case.options.memory_limit
    return fits and 6 * rows * cols * case.d < SLOWEST * case.options.time_limit


def describe(case: Case, count: int = 3) -> dict[str, Any]:
    """The products of the bound, for the JSON."""
    rows, cols = case.pairs_shape
    names = products(case, count)
    return {
        "products": names,
        "rows": rows,
        "columns": cols,
        "flop": 2 * rows * cols * case.d * len(names),
        "dtype": str(case.compute_dtype).removeprefix("torch."),
        "row_blocks_of": None if block_rows(case) == rows else block_rows(case),
        "outputs": "allocated beforehand",
    }


def make_gemm_bound(case: Case, batch: Batch, count: int = 3) -> Callable[[], None]:
    rows, cols = case.pairs_shape
    x = batch.x.detach()[:rows].to(case.compute_dtype)
    if case.centres:
        y = torch.randn(cols, case.d, generator=torch.Generator().manual_seed(0)).to(x)
    else:
        y = x if batch.y is None else batch.y[:cols].to(case.compute_dtype)
    block = block_rows(case)
    similarities = x.new_zeros(block, cols)
    dx = torch.zeros_like(x) if count > 1 else None
    dy = torch.zeros_like(y) if case.both_learn and count > 1 else None
    again = "S = X Y^T again" in products(case, count)

    def step() -> None:
        for start in range(0, rows, block):
            xb = x[start : start + block]
            s = similarities[: xb.shape[0]]
            torch.mm(xb, y.T, out=s)
            if again:
                torch.mm(xb, y.T, out=s)
            if dx is not None:
                torch.mm(s, y, out=dx[start : start + block])
            if dy is not None and start == 0:
                torch.mm(s.T, xb, out=dy)
            elif dy is not None:
                dy.addmm_(s.T, xb)

    return step
