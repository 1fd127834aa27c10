"""`Pairs` whose references come in chunks (chunks.py): from a file, a queue of earlier batches, other processes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..core.call import Call
from ..core.chunks import Chunk, ReferenceSource, only_once, places_of
from ..core.class_pairs import ClassPairs, pick_class_pairs
from ..core.label_order import LabelOrder, one_to_one
from ..core.pairs import PairAccess
from ..core.problem import Operands
from ..core.similarity import nan_unless_finite
from ..engine.dispatch import Route, route_call
from ..engine.pairs import FusedPairs, Pairs
from ..engine.positive_pairs import listed_similarities, pair_gradients
from .reduce import ChunkedCall, ChunkedRowReduce


class LabelledSource(ReferenceSource):
    """A source that knows the labels of all references."""

    nonfinite: Tensor | float = 0.0  # NaN once a reference that is not finite has come

    def labels_and_order(self) -> tuple[Tensor, Tensor]:
        """These, sorted, and where each stands among all (M,), (M,)."""
        raise NotImplementedError

    def counts(self) -> tuple[Tensor, int]:
        """How many references have each anchor's label (N,), itself among them if it is one, and how many there are."""
        labels, _ = self.labels_and_order()
        same = torch.searchsorted(labels, self.labels, right=True) - torch.searchsorted(labels, self.labels)
        return same, labels.shape[0]

    def one_way(self) -> ReferenceSource:
        """The same references, met by every anchor one way, with no chunk of `two_sided`."""
        raise NotImplementedError


class ChunkedPairs(FusedPairs):
    """N anchors, sorted, against what a source brings.

    Args:
        x: (N, D), sorted anchors.
        order: (N,), the caller's index of each.
        ref_source: where the references come from.
        square: the anchors are among the references.
        y: (M, D), sorted references of this process, where the source has need of them.
        nonfinite: NaN or 0, added to row values; None: the backend shows what is not finite.
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

    def _route_of(self, call: Call) -> Route:
        """The batch's, or an error: no other backend takes references in chunks."""
        return route_call(self.route._replace(named=True), call, self.x, 0)

    def _rows(self, call: Call, operands: Operands) -> tuple[Tensor, ...]:
        chunked = ChunkedCall(self.ref_source, call)
        rows: Tensor = ChunkedRowReduce.apply(chunked, self.x, self._refs, operands.scale, *operands.vectors)
        return rows.unbind(0)

    @property
    def ref_labels(self) -> Tensor:
        """(M,), of all references, other processes' too, sorted."""
        return self.ref_source.labels_and_order()[0]

    @property
    def nonfinite(self) -> Tensor:  # type: ignore[override]
        return nan_unless_finite(self.x, None) if self._nonfinite is None else self._nonfinite

    def counts(self) -> tuple[Tensor, int]:
        """How many references have each anchor's label (N,), and how many there are."""
        if self._counts is None:
            self._counts = self.ref_source.counts()
        return self._counts

    def num_positives(self) -> Tensor:
        return self.counts()[0] - int(self.square)

    def num_negatives(self) -> Tensor:
        same, every = self.counts()
        return every - same

    def own_places(self) -> Tensor:
        """Of a square problem: where each anchor stands among all references in the order of their labels (N,)."""
        return places_of(self.ref_source.order, self.ref_source.labels_and_order()[1])

    def positive_places(self, places: range) -> Tensor:
        """By their places among all references; beyond a row's list anywhere, or -1."""
        labels, order = self.ref_source.labels_and_order()
        lo = torch.searchsorted(labels, self.labels)
        at = lo[:, None] + torch.arange(places.start, places.stop, device=lo.device)
        if self.square:
            at = at + (at >= self.own_places()[:, None])
        count = order.shape[0]
        return order[at.clamp(max=count - 1)] if count else torch.full_like(at, -1)

    def similarities_at(self, refs: Tensor) -> Tensor:
        x = self.x.to(self.dtype)
        z: Tensor = Fetched.apply(self.ref_source.one_way(), x, self.shared_refs(), refs, self.distance)
        return z

    def positive_blocks(self, most: int) -> list[range]:
        """All K = `most` places at once, as each block would fetch every chunk again."""
        return [range(most)]

    def shared_refs(self) -> Tensor | None:
        """This process's references (M, D), of a square problem its anchors, for a source that takes them one way."""
        return self.x.to(self.dtype) if self.square else self._refs

    def class_pairs(self) -> ClassPairs:
        """As `Pairs.class_pairs`, but positives by their places among all references."""
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
    """Each chunk that has rows, its rows, and for each k whose references wanted[:, k] are here, and which they are."""
    for chunk in ref_source.chunks(x, y, None):
        assert chunk.y is not None
        rows = chunk.y.to(x.dtype)
        here = places_of(wanted.T, chunk.order) if rows.shape[0] else ()
        yield chunk, rows, [(at >= 0, at.clamp_min(0)) for at in here]


