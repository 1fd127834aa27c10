"""References that do not fit memory: read a block at a time, from an array on disk, from host memory or an iterable."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from ..core import checks
from ..core.chunks import Chunk, Received
from ..core.extras import extra
from ..core.similarity import nan_unless_finite
from ..engine.dispatch import route_chunks
from ..engine.sorted_rows import sorted_rows
from .pairs import ChunkedPairs, LabelledSource

BLOCK_BYTES = 2**25  # of references that are read at a time, unless the caller says how many
LABELS = 2**18  # that are sorted at a time to count them


class StreamedReferences:
    """References (M, D) with labels (M,) that do not fit in memory and are read a block at a time.

    They stand where `ref_emb` does: ``criterion(embeddings, labels, ref_emb=StreamedReferences(np.memmap(...),
    bank_labels))``. The loss and the anchors' gradient are those of all references in one tensor; references get no
    gradient.

    Beside the anchors' own memory a call holds two blocks (one is computed, the next is read ahead) and the labels. A
    call reads all references once for each stage of its mining (Multi-Similarity has three) and once for the gradient.
    They must be the same each time: rows that change in between (a file that is written to, a loader that shuffles) are
    an error.

    Args:
        source: an array (M, D) of a floating dtype, such as ``numpy.memmap``, or a tensor, on any device; blocks are
            moved to the anchors' device. Or an iterable that yields tensors (m, D), M rows in all and the same each
            time it is iterated over: a list, a DataLoader, or a function of no arguments that returns an iterator.
        labels: (M,), integers.
        block: rows to read at a time; None: as many as 32 MB hold. The tensors of an iterable are its blocks.
        progress: True shows a progress bar (needs rich); a function is called after each block with the number of
            blocks read and the number in this pass (0 if an iterable does not say).

    Shape:
        - source: (M, D), floating-point. labels: (M,), integers.

    Raises:
        TypeError: a source that can be read only once (a generator) or has no floating dtype; labels that are not
            integers (M,).
        ValueError: a source of another shape, or `block` below 1; in a call, blocks that do not add up to M rows of the
            anchors' width, or that have changed since they were read first.

    Examples:
        >>> x = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0], [-0.8, 0.6]])
        >>> labels = torch.tensor([0, 0, 1, 1])
        >>> bank = flashpair.StreamedReferences([torch.eye(2), -torch.eye(2)], torch.tensor([0, 1, 0, 1]))
        >>> round(flashpair.NTXentLoss(temperature=0.5)(x, labels, ref_emb=bank).item(), 4)
        1.708
    """

    def __init__(
        self,
        source: Any,
        labels: Tensor,
        *,
        block: int | None = None,
        progress: bool | Callable[[int, int], object] = False,
    ) -> None:
        if isinstance(source, Iterator):
            raise TypeError(
                "source must be readable more than once, such as a list or a function that returns an iterator, got "
                f"{type(source).__name__}"
            )
        some = callable(source) or isinstance(source, Iterable) or hasattr(source, "shape")
        if not some or isinstance(source, (str, bytes, dict)):
            kind = type(source).__name__
            raise TypeError(f"source must be an array, a tensor, an iterable or a function, got {kind}")
        shape = getattr(source, "shape", None)
        if shape is not None and len(shape) != 2:
            raise ValueError(f"source must have shape (M, D), got {tuple(shape)}")
        if shape is not None:
            _check_dtype(source)
        labels = checks.labels_dtype(labels, length="M")
        if labels.dim() != 1:
            raise TypeError(f"labels must be an integer tensor of shape (M,), got {checks.what(labels)}")
        if shape is not None and shape[0] != labels.shape[0]:
            raise ValueError(f"labels must have shape (M,) = ({shape[0]},) like source, got {checks.what(labels)}")
        self.source, self.block = source, checks.most(block, "block")
        with torch.inference_mode(False), torch.no_grad():  # a copy: the caller may change theirs
            self.labels = labels.to(torch.int64, copy=True)
        self.progress = progress
        self._sorted: tuple[Tensor, Tensor] | None = None

    def __len__(self) -> int:
        return self.labels.shape[0]

    def pairs(
        self, x: Tensor, labels: Tensor, distance: str, normalize: bool, prepare: Callable[[Tensor], Tensor] | None,
        impl: str,
    ) -> ChunkedPairs:  # fmt: skip
        """Pairs of anchors (N, D) and these; see `Criterion.preparation` for normalize and prepare."""
        route = route_chunks(impl, x)
        x = x.to(route.dtype)
        x = x if prepare is None else prepare(x)
        ref_source = _Stream(self, labels, normalize, route.backend, prepare)
        rows = sorted_rows(x, ref_source.order, normalize=normalize, impl=route.backend)
        return ChunkedPairs(rows, ref_source.order, ref_source, False, distance, route)

    def sorted_labels(self, device: torch.device) -> tuple[Tensor, Tensor]:
        if self._sorted is None or self._sorted[0].device != device:
            self._sorted = tuple(torch.sort(self.labels.to(device), stable=True))  # type: ignore[assignment]
        return self._sorted  # type: ignore[return-value]

    def blocks(self, width: int) -> Iterator[Tensor]:
        """Tensors (m, D) as the source has them."""
        if not hasattr(self.source, "shape"):
            yield from self.source() if callable(self.source) else self.source
            return
        size = self.block or max(1, BLOCK_BYTES // (width * 4))
        for first in range(0, len(self), size):
            yield _rows(self.source, first, min(first + size, len(self)))

    def count(self, width: int) -> int:
        """How many blocks a pass has; 0: unknown."""
        if hasattr(self.source, "shape"):
            size = self.block or max(1, BLOCK_BYTES // (width * 4))
            return -(-len(self) // size)
        return len(self.source) if hasattr(self.source, "__len__") else 0


def _check_dtype(source: Any) -> None:
    """Of an array: floating-point numbers that torch has, in either byte order."""
    if isinstance(source, Tensor):
        if source.layout != torch.strided or source.is_nested or source.device.type == "meta":
            raise TypeError(f"source must be a dense tensor that has values, got {checks.what(source)}")
        right = source.dtype in checks.FLOATS
    else:
        dtype = getattr(source, "dtype", None)
        right = getattr(dtype, "kind", "f") == "f" and getattr(dtype, "itemsize", 8) <= 8
    if not right:
        raise TypeError(f"source must have a floating dtype of at most 64 bits, got {source.dtype}")


def _rows(source: Any, first: int, last: int) -> Tensor:
    """Rows [first, last), copied. What was read of a file's mapping does not stay."""
    if isinstance(source, Tensor):
        return source[first:last]
    with extra("stream", "a reference source that is no tensor"):
        import numpy as np

    part = source[first:last]
    mapping = getattr(source, "_mmap", None) if isinstance(source, np.memmap) else None
    low, high = _extent(part, mapping) if mapping is not None and part.size else (0, 0)
    if mapping is not None and low >= 0:
        start = source.offset - source.offset % mmap.ALLOCATIONGRANULARITY
        if mapping.size() < start + high:  # reading on would kill the process
            raise ValueError(
                f"source must not shrink: its file was cut to {mapping.size():,} bytes after it was mapped"
            )
    if np.ma.is_masked(part):
        raise ValueError("source must have no masked entries")
    part = np.array(part)
    if part.ndim != 2 or part.dtype.kind not in "biufc":
        raise TypeError(
            f"source must be an array whose slices are arrays (m, D) of numbers, got {type(source).__name__}"
        )
    if part.dtype.byteorder not in "=|":
        part = part.astype(part.dtype.newbyteorder("="))
    # A private mapping ("c") would lose what was written to it.
    if mapping is not None and high > low >= 0 and source.mode != "c" and hasattr(mmap, "MADV_DONTNEED"):
        low -= low % mmap.PAGESIZE
        mapping.madvise(mmap.MADV_DONTNEED, low, high - low)
    return torch.from_numpy(part)


