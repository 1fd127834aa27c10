"""Cross-batch memory (Wang et al., CVPR 2020): a batch against itself and against the batches before it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..core import checks
from ..core.similarity import no_autocast
from ..engine.dispatch import route_chunks
from ..engine.sorted_rows import sorted_rows
from ..losses.base import Criterion
from ..losses.output_checks import AT_ONCE, refuse_own
from .pairs import MemoryPairs, MemorySource
from .queue import Queue


class CrossBatchMemory(nn.Module):
    """Cross-batch memory: the loss of a batch against a queue of the newest embeddings (Wang et al., 2020).

    Use it in place of the criterion: ``loss = memory(embeddings, labels)``. The batch first takes the place of the
    oldest of `memory_size` entries, then its loss is computed against the whole queue, itself included.

    - *Pairs within the batch* are those of the criterion without a memory: no embedding is its own pair, and the
      gradient reaches both ends.
    - *Earlier entries* are constants; each has pairs with the batch's anchors only. A copy of a batch's row that an
      earlier batch left is a real pair.
    - *N-pair losses* with one pair of each class take the batch's own positive if there is one, else the oldest in
      memory.

    Time for a step grows with N times `memory_size` pairs. Memory beside the queue is that of N rows and a run of
    the queue. Losses that are screened on the CPU (mined ones, hinges, extremes) also keep an int8 copy of the queue, a
    quarter of its size, and until backward the live pairs, up to 64 bytes an entry.

    The queue holds embeddings as the criterion compares them (normalised if it normalises). It is part of `state_dict`,
    in tensors of memory_size rows from the start (as torch.distributed.checkpoint loads them), and training continues
    from it bit for bit. In a compiled model it runs outside of the graph.

    A call that raises leaves the queue as it was. Rows that are not finite make their own batch's loss NaN and do not
    enter. When torch.utils.checkpoint recomputes a call before the next one, it sees the queue of the first time; later
    it raises.

    After ``memory.eval()`` nothing enters or leaves the queue; `enqueue` overrides this for one call. Whether gradients
    are enabled does not matter: a training call under ``torch.no_grad()`` fills the queue, too.

    Args:
        criterion: a loss of this package that takes references, or your own; its parameters become this module's.
        embedding_size: D, at least 1.
        memory_size: entries of the queue, at least the size of the largest batch.
        dtype: of the queue: float16, bfloat16, float32 (the default) or float64. Calls compute in float32, or in
            float64 for float64 embeddings.

    Shape:
        - embeddings: (N, D), float16 to float64, N at most memory_size. labels: (N,), integers.
        - output: (), or (N,) if the criterion has ``reduction="none"``.

    Raises:
        TypeError: `criterion` is not a Criterion, or overrides more than `row_losses`, `preparation` and `penalty_of`
            (such as `forward` or `pairs_of`, which need all references in one tensor); another `dtype`.
        ValueError: a criterion that takes no references or has a penalty on them; a size below 1; in a call, embeddings
            of another width, or a batch larger than the memory.
        RuntimeError: in a call, an `impl` of the criterion that does not take references in chunks (`tiled` and `fused`
            do), or if none here does.

    Examples:
        >>> x = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0], [-0.8, 0.6]])
        >>> labels = torch.tensor([0, 0, 1, 1])
        >>> memory = flashpair.CrossBatchMemory(flashpair.ContrastiveLoss(), embedding_size=2, memory_size=100)
        >>> first, second = memory(x, labels), memory(x, labels)  # the second also meets the first batch's entries
        >>> len(memory)
        8
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
            raise ValueError(
                f"criterion must have no penalty on references, and this {type(criterion).__name__} has one"
            )
        if dtype not in checks.FLOATS:
            raise TypeError(f"dtype must be float16, bfloat16, float32 or float64, got {dtype!r}")
        self.criterion = criterion
        self.embedding_size = checks.integer(embedding_size, "embedding_size", at_least=1)
        self.memory_size = checks.integer(memory_size, "memory_size", at_least=1)
        self.reset(dtype)

    def reset(self, dtype: torch.dtype | None = None) -> None:
        """Forgets all entries.

        Args:
            dtype: of the queue from now on; None: as before.
        """
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
        """The loss of a batch against the queue.

        Args:
            embeddings: (N, D), float16 to float64.
            labels: (N,), integers.
            enqueue: whether the batch enters the queue; None: in training mode. If not, it displaces nothing: its pairs
                are with itself and with the whole queue.

        Returns:
            What `Criterion.forward` returns.
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
        route = route_chunks(criterion.impl, x)
        normalize, prepare = criterion.preparation
        if queue.empty.labels.device != x.device:
            queue.apply(lambda t: t.to(x.device))
        with no_autocast(x.device.type):
            labels_in_order, order = torch.sort(labels, stable=True)
            wide = x.to(route.dtype)
            rows = sorted_rows(
                wide if prepare is None else prepare(wide), order, normalize=normalize, impl=route.backend
            )
            again = enqueue and torch._C._current_graph_task_id() != -1  # within backward: a recomputation
            if again:
                queue = self._seen_by(rows, labels_in_order)
            elif enqueue:
                queue = queue.fork()  # if anything below raises, nothing has changed
                queue.evict(x.shape[0])
            ref_source = MemorySource(labels_in_order, order, queue.held())
            pairs = MemoryPairs(rows, ref_source, criterion.distance, route)
            loss = criterion.of_chunks(x, labels, pairs)
            if enqueue and not again:
                before = queue.fork()
                if x.shape[0]:
                    queue.append(rows.detach(), labels_in_order, order)
                self.queue, self._before = queue, before
        return loss

    def _seen_by(self, rows: Tensor, labels: Tensor) -> Queue:
        """What the last call saw, which torch.utils.checkpoint computes again."""
        pending, before = self.queue.pending, self._before
        if before is None or not (
            torch.equal(pending.labels, labels) and torch.equal(pending.rows, rows.detach().to(pending.rows.dtype))
        ):
            raise RuntimeError(
                "torch.utils.checkpoint can recompute a call of CrossBatchMemory only until the next call and with the "
                "same finite embeddings: call it outside of the checkpointed part"
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
        return {"count": self.queue.count, "late": len(self.queue.pending), "held": len(self)}

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
        count, pending, held = (self._counts.get(name, rows.shape[0]) for name in ("count", "late", "held"))
        if not 0 <= pending <= held <= min(count, rows.shape[0]):
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
        self.queue.restore(rows.to(like.rows), labels.to(like.labels), count, pending)
        self._before = None

    def extra_repr(self) -> str:
        held = f"{len(self)} held" if len(self) < self.memory_size else "full"
        return f"embedding_size={self.embedding_size}, memory_size={self.memory_size} ({held}), dtype={self.dtype}"
