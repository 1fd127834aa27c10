"""Pairs whose references come in chunks (core/chunks.py): from a file, a queue of earlier batches, other processes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..core.call import Call
from ..core.chunks import Chunk, Received, ReferenceSource, only_once, places_of
from ..core.class_pairs import ClassPairs, pick_class_pairs
from ..core.label_order import LabelOrder, one_to_one
from ..core.pairs import PairAccess
from ..core.problem import Operands
from ..core.reduction import Reduction
from ..core.similarity import nan_unless_finite
from ..engine.dispatch import Route, route_call
from ..engine.pairs import FusedPairs, Pairs
from ..engine.positive_pairs import listed_similarities, pair_gradients
from .reduce import ChunkedCall, ChunkedRowReduce


class LabelledSource(ReferenceSource):
    """A source that knows the labels of all references.

    Attributes:
        nonfinite: 0, or NaN after a chunk with a reference that is not finite.
    """

    nonfinite: Tensor | float = 0.0
    two_sided = False  # the references are the anchors, whose values travel with them

    def labels_and_order(self) -> tuple[Tensor, Tensor]:
        """The labels of all references (M,), sorted, and the index of each among all references (M,)."""
        raise NotImplementedError

    def counts(self) -> tuple[Tensor, int]:
        """How many references have each anchor's label (N,), which may count the anchor itself; and M."""
        labels, _ = self.labels_and_order()
        same = torch.searchsorted(labels, self.labels, right=True) - torch.searchsorted(labels, self.labels)
        return same, labels.shape[0]

    def one_way(self) -> ReferenceSource:
        """The same references in chunks that are not `two_sided`: every process sees each of its anchors with each
        reference."""
        raise NotImplementedError


class ChunkedPairs(FusedPairs):
    """N anchors against references that come in chunks.

    Args:
        x: (N, D), the anchors, sorted by label.
        order: (N,) int64, the caller's index of each anchor.
        ref_source: the source of the references.
        square: the anchors are among the references.
        distance: ``"dot"``, ``"euclidean"`` or ``"squared_euclidean"``.
        route: the backend that runs, and its dtype.
        y: (m, D), the sorted references of this process, if the source needs them.
        nonfinite: () 0 or NaN, which is added to row values; None: the backend shows embeddings that are not finite.
    """

    limit = "is not available for references in chunks, which are never all in memory at once"

    def __init__(
        self, x: Tensor, order: Tensor, ref_source: LabelledSource, square: bool, distance: str, route: Route,
        y: Tensor | None = None, nonfinite: Tensor | None = None,
    ) -> None:  # fmt: skip
        labels, none = ref_source.labels, order.new_empty(0)
        label_order = LabelOrder(order, order, labels, labels if square else none, none, none, None, square)
        super().__init__(x, label_order, distance, route, nonfinite)
        self.ref_source, self._refs = ref_source, y
        self._counts: tuple[Tensor, int] | None = None

    def reduce(self, *reductions: Reduction) -> tuple[Tensor, ...]:
        if not self.ref_source.two_sided:
            for k, r in enumerate(reductions):
                if isinstance(r, Reduction) and r.ref_offset is not None:
                    raise RuntimeError(f"ref_offset of reductions[{k}] {self.limit}")
        return super().reduce(*reductions)

    def _route_of(self, call: Call) -> Route:
        """The route of the batch, or an error: no other backend would take references in chunks."""
        return route_call(self.route._replace(named=True), call, self.x, 0)

    def _rows(self, call: Call, operands: Operands) -> tuple[Tensor, ...]:
        chunked = ChunkedCall(self.ref_source, call)
        rows: Tensor = ChunkedRowReduce.apply(chunked, self.x, self._refs, operands.scale, *operands.vectors)
        return rows.unbind(0)

    @property
    def ref_labels(self) -> Tensor:
        """(M,) int64, of all references, also those of other processes, sorted."""
        return self.ref_source.labels_and_order()[0]

    @property
    def nonfinite(self) -> Tensor:  # type: ignore[override]
        return nan_unless_finite(self.x, None) if self._nonfinite is None else self._nonfinite

    def arrange_refs(self, values: Tensor) -> Tensor:
        self._refuse("arrange_refs")

    def counts(self) -> tuple[Tensor, int]:
        """How many references have each anchor's label (N,), and how many references there are."""
        if self._counts is None:
            self._counts = self.ref_source.counts()
        return self._counts

    def num_positives(self) -> Tensor:
        return self.counts()[0] - int(self.square)

    def num_negatives(self) -> Tensor:
        same, every = self.counts()
        return every - same

    def own_places(self) -> Tensor:
        """In a square problem, where each anchor stands among all references in label order, (N,) int64."""
        return places_of(self.ref_source.order, self.ref_source.labels_and_order()[1])

    def positive_places(self, places: range) -> Tensor:
        """The references by their index among all references; beyond the end of a row's list any index, or -1."""
        labels, order = self.ref_source.labels_and_order()
        lo = torch.searchsorted(labels, self.labels)
        rank = lo[:, None] + torch.arange(places.start, places.stop, device=lo.device)
        if self.square:
            rank = rank + (rank >= self.own_places()[:, None])
        count = order.shape[0]
        return order[rank.clamp(max=count - 1)] if count else torch.full_like(rank, -1)

    def similarities_at(self, refs: Tensor) -> Tensor:
        x = self.x.to(self.dtype)
        z: Tensor = Fetched.apply(self.ref_source.one_way(), x, self.shared_refs(), refs, self.distance)
        return z

    def positive_blocks(self, most: int) -> list[range]:
        """All places at once, because each block would go through all chunks again."""
        return [range(most)]

    def shared_refs(self) -> Tensor | None:
        """This process's references (m, D) for `LabelledSource.one_way`; in a square problem these are its anchors."""
        return self.x.to(self.dtype) if self.square else self._refs

    def class_pairs(self) -> ClassPairs:
        """As `Pairs.class_pairs`, but with positives by their index among all references."""
        labels, order = self.ref_source.labels_and_order()
        chosen = pick_class_pairs(self.labels, None if self.square else labels)
        return chosen._replace(positives=order.index_select(0, chosen.positives))

    def take_pairs(self, chosen: ClassPairs) -> PairAccess:
        y = FetchedRows.apply(self.ref_source.one_way(), self.x, self.shared_refs(), chosen.positives)
        x, order = self.x.index_select(0, chosen.anchors), one_to_one(chosen.place, chosen.taken)
        return Pairs(x, y, order, self.distance, self.route, nonfinite=self.nonfinite)


