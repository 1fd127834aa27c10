"""Small Triton kernels that prove the executor, whose results are equal to numpy's: `python -m tests.ptx trials`.

Products of small integers, which every type holds and adds without rounding: from memory and from registers, of rows
and of columns, in one go and in a loop that loads ahead; scans, reductions, exchanges, special functions.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl

from . import launch

DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32, "f64": torch.float64, "s8": torch.int8}


@triton.jit
def multiply(
    a, b, c, k, ROWS: tl.constexpr, COLS: tl.constexpr, STEP: tl.constexpr, TRANS: tl.constexpr, ACC: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """c (ROWS, COLS) = a (ROWS, k) b, with b (k, COLS), or (COLS, k) if TRANS."""
    row, col, step = tl.arange(0, ROWS), tl.arange(0, COLS), tl.arange(0, STEP)
    total = tl.zeros((ROWS, COLS), ACC)
    for start in tl.range(0, k, STEP, num_stages=STAGES):
        at = start + step
        left = tl.load(a + row[:, None] * k + at[None, :], mask=at[None, :] < k, other=0)
        if TRANS:
            right = tl.trans(tl.load(b + col[:, None] * k + at[None, :], mask=at[None, :] < k, other=0))
        else:
            right = tl.load(b + at[:, None] * COLS + col[None, :], mask=at[:, None] < k, other=0)
        total = tl.dot(left, right, total, out_dtype=ACC, input_precision="tf32")
    tl.store(c + row[:, None] * COLS + col[None, :], total)


@triton.jit
def twice(a, b, c, ROWS: tl.constexpr, COLS: tl.constexpr, K: tl.constexpr, ACC: tl.constexpr):
    """c (ROWS, K) = (a b^T) b: the second product takes the first's result from registers."""
    row, col, k = tl.arange(0, ROWS), tl.arange(0, COLS), tl.arange(0, K)
    left = tl.load(a + row[:, None] * K + k[None, :])
    right = tl.load(b + col[:, None] * K + k[None, :])
    inner = tl.dot(left, tl.trans(right), out_dtype=ACC, input_precision="tf32")
    outer = tl.dot(inner.to(right.dtype), right, out_dtype=ACC, input_precision="tf32")
    tl.store(c + row[:, None] * K + k[None, :], outer)


@triton.jit
def along(x, sums, scan, best, where, turned, ROWS: tl.constexpr, COLS: tl.constexpr):
    row, col = tl.arange(0, ROWS), tl.arange(0, COLS)
    tile = tl.load(x + row[:, None] * COLS + col[None, :])
    tl.store(sums + row, tl.sum(tile, 1))
    tl.store(scan + row[:, None] * COLS + col[None, :], tl.cumsum(tile, 1))
    tl.store(best + col, tl.max(tile, 0))
    tl.store(where + row, tl.argmin(tile, 1))
    tl.store(turned + col[:, None] * ROWS + row[None, :], tl.trans(tile))


@triton.jit
def functions(x, found, N: tl.constexpr):
    at = tl.arange(0, N)
    value = tl.load(x + at)
    tl.store(found + at, tl.exp(value))
    tl.store(found + N + at, tl.log(value))
    tl.store(found + 2 * N + at, tl.sqrt(value))
    tl.store(found + 3 * N + at, 1.0 / value)
    tl.store(found + 4 * N + at, tl.floor(value * 3.7))


def integers(*shape: int, most: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    return torch.randint(-most, most + 1, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _kinds(name: str) -> tuple[torch.dtype, Any]:
    if name == "s8":
        return torch.int32, tl.int32
    return (torch.float64, tl.float64) if name == "f64" else (torch.float32, tl.float32)


def products() -> Iterator[tuple[str, bool]]:
    sizes = [(64, 32, 32, 4), (128, 64, 64, 4), (128, 128, 64, 8), (64, 16, 32, 4)]
    for name, (rows, cols, step, warps), trans in itertools.product(DTYPES, sizes, (True, False)):
        if rows * cols > {8: 4096, 4: 8192}.get(DTYPES[name].itemsize, 2**20):
            continue  # three stages of it are more than a block's shared memory
        wide, acc = _kinds(name)
        for k, stages in ((step, 1), (3 * step + 16, 3)):
            a = integers(rows, k, most=4, dtype=DTYPES[name], seed=1)
            b = integers(*((cols, k) if trans else (k, cols)), most=4, dtype=DTYPES[name], seed=2)
            c = torch.full((rows, cols), -1, dtype=wide)
            multiply[(1,)](a, b, c, k, rows, cols, step, trans, acc, stages, num_warps=warps)
            truth = a.double() @ (b.double().T if trans else b.double())
            yield (
                f"product {name} {rows}x{cols}x{k}{' transposed' * trans} {stages} stages",
                torch.equal(c.double(), truth),
            )


def chains() -> Iterator[tuple[str, bool]]:
    for name, (rows, cols, k, warps) in itertools.product(("bf16", "f16", "f32"), ((64, 32, 64, 4), (128, 64, 128, 8))):
        a = integers(rows, k, most=1, dtype=DTYPES[name], seed=3)
        b = integers(cols, k, most=1, dtype=DTYPES[name], seed=4) * (torch.arange(k) % 5 == 0)
        c = torch.full((rows, k), -1.0)
        b = b.to(DTYPES[name])
        twice[(1,)](a, b, c, rows, cols, k, tl.float32, num_warps=warps)
        truth = a.double() @ b.double().T @ b.double()
        yield f"two products {name} {rows}x{cols}x{k}", torch.equal(c.double(), truth)


def rows() -> Iterator[tuple[str, bool]]:
    for dtype, (n, m, warps) in itertools.product((torch.float32, torch.int32), ((8, 64, 4), (64, 128, 8), (4, 32, 1))):
        x = integers(n, m, most=50, dtype=dtype, seed=n)
        sums, scan, best = torch.empty(n, dtype=dtype), torch.empty_like(x), torch.empty(m, dtype=dtype)
        where, turned = torch.empty(n, dtype=torch.int32), torch.empty(m, n, dtype=dtype)
        along[(1,)](x, sums, scan, best, where, turned, n, m, num_warps=warps)
        first = (x == x.min(1, keepdim=True).values).int().argmax(1)
        pairs = [(sums, x.sum(1)), (scan, x.cumsum(1)), (best, x.max(0).values), (where, first), (turned, x.T)]
        yield f"along rows {dtype} {n}x{m}", all(torch.equal(a, b.to(a.dtype)) for a, b in pairs)


def special() -> Iterator[tuple[str, bool]]:
    for dtype, off in ((torch.float32, 4e-7), (torch.float64, 1e-15)):
        x = torch.rand(256, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype) * 9 + 0.1
        found = torch.empty(5, 256, dtype=dtype)
        functions[(1,)](x, found, 256)
        exact = x.double()
        truth = torch.stack([exact.exp(), exact.log(), exact.sqrt(), 1 / exact, (x * 3.7).floor().double()])
        yield f"functions {dtype}", bool(((found.double() - truth).abs() <= off * truth.abs().clamp_min(0.1) * 8).all())


def run(arch: str) -> Iterator[dict[str, Any]]:
    with launch.chip(arch):
        for trial, good in itertools.chain(products(), chains(), rows(), special()):
            yield {"case": f"{arch} {trial}", "good": good, "fault": ""}