def _handed(ref_source: ReferenceSource, dy: Tensor | None, received: Any) -> None:
    for own, _, part in received:
        assert dy is not None
        dy[own] += part


class Fetched(torch.autograd.Function):
    """z (N, K) of rows x_i with references j = wanted (N, K), by their place among all; -1: none, and 0."""

    @staticmethod
    def forward(
        ctx: Any, ref_source: ReferenceSource, x: Tensor, y: Tensor | None, wanted: Tensor, distance: str
    ) -> Tensor:
        z = x.new_zeros(wanted.shape)
        for _, rows, places in _visited(ref_source, x, y, wanted):
            if not places:
                continue
            here, at = (torch.stack(t, 1) for t in zip(*places, strict=True))
            z += torch.where(here, listed_similarities(x, rows, at, distance), 0.0)
        ctx.ref_source, ctx.distance = ref_source, distance
        ctx.save_for_backward(x, y, wanted)
        return z

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[None, Tensor, Tensor | None, None, None]:
        only_once()
        x, y, wanted = ctx.saved_tensors
        dx, dy = torch.zeros_like(x), None if y is None else torch.zeros_like(y, dtype=x.dtype)
        for chunk, rows, places in _visited(ctx.ref_source, x, y, wanted):
            part = torch.zeros_like(rows) if chunk.wanted else None
            for k, (here, at) in enumerate(places):
                own = torch.where(here, g[:, k], 0.0)
                to_x, to_other = pair_gradients(x, rows.index_select(0, at), own, ctx.distance)
                dx += to_x
                if part is not None:
                    part.index_add_(0, at, to_other)
            if part is not None:
                _handed(ctx.ref_source, dy, ctx.ref_source.send(chunk, None, part))
        _handed(ctx.ref_source, dy, ctx.ref_source.flush())
        return None, dx, None if dy is None else dy.to(y.dtype), None, None


class FetchedRows(torch.autograd.Function):
    """References (N, D) by their place among all (N,)."""

    @staticmethod
    def forward(ctx: Any, ref_source: ReferenceSource, x: Tensor, y: Tensor | None, wanted: Tensor) -> Tensor:
        refs = x.new_zeros(wanted.shape[0], x.shape[1])
        for _, rows, places in _visited(ref_source, x, y, wanted[:, None]):
            for here, at in places:
                refs += torch.where(here[:, None], rows.index_select(0, at), 0.0)
        ctx.ref_source = ref_source
        ctx.save_for_backward(x, y, wanted)
        return refs

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[None, None, Tensor | None, None]:
        only_once()
        x, y, wanted = ctx.saved_tensors
        if y is None:
            return None, None, None, None
        dy = torch.zeros_like(y, dtype=x.dtype)
        for chunk, rows, places in _visited(ctx.ref_source, x, y, wanted[:, None]):
            if not chunk.wanted:
                continue
            part = torch.zeros_like(rows)
            for here, at in places:
                part.index_add_(0, at, torch.where(here[:, None], g, 0.0))
            _handed(ctx.ref_source, dy, ctx.ref_source.send(chunk, None, part))
        _handed(ctx.ref_source, dy, ctx.ref_source.flush())
        return None, None, dy.to(y.dtype), None