def _extent(part: Any, mapping: mmap.mmap) -> tuple[int, int]:
    """The bytes of a mapping between which an array (m, D) of it stands; (-1, -1): it stands elsewhere."""
    import numpy as np

    base = np.frombuffer(mapping, np.uint8).__array_interface__["data"][0]
    at = part.__array_interface__["data"][0] - base
    reach = [(n - 1) * stride for n, stride in zip(part.shape, part.strides, strict=True)]
    low, high = at + sum(min(0, r) for r in reach), at + sum(max(0, r) for r in reach) + part.itemsize
    return (low, high) if 0 <= low and high <= len(mapping) else (-1, -1)


@torch.no_grad()
def _digest(block: Tensor) -> Tensor:
    """() int64 of a block's bits, which another number, or another order of rows, changes."""
    block = block.detach().contiguous()
    size = block.element_size()
    eights = block.shape[1] * size % 8 == 0 and block.storage_offset() * size % 8 == 0  # fewer, and no casts
    bits = block.view(torch.int64 if eights else {2: torch.int16, 4: torch.int32}[size])
    sums = bits.sum(1, dtype=torch.int64)
    return (sums * torch.arange(1, 2 * len(sums), 2, device=sums.device)).sum()


class _Stream(LabelledSource):
    """The source over a stream's blocks, each sorted and normalised as it comes."""

    def __init__(
        self, stream: StreamedReferences, labels: Tensor, normalize: bool, impl: str,
        prepare: Callable[[Tensor], Tensor] | None,
    ) -> None:  # fmt: skip
        self.labels, self.order = torch.sort(labels, stable=True)
        self.stream, self.normalize, self.impl, self.prepare = stream, normalize, impl, prepare
        self.digests: dict[tuple[int, int], Tensor] = {}  # of rows [first, last), as this call has read them before

    def labels_and_order(self) -> tuple[Tensor, Tensor]:
        return self.stream.sorted_labels(self.labels.device)

    def counts(self) -> tuple[Tensor, int]:
        """Of some labels at a time: sorted at once, they would take more memory than the references' blocks."""
        same = torch.zeros_like(self.labels)
        for part in self.stream.labels.split(LABELS):
            ordered = part.to(self.labels.device).sort().values
            same += torch.searchsorted(ordered, self.labels, right=True) - torch.searchsorted(ordered, self.labels)
        return same, len(self.stream)

    def one_way(self) -> _Stream:
        return self

    def send(self, chunk: Chunk, numbers: Tensor | None, rows: Tensor | None) -> list[Received]:
        raise AssertionError("references that are read have no gradient")

    def flush(self) -> list[Received]:
        return []

    def _check_same(self, block: Tensor, first: int, last: int) -> None:
        """ValueError: this call has read other rows there; on a GPU the device raises."""
        if first == last:
            return
        now = _digest(block)
        same = now == self.digests.setdefault((first, last), now)
        words = f"source must give the same rows each time, and rows {first} to {last - 1} have changed since this call"
        if now.device.type == "cpu" and not same:
            raise ValueError(f"{words} read them first")
        if now.device.type != "cpu":
            torch._assert_async(same, words)

    def chunks(self, x: Tensor, y: Tensor | None, anchor_values: Tensor | None) -> Iterator[Chunk]:
        stream, first = self.stream, 0
        with _progress(stream.progress, stream.count(x.shape[1])) as step, torch.no_grad():
            for block in _ahead(stream.blocks(x.shape[1])):
                if not isinstance(block, Tensor) or block.dtype not in checks.FLOATS or block.dim() == 0:
                    got = f"{checks.what(block)}{checks.to_tensor(block)}"
                    raise TypeError(f"source must give floating-point tensors (m, D), got {got}")
                last = first + block.shape[0]
                if block.dim() != 2 or block.shape[1] != x.shape[1] or last > len(stream):
                    raise ValueError(
                        f"source must give ({len(stream)}, {x.shape[1]}) rows in all, "
                        f"got {checks.what(block)} after {first}"
                    )
                new = (first, last) not in self.digests
                self._check_same(block, first, last)
                labels, order = torch.sort(stream.labels[first:last].to(x.device), stable=True)
                block = block.to(x.device, x.dtype, non_blocking=True)
                block = block if self.prepare is None else self.prepare(block)
                rows = sorted_rows(block, order, normalize=self.normalize, impl=self.impl)
                if new:  # later it is the same
                    self.nonfinite = self.nonfinite + nan_unless_finite(block, None)
                yield Chunk(rows, labels, order + first)
                first = last
                step()
        if first != len(stream):
            raise ValueError(f"source must give as many rows as there are labels, {len(stream)}, got {first}")


def _ahead(blocks: Iterator[Tensor]) -> Iterator[Tensor]:
    """The same, each read while the one before it is computed."""
    with ThreadPoolExecutor(1) as reader:
        coming = reader.submit(next, blocks, None)
        while (block := coming.result()) is not None:
            coming = reader.submit(next, blocks, None)
            yield block


class _progress:
    """Counts blocks, for a bar or for the caller's function."""

    def __init__(self, kind: bool | Callable[[int, int], object], total: int) -> None:
        self.total, self.done, self.call, self.bar = total, 0, None, None
        if callable(kind):
            self.call = kind
        elif kind:
            with extra("stream", "progress=True, which may be a function of your own,"):
                from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn
            self.bar = Progress(*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn())
            self.task = self.bar.add_task("references", total=total or None)

    def __enter__(self) -> Callable[[], None]:
        if self.bar is not None:
            self.bar.start()
        return self.step

    def step(self) -> None:
        self.done += 1
        if self.call is not None:
            self.call(self.done, self.total)
        if self.bar is not None:
            self.bar.advance(self.task)

    def __exit__(self, *error: object) -> None:
        if self.bar is not None:
            self.bar.stop()