def _visited(
    ref_source: ReferenceSource, x: Tensor, y: Tensor | None, wanted: Tensor
) -> Iterator[tuple[Chunk, Tensor, list[Any]]]:
    """Goes through all chunks, and finds the wanted references in each.

    Args:
        ref_source: the source, one way.
        x: (N, D), the sorted anchors.
        y: (m, D), this process's references, or None.
        wanted: (n, K) int64, references by their index among all references.

    Yields:
        A chunk; its references (M, D) in the dtype of `x`; and K pairs of a bool (n,), true where the reference is in
        the chunk, and its row there (n,) int64. The list is empty for a chunk without references.
    """
    for chunk in ref_source.chunks(x, y, None):
        assert chunk.y is not None
        refs = chunk.y.to(x.dtype)
        places = places_of(wanted.T, chunk.order) if refs.shape[0] else ()
        yield chunk, refs, [(row >= 0, row.clamp_min(0)) for row in places]


def _add_received(dy: Tensor | None, received: Sequence[Received]) -> None:
    """Adds what other processes computed to the gradient dy (m, D) of this process's references."""
    for rows, _, grad in received:
        assert dy is not None and grad is not None
        dy[rows] += grad


class Fetched(torch.autograd.Function):
    """z (N, K) of each row x_i with the references wanted[i], which go by their index among all references.

    Where `wanted` is -1, z is 0.
    """

    @staticmethod
    def forward(
        ctx: Any, ref_source: ReferenceSource, x: Tensor, y: Tensor | None, wanted: Tensor, distance: str
    ) -> Tensor:
        z = x.new_zeros(wanted.shape)
        for _, refs, places in _visited(ref_source, x, y, wanted):
            if not places:
                continue
            here, row = (torch.stack(t, 1) for t in zip(*places, strict=True))
            z += torch.where(here, listed_similarities(x, refs, row, distance), 0.0)
        ctx.ref_source, ctx.distance = ref_source, distance
        ctx.save_for_backward(x, y, wanted)
        return z

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[None, Tensor, Tensor | None, None, None]:
        only_once()
        x, y, wanted = ctx.saved_tensors
        dx, dy = torch.zeros_like(x), None if y is None else torch.zeros_like(y, dtype=x.dtype)
        for chunk, refs, places in _visited(ctx.ref_source, x, y, wanted):
            d_refs = torch.zeros_like(refs) if chunk.needs_grad else None
            for k, (here, row) in enumerate(places):
                dz = torch.where(here, g[:, k], 0.0)
                to_x, to_ref = pair_gradients(x, refs.index_select(0, row), dz, ctx.distance)
                dx += to_x
                if d_refs is not None:
                    d_refs.index_add_(0, row, to_ref)
            if d_refs is not None:
                _add_received(dy, ctx.ref_source.send(chunk, None, d_refs))
        _add_received(dy, ctx.ref_source.flush())
        return None, dx, None if dy is None else dy.to(y.dtype), None, None


class FetchedRows(torch.autograd.Function):
    """References (n, D) by their index among all references. wanted: (n,) int64."""

    @staticmethod
    def forward(ctx: Any, ref_source: ReferenceSource, x: Tensor, y: Tensor | None, wanted: Tensor) -> Tensor:
        fetched = x.new_zeros(wanted.shape[0], x.shape[1])
        for _, refs, places in _visited(ref_source, x, y, wanted[:, None]):
            for here, row in places:
                fetched += torch.where(here[:, None], refs.index_select(0, row), 0.0)
        ctx.ref_source = ref_source
        ctx.save_for_backward(x, y, wanted)
        return fetched

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[None, None, Tensor | None, None]:
        only_once()
        x, y, wanted = ctx.saved_tensors
        if y is None:
            return None, None, None, None
        dy = torch.zeros_like(y, dtype=x.dtype)
        for chunk, refs, places in _visited(ctx.ref_source, x, y, wanted[:, None]):
            if not chunk.needs_grad:
                continue
            d_refs = torch.zeros_like(refs)
            for here, row in places:
                d_refs.index_add_(0, row, torch.where(here[:, None], g, 0.0))
            _add_received(dy, ctx.ref_source.send(chunk, None, d_refs))
        _add_received(dy, ctx.ref_source.flush())
        return None, None, dy.to(y.dtype), None
