"""`onchip`: the loss and the gradient of a small batch in one launch of CUDA C++ (csrc/cuda/onchip.cu).

It computes whole losses (engine/small_batch.py), not row reductions. Beside its results it allocates one workspace of
O((N + M) D). It runs on the tensors' device, on the current stream there, and the host does not wait.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch

from ...core.problem import Results, SmallBatch, accumulator, address
from .. import extension

BLOCK_ROWS = (1, 2, 4, 8, 16)  # how many rows a block may own; csrc/cuda/onchip.cu has a kernel for each
# Numbers in shared memory beside embeddings and similarities: of a block, and of each of its rows (onchip.cu).
SCRATCH, ROW_NUMBERS = 4 * 8, 8


class Limits(NamedTuple):
    """The limits of a device.

    Attributes:
        processors: the number of multiprocessors.
        shared: the bytes of shared memory that a block may have.
        cooperative: whether the device has cooperative launches.
    """

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
    """The limits of the CUDA device of that index, or the reason why the kernel cannot run there."""
    return _limits(index)


limits._dynamo_marked_constant = True  # type: ignore[attr-defined]


def block_rows(n: int, m: int, d: int, itemsize: int, want_dy: bool, of: Limits | str) -> int | str:
    """How many rows a block owns, or the reason why no number works.

    It is the smallest number with which each multiprocessor has at most one block. A block's shared memory holds its
    rows and their similarities with all other rows.

    Args:
        n: N.
        m: M.
        d: D.
        itemsize: the bytes of a number.
        want_dy: blocks own references, too, for their gradient.
        of: the limits of the device.
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
    """The prepared launch for a shape and the constants of a call."""
    module = extension.onchip()
    assert not isinstance(module, str)
    return module.Launch(device, shape, code, numbers, want_dy)


def run_small_batch(call: SmallBatch) -> Results:
    """A whole loss by one launch."""
    device, dtype = call.x.device, accumulator(call.x.dtype)
    index = device.index or 0
    if device.type == "cuda" and torch.cuda.current_device() != index:
        with torch.cuda.device(index):
            return run_small_batch(call)
    x, labels, refs, ref_labels = call.operands()
    launch = _launch(index, call.shape, call.code, call.numbers, call.want_dy)
    results = call.empty_results(dtype)
    workspace = torch.empty(launch.workspace, dtype=torch.uint8, device=device)
    stream = torch._C._cuda_getCurrentRawStream(index) if device.type == "cuda" else 0
    tensors = (x, refs, labels, ref_labels, call.upstream, *results, workspace)
    launch(*(address(t, device.type) for t in tensors), stream)
    return results
