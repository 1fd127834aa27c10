"""A criterion over the batch of all processes. Each process computes the rows of its own anchors."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..core import checks
from ..core.pairs import PairReducer
from ..core.similarity import no_autocast
from ..engine.dispatch import route_chunks, route_pairs
from ..losses.averages import average, with_extra
from ..losses.base import Criterion, Penalty, RowLosses
from ..losses.class_loss import ClassCriterion
from . import pairs as shared
from .agreement import REFUSED, Described, validate_call
from .claims import check_claims, overrides, rows_of
from .collectives import AllReduceGrad, AllReduceSum, Ranks, ScaleGrad
from .eager_gradient import EagerGradient, kept
from .local_pairs import SampleRows
from .schedules import SOURCES

GRADIENTS = ("mean", "sum")
LABELS = ("global", "local")


def gather(
    criterion: Criterion,
    *,
    schedule: str = "all_gather",
    gradients: str = "mean",
    labels: str = "global",
    group: dist.ProcessGroup | None = None,
) -> GlobalCriterion:
    """Makes a criterion compute its loss over the global batch: the rows of all processes of a group, ordered by rank.

    Each process calls the result with its own embeddings (n, D) and labels (n,); n can differ between processes and can
    be 0. All get the same number, the loss of the whole batch. With `ref_emb` (m, D) and `ref_labels` (m,) the anchors
    are the process's own and the references those of all processes. A process computes only its own anchors' rows;
    every two processes share the similarities between them. See `GlobalCriterion` for the gradients. Without
    torch.distributed, or alone in the group, the result is `criterion` itself.

    A criterion of your own takes part through its `row_losses`, which sees this process's rows. What it needs from all
    rows it must ask by `pairs.batch_sum` and `pairs.batch_logsumexp`; a plain torch mean over rows is one process's
    mean, which cannot be detected here.

    Args:
        criterion: a loss of this package, or your own. Every process holds the class weights whole (`shard_classes`
            splits them).
        schedule: ``"all_gather"`` (the default): one all-gather of the rows and one reduce-scatter of their gradient;
            each process holds all rows for a moment. ``"ring"``: one other process's rows at a time, sent while it
            computes.
        gradients: how the trainer combines the processes' gradients of the network: ``"mean"`` (the default), as
            DistributedDataParallel and FSDP do, or ``"sum"``.
        labels: ``"global"`` (the default): equal labels are one class, whichever processes they are on, so
            ``torch.arange(n)`` on every process makes positives of strangers. ``"local"``: labels only compare within
            one process (pairs, instances, positions); this holds for `labels` and `ref_labels`.
        group: the processes; None: all.

    Returns:
        A `GlobalCriterion`.

    Raises:
        TypeError: `criterion` is not a Criterion, or your own overrides `forward`, `regularizer`, `pairs_of` or `rows`.
        ValueError: an unknown word, or ``labels="local"`` for a loss against class weights.

    Examples:
        >>> criterion = flashpair.distributed.gather(flashpair.NTXentLoss(temperature=0.5), labels="local")
        >>> images, texts = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[0.8, 0.6], [0.6, 0.8]])
        >>> loss = criterion(images, torch.arange(2), ref_emb=texts, ref_labels=torch.arange(2))
        >>> round(loss.item(), 4)
        0.513
    """
    if not isinstance(criterion, Criterion):
        raise TypeError(f"criterion must be a flashpair.Criterion, got {type(criterion).__name__}")
    check_claims(criterion)
    return GlobalCriterion(criterion, schedule, gradients, group, labels)


class GlobalCriterion(nn.Module):
    """A criterion over the batch of all processes; `gather` returns it.

    Gradients are exactly those of one process with the whole batch. With L its loss and W processes:

    - of embeddings (and `ref_emb`) it gives W dL/dx for ``gradients="mean"`` and dL/dx for ``"sum"``. A process's
      gradient of the network is this times dx/dtheta over its own samples; the mean (sum) over processes is dL/dtheta;
    - of the criterion's own parameters (class weights, temperatures) it gives dL/dp whole, the same on every process.
      Leave them out of DistributedDataParallel (inside it they are right, too, for one more all-reduce).

    All communication happens inside the call; backward only multiplies. So every process must call it equally often. If
    one fails or does not call it, the others fail with torch.distributed's error within the group's timeout.

    Every call compares the criterion between processes: its class, its public attributes except `impl`, and the bits of
    its tensors. Attributes whose names start with an underscore may differ. Within torch.utils.checkpoint the loss
    keeps what it needs, so nothing is sent twice; a recomputation in backward (``use_reentrant=True``) must happen on
    every process.

    With ``reduction="none"`` a process gets its own rows' losses (n,), and backward communicates: all must run it. The
    loss is differentiable once. The call waits for the device once, for the number of rows of each process.

    Args:
        criterion: see `gather`.
        schedule: see `gather`.
        gradients: see `gather`.
        group: see `gather`.
        labels: see `gather`.

    Raises:
        TypeError: in a call, on every process, if one refuses its arguments' types.
        ValueError: in a call, on every process, if one refuses its arguments; if embeddings differ in width or dtype,
            or in whether references are given; or if criteria differ in class, hyper-parameters or values.
        RuntimeError: in a call, an `impl` that does not take references in chunks (`tiled` and `fused` do).
    """

    def __init__(
        self, criterion: Criterion, schedule: str, gradients: str, group: dist.ProcessGroup | None,
        labels: str = "global",
    ) -> None:  # fmt: skip
        super().__init__()
        self.labels = checks.word(labels, LABELS, "labels")
        if labels == "local" and isinstance(criterion, ClassCriterion):
            raise ValueError(
                f"labels must be 'global' for {type(criterion).__name__}, where they are class indices, got 'local'"
            )
        self.criterion = criterion
        self.schedule = checks.word(schedule, tuple(SOURCES), "schedule")
        self.gradients = checks.word(gradients, GRADIENTS, "gradients")
        self.group = group

    def extra_repr(self) -> str:
        return f"schedule={self.schedule!r}, gradients={self.gradients!r}, labels={self.labels!r}"

    def forward(
        self, embeddings: Tensor, labels: Tensor, *, ref_emb: Tensor | None = None, ref_labels: Tensor | None = None
    ) -> Tensor:
        """The loss of the global batch; see `gather`.

        Args:
            embeddings: (n, D), this process's rows.
            labels: (n,), integers.
            ref_emb: (m, D), this process's references, or None on every process.
            ref_labels: (m,), integers.

        Returns:
            The loss (), the same on every process, or (n,) with ``reduction="none"``.
        """
        if not dist.is_available() or not dist.is_initialized() or dist.get_world_size(self.group) == 1:
            loss: Tensor = self.criterion(embeddings, labels, ref_emb=ref_emb, ref_labels=ref_labels)
            return loss
        ranks = Ranks(self.group)
        try:
            x, labels, y, ref_labels = self._checked(embeddings, labels, ref_emb, ref_labels)
        except Exception:  # tell the others, which would wait for this process until their timeout
            ranks.all_gather_ints(REFUSED, embeddings.device if isinstance(embeddings, Tensor) else ranks.device)
            raise
        with no_autocast(x.device.type):
            return self._loss(ranks, x, labels, y, ref_labels)

    def _checked(
        self, embeddings: Any, labels: Any, ref_emb: Any, ref_labels: Any
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Checks the arguments of a call on this process, before it communicates."""
        batch = self.criterion.check(embeddings, labels, ref_emb, ref_labels)
        if self.labels == "local":
            batch = self.criterion.check(batch[0], self._apart(batch[1]), batch[2], self._apart(batch[3]))
        if isinstance(self.criterion, ClassCriterion) and self.criterion.anchors == "samples":
            route_pairs(self.criterion.impl, batch[0], None)
        else:
            route_chunks(self.criterion.impl, batch[0])
        return batch

    def _apart(self, labels: Tensor | None) -> Tensor | None:
        """Local labels (n,) as global labels, which differ from those of every other process."""
        if labels is None:
            return None
        ranks = Ranks(self.group)
        least, most = (int(t) for t in labels.aminmax()) if labels.numel() else (0, 0)
        if max(-least, most) >= 2**62 // ranks.world:
            raise ValueError(f"local labels must be below 2^62 / {ranks.world} (the number of processes) in size")
        return labels.long() * ranks.world + ranks.rank

    def _loss(self, ranks: Ranks, x: Tensor, labels: Tensor, y: Tensor | None, ref_labels: Tensor | None) -> Tensor:
        learned = learned_of(self.criterion)
        wants = torch.is_grad_enabled()
        needs = [wants and t is not None and t.requires_grad for t in (x, y)]
        sizes, ref_sizes, needs = validate_call(ranks, x, y, needs, wants and bool(learned), self._described())
        by = float(ranks.world) if self.gradients == "mean" else 1.0

        def rows(x: Tensor, y: Tensor | None, *values: Tensor) -> tuple[RowLosses, PairReducer | None, Tensor | None]:
            x = ScaleGrad.apply(x, by) if x.requires_grad else x
            y = ScaleGrad.apply(y, by) if y is not None and y.requires_grad else y
            parameters = {
                place: AllReduceGrad.apply(ranks, v) if v.requires_grad and self._shared(place) else v
                for place, v in zip(learned, values, strict=True)
            }
            with substituted(parameters):
                own_rows, pairs = self._rows(ranks, x, labels, y, ref_labels, sizes, ref_sizes)
                chosen = pairs.chosen_here() if isinstance(pairs, shared.SharedPairs) else None
                penalty = self.criterion.penalty_of(x, labels, y, ref_labels, chosen)
            if penalty is None:
                return own_rows, pairs, None
            return own_rows, pairs, AllReduceSum.apply(ranks, penalty.total) / self._number(ranks, penalty).clamp_min(1)

        def share(x: Tensor, y: Tensor | None, *values: Tensor) -> Tensor:
            own_rows, _, extra = rows(x, y, *values)
            loss = share_of(own_rows, self.criterion.reduction, extra, ranks)
            return loss + self.criterion.not_finite(x, y).to(loss.dtype)

        values = [place.get() for place in learned]
        if self.criterion.reduction == "none":
            x = x.detach().requires_grad_() if needs[0] and not x.requires_grad else x
            y = y.detach().requires_grad_() if y is not None and needs[1] and not y.requires_grad else y
            with kept():
                own_rows, pairs, extra = rows(x, y, *values)
                losses = with_extra(own_rows, "none", extra)[0].losses
                losses = losses + ranks.sum(self.criterion.not_finite(x, y).to(losses.dtype))
                return losses if pairs is None else pairs.restore(losses)
        loss: Tensor = EagerGradient.apply(ranks, share, needs, x, y, *values)
        return loss

    def _rows(
        self, ranks: Ranks, x: Tensor, labels: Tensor, y: Tensor | None, ref_labels: Tensor | None, sizes: list[int],
        ref_sizes: list[int],
    ) -> tuple[RowLosses, PairReducer | None]:  # fmt: skip
        criterion, how = self.criterion, (ranks, self.schedule, self.criterion.impl)
        if isinstance(criterion, ClassCriterion) and criterion.anchors == "samples":
            if overrides(criterion, "rows"):
                return criterion.rows(x, labels, y, ref_labels, criterion.impl)
            samples = SampleRows(criterion.pairs_of(x, labels, y, ref_labels, criterion.impl), ranks)
            return rows_of(criterion, samples, ranks), samples
        pairs: shared.SharedPairs
        if criterion.anchors == "proxies":
            pairs = self._proxies(how, x, labels, sizes)
        else:
            x, y, normalize = criterion.prepared(x, y)
            if y is None or ref_labels is None:
                pairs = shared.of_batch(*how, criterion.distance, normalize, x, labels, sizes)
            else:
                pairs = shared.of_references(
                    *how, criterion.distance, normalize, x, labels, y, ref_labels, sizes, ref_sizes
                )
        return rows_of(criterion, pairs, ranks), pairs

    def _proxies(self, how: tuple[Ranks, str, str], x: Tensor, labels: Tensor, sizes: list[int]) -> shared.SharedPairs:
        """This process's share of the proxies, as anchors against the embeddings of all processes."""
        ranks, weight = how[0], self.criterion.weight
        assert isinstance(weight, Tensor)
        first, last = slice_of(weight.shape[0], ranks.world, ranks.rank)
        return shared.of_proxies(self.criterion, weight[first:last], how, x, labels, sizes)

    def _described(self) -> Described:
        """A description of the criterion, which must be the same on every process."""
        words = (
            f"call: {type(self).__name__}",
            f"schedule: {self.schedule}",
            f"gradients: {self.gradients}",
            f"labels: {self.labels}",
        )
        return Described(self.criterion, words)

    def _shared(self, place: ParameterSlot) -> bool:
        """Whether a learned tensor is the same on every process."""
        return True

    def _number(self, ranks: Ranks, penalty: Penalty) -> Tensor:
        """The number () of things that the penalty of all processes is a mean over."""
        return ranks.sum(penalty.number.detach())


