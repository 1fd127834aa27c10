"""Cross-batch memory (Wang et al., CVPR 2020): a batch against itself and against the batches before it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..chunked.pairs import chunked_backend
from ..core import checks
from ..core.problem import accumulator
from ..core.similarity import no_autocast
from ..engine.sorted_rows import sorted_rows
from ..losses.base import Criterion
from ..losses.output_checks import AT_ONCE, refuse_own
from .pairs import MemoryPairs, MemorySource
from .queue import Queue


class CrossBatchMemory(nn.Module):
    """Cross-batch memory (Wang et al., 2020, "Cross-Batch Memory for Embedding Learning"): `criterion` of a batch
    against a queue of the newest `memory_size` embeddings, itself among them: ``loss = memory(embeddings, labels)``.

    The batch takes the place of the oldest entries before its loss is computed. Its pairs with itself are those of
    the criterion without a memory: no embedding is its own pair, and the gradient reaches both ends. Earlier entries
    are constants, so that each has pairs with the anchors of the batch alone. Duplicates of the batch that an earlier
    one left are real pairs. N-pair losses with one pair a class take the batch's own positive where there is one, else
    the oldest of the memory.

    A step takes time with N times `memory_size` pairs, and beside the memory what N rows and a segment of it take. Of
    losses that are screened (mined ones, hinges, extremes, on the CPU) it keeps an int8 form of the memory, a quarter
    of its size, and until backward the live pairs, up to 64 bytes an entry.

    The memory holds embeddings as the criterion compares them (normalised, if it normalises) and is part of
    `state_dict`, in tensors of memory_size rows from the start (as torch.distributed.checkpoint loads them); training
    goes on from it with the same bits. In a compiled model it runs outside of the graph.

    A call that raises leaves the memory as it was. Rows that are not finite make their own batch's loss NaN, and do not
    enter. Recomputed by torch.utils.checkpoint before its next call, it sees what it saw first; later it refuses.

    In evaluation (``memory.eval()``) nothing enters or leaves the memory; `enqueue` says otherwise for one call.
    Whether gradients are enabled does not matter: under ``torch.no_grad()`` a training call fills the memory, too.

    Args:
        criterion: any of this package's that takes references, or of your own; its parameters are this module's.
        embedding_size: D; `memory_size`: entries of the queue, at least the largest batch.
        dtype: of the memory; calls compute in float32, or in float64 for float64 embeddings.

    Raises:
        TypeError: a criterion of your own that says more than `row_losses`, `preparation` and `penalty_of`, such as a
            `forward` or `pairs_of`, which is of references in one chunk.
        TypeError, ValueError: a criterion that takes no references or has a penalty on them, sizes under 1, embeddings
            of another width, a batch larger than the memory.
        RuntimeError: an `impl` of the criterion that takes no references in chunks (`tiled` and `fused` do), or none
            here that does.
    """

    def __init__(
        self, criterion: Criterion, embedding_size: int, memory_size: int, *, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        if not isinstance(criterion, Criterion):
            raise TypeError(f"criterion must be a flashpair.Criterion, got {type(criterion).__name__}")
        if not criterion.takes_references:
            raise ValueError(
                f"criterion must take references, and {type(criterion).__name__} is defined within a batch"
            )
        refuse_own(criterion, ("forward", *AT_ONCE), "CrossBatchMemory")
        if criterion.penalizes_references:
            raise ValueError(f"criterion must have no penalty on references, as this {type(criterion).__name__} has")
        if dtype not in checks.FLOATS:
            raise TypeError(f"dtype must be float16, bfloat16, float32 or float64, got {dtype!r}")
        self.criterion = criterion
        self.embedding_size = checks.integer(embedding_size, "embedding_size", at_least=1)
        self.memory_size = checks.integer(memory_size, "memory_size", at_least=1)
        self.reset(dtype)

    def reset(self, dtype: torch.dtype | None = None) -> None:
        """Forgets all entries."""
        self._before: Queue | None = None  # what the last batch met
        before = getattr(self, "queue", None)
        self.queue = Queue(self.memory_size, self.embedding_size, dtype or self.dtype)
        if before is not None:
            self.queue.apply(lambda t: t.to(before.empty.labels.device))

    @property
    def dtype(self) -> torch.dtype:
        """Of the memory."""
        return self.queue.empty.rows.dtype

    def __len__(self) -> int:
        """How many entries the memory holds."""
        return self.queue.length

    def forward(self, embeddings: Tensor, labels: Tensor, *, enqueue: bool | None = None) -> Tensor:
        """The loss of embeddings (N, D) with integer labels (N,), as `Criterion.forward` returns it.

        enqueue: whether the batch enters the memory; None: in training. Where it does not, it takes nobody's place:
            its pairs are with itself and with all of the memory.
        """
        if torch.compiler.is_compiling():  # how full the queue is changes from call to call, and is no constant
            loss: Tensor = torch.compiler.disable(self._loss)(embeddings, labels, enqueue)
            return loss
        return self._loss(embeddings, labels, enqueue)

    def _loss(self, embeddings: Tensor, labels: Tensor, enqueue: bool | None) -> Tensor:
        x, labels, _, _ = self.criterion.check(embeddings, labels, None, None)
        checks.width(x, self.embedding_size)
        enqueue = self.training if enqueue is None else checks.flag(enqueue, "enqueue")
        if enqueue and x.shape[0] > self.memory_size:
            raise ValueError(f"embeddings must be at most memory_size = {self.memory_size} rows, got {checks.what(x)}")
        criterion, queue = self.criterion, self.queue
        impl = chunked_backend(criterion.impl, x)
        unit, prepare = criterion.preparation
        if queue.empty.labels.device != x.device:
            queue.apply(lambda t: t.to(x.device))
        with no_autocast(x.device.type):
            labels_in_order, order = torch.sort(labels, stable=True)
            wide = x.to(accumulator(x.dtype))
            rows = sorted_rows(wide if prepare is None else prepare(wide), order, unit=unit, impl=impl)
            again = enqueue and torch._C._current_graph_task_id() != -1  # within backward: a recomputation
            if again:
                queue = self._seen_by(rows, labels_in_order)
            elif enqueue:
                queue = queue.fork()  # if anything below raises, nothing has changed
                queue.make_place(x.shape[0])
            ref_source = MemorySource(labels_in_order, order, queue.held())
            pairs = MemoryPairs(rows, ref_source, criterion.distance, impl, criterion.impl != "auto")
            loss = criterion.of_pieces(x, labels, pairs)
            if enqueue and not again:
                before = queue.fork()
                if x.shape[0]:
                    queue.enter(rows.detach(), labels_in_order, order)
                self.queue, self._before = queue, before
        return loss

    def _seen_by(self, rows: Tensor, labels: Tensor) -> Queue:
        """What the last call saw, which torch.utils.checkpoint computes again."""
        late, before = self.queue.late, self._before
        if before is None or not (
            torch.equal(late.labels, labels) and torch.equal(late.rows, rows.detach().to(late.rows.dtype))
        ):
            raise RuntimeError(
                "CrossBatchMemory can be recomputed (torch.utils.checkpoint) until its next call, with the same "
                "embeddings, all of them finite: call it outside of what is checkpointed"
            )
        return before

    def _apply(self, fn: Callable[..., Tensor], recurse: bool = True) -> CrossBatchMemory:
        super()._apply(fn, recurse)
        self.queue.apply(fn)
        self._before = None
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_before": None}

    @property
    def memory(self) -> Tensor:
        """(memory_size, D): the entries, the oldest first, then zeros."""
        return self._padded(self.queue.in_order()[0])

    @property
    def labels(self) -> Tensor:
        """(memory_size,) int64: theirs, then zeros."""
        return self._padded(self.queue.in_order()[1])

    def _padded(self, t: Tensor) -> Tensor:
        """Of one shape always, as distributed checkpoints need it."""
        return torch.cat([t, t.new_zeros(self.memory_size - t.shape[0], *t.shape[1:])])

    def get_extra_state(self) -> dict[str, int]:
        return {"count": self.queue.count, "late": len(self.queue.late), "held": len(self)}

    def set_extra_state(self, state: dict[str, int]) -> None:
        self._counts = state

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "memory"], destination[prefix + "labels"] = map(self._padded, self.queue.in_order())

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], strict: bool,
        missing_keys: list[str], unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        kept = [state_dict.pop(prefix + name, None) for name in ("memory", "labels")]
        missing = [prefix + name for name, t in zip(("memory", "labels"), kept, strict=True) if t is None]
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        missing_keys += missing
        if missing or prefix + "_extra_state" not in state_dict:
            return
        rows, labels = kept
        count, late, held = (self._counts.get(name, rows.shape[0]) for name in ("count", "late", "held"))
        if not 0 <= late <= held <= min(count, rows.shape[0]):
            error_msgs.append(f"{prefix}_extra_state must be of {rows.shape[0]} rows or fewer, got {self._counts!r}")
            return
        rows, labels = rows[:held], labels[:held]  # of older states all
        fits = rows.dim() == 2 and rows.shape[1] == self.embedding_size and rows.shape[0] <= self.memory_size
        if not fits or labels.shape != rows.shape[:1]:
            error_msgs.append(
                f"{prefix}memory must have at most memory_size = {self.memory_size} rows of embedding_size = "
                f"{self.embedding_size}, got {checks.what(rows)} with labels {checks.what(labels)}"
            )
            return
        like = self.queue.empty
        self.queue.restore(rows.to(like.rows), labels.to(like.labels), count, late)
        self._before = None

    def extra_repr(self) -> str:
        held = f"{len(self)} held" if len(self) < self.memory_size else "full"
        return f"embedding_size={self.embedding_size}, memory_size={self.memory_size} ({held}), dtype={self.dtype}"
