"""`onchip`: the loss and the gradient of an everyday batch in one launch of CUDA C++ (csrc/cuda/onchip.cu).

It computes whole losses (small_batch.py), not row reductions. Allocates, beside its results, one workspace,
O((N + M) D). No host sync; the tensors' device and its current stream.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch

from ...core.problem import Results, SmallBatch, accumulator, address
from .. import extension

BLOCK_ROWS = (1, 2, 4, 8, 16)  # that a block may own: csrc/cuda/onchip.cu has a kernel for each
SCRATCH, ROW_NUMBERS = 4 * 8, 8  # of a block, and of each of its rows, beside embeddings and similarities: onchip.cu


class Limits(NamedTuple):
    """A device's multiprocessors, bytes of shared memory a block may have, and whether it has cooperative launches."""

    processors: int
    shared: int
    cooperative: bool


@functools.lru_cache(maxsize=16)
def _limits(index: int) -> Limits | str:
    module = extension.onchip()
    assert not isinstance(module, str)  # dispatch.unsupported_reasons comes first
    try:
        if module.emulated:
            return Limits(*module.limits(index))
        with torch.cuda.device(index):
            return Limits(*module.limits(index))
    except RuntimeError as error:
        return str(error)


def limits(index: int) -> Limits | str:
    """Those of the CUDA device of that index, or why the kernel cannot run there."""
    return _limits(index)


limits._dynamo_marked_constant = True  # type: ignore[attr-defined]


def block_rows(n: int, m: int, d: int, itemsize: int, want_dy: bool, of: Limits | str) -> int | str:
    """How many rows a block owns: as few as the multiprocessors allow, one block each; or why none will do.

    A block's shared memory holds its rows, of width D, and their stripe of similarities with all others.
    """
    if isinstance(of, str):
        return of
    if not of.cooperative:
        return "the device has no cooperative launches"
    others, width = -(-max(n, m) // 4) * 4, -(-d // 4) * 4
    owned = "N + M" if want_dy else "N"
    for rows in BLOCK_ROWS:
        blocks = max(1, -(-n // rows)) + (-(-m // rows) if want_dy else 0)
        if blocks > of.processors:
            continue
        needed = itemsize * (rows * (others + width + ROW_NUMBERS) + SCRATCH) + rows * others  # and a byte a pair
        if needed <= of.shared:
            return rows
        return (
            f"a block's {rows} rows of {others} similarities and of D = {width} take {needed} bytes of shared memory,"
            f" and a block has {of.shared}"
        )
    most = BLOCK_ROWS[-1]
    return (
        f"{owned} = {n + m if want_dy else n} is over {most * of.processors}:"
        f" {of.processors} multiprocessors with {most} rows each"
    )


def largest_batch(d: int, of: Limits) -> int:
    """The largest N of a float32 batch of width D against itself."""
    largest = 0
    for n in range(4, BLOCK_ROWS[-1] * of.processors + 1, 4):
        if isinstance(block_rows(n, n, d, 4, False, of), int):
            largest = n
    return largest


@functools.lru_cache(maxsize=1024)
def _launch(
    device: int, shape: tuple[int, ...], code: tuple[int, ...], numbers: tuple[float, ...], want_dy: bool
) -> Any:
    module = extension.onchip()
    assert not isinstance(module, str)
    return module.Launch(device, shape, code, numbers, want_dy)


def run_small_batch(call: SmallBatch) -> Results:
    device, dtype = call.x.device, accumulator(call.x.dtype)
    index = device.index or 0
    if device.type == "cuda" and torch.cuda.current_device() != index:
        with torch.cuda.device(index):
            return run_small_batch(call)
    x, labels, refs, ref_labels = call.operands()
    launch = _launch(index, call.shape, call.code, call.numbers, call.want_dy)
    results = call.room(dtype)
    workspace = torch.empty(launch.workspace, dtype=torch.uint8, device=device)
    stream = torch._C._cuda_getCurrentRawStream(index) if device.type == "cuda" else 0
    given = (x, refs, labels, ref_labels, call.upstream, *results, workspace)
    launch(*(address(t, device.type) for t in given), stream)
    return results