def slice_of(count: int, world: int, rank: int) -> tuple[int, int]:
    """The part [first, last) of `count` things that belongs to the process `rank` of `world`."""
    return count * rank // world, count * (rank + 1) // world


def share_of(rows: RowLosses, reduction: str, extra: Tensor | None, ranks: Ranks) -> Tensor:
    """This process's share of the loss (). The shares of all processes add up to the loss.

    Args:
        rows: the losses of this process's rows.
        reduction: the criterion's reduction.
        extra: () a penalty, the same on every process, or None.
        ranks: the processes.
    """
    rows, extra = with_extra(rows, reduction, extra)
    share = average(rows, reduction, lambda count: ranks.sum(count.detach()))
    return share if extra is None else share + extra.to(share.dtype) / ranks.world


class ParameterSlot:
    """The module and the attribute in which a criterion keeps a learned tensor."""

    def __init__(self, module: nn.Module, name: str) -> None:
        self.module, self.name = module, name

    def get(self) -> Tensor:
        value: Tensor = getattr(self.module, self.name)
        return value


def learned_of(criterion: nn.Module) -> list[ParameterSlot]:
    """The learned tensors of a criterion and its submodules: parameters, and attributes that require a gradient."""
    slots = []
    for module in criterion.modules():
        names = [*module._parameters, *(k for k, v in vars(module).items() if isinstance(v, Tensor))]
        slots += [
            ParameterSlot(module, k)
            for k in names
            if getattr(module, k) is not None and getattr(module, k).requires_grad
        ]
    return slots


@contextlib.contextmanager
def substituted(values: dict[ParameterSlot, Tensor]) -> Iterator[None]:
    """A context in which other tensors stand in these places.

    They become attributes of the instances, which Python finds before it looks for parameters.
    """
    before = {place: place.module.__dict__.get(place.name) for place in values}
    try:
        for place, value in values.items():
            place.module.__dict__[place.name] = value
        yield
    finally:
        for place, attribute in before.items():
            del place.module.__dict__[place.name]
            if attribute is not None:
                place.module.__dict__[place.name] = attribute
