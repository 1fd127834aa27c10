"""`Pairs` whose references come in chunks (chunks.py): from a file, a queue of earlier batches, other processes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..backends.cpu import screened
from ..backends.reference import ReferencePairs, pad_positives
from ..core.chunks import Chunk, ReferenceSource, only_once, places_of
from ..core.class_pairs import ClassPairs, draw
from ..core.label_order import LabelOrder, one_to_one
from ..core.reduction import Reduction
from ..core.similarity import poison
from ..engine.dispatch import choose, unsupported_reasons
from ..engine.pairs import Pairs
from ..engine.positive_pairs import listed_similarities, pair_gradients
from ..engine.row_reduce_op import Spec
from .reduce import ChunkedCall, ChunkedRowReduce

TAKEN = ("tiled", "fused")  # schedules whose calls keep nothing that hangs on all references


def chunked_backend(impl: str, x: Tensor) -> str:
    """The schedule that takes references in chunks.

    Raises:
        RuntimeError: one that was named and does not, or none that can run here.
    """
    chosen = choose(impl, x, None)
    if chosen not in TAKEN:
        why = f"impl={impl!r} cannot run" if impl != "auto" else "; ".join(unsupported_reasons("tiled", x.device))
        raise RuntimeError(f"only 'tiled' and 'fused' take references in chunks: {why}")
    return chosen


class LabelledSource(ReferenceSource):
    """A source that knows the labels of all references."""

    poison: Tensor | float = 0.0  # NaN once a reference that is not finite has come

    def known(self) -> tuple[Tensor, Tensor]:
        """These, sorted, and where each stands among all (M,), (M,)."""
        raise NotImplementedError

    def counts(self) -> tuple[Tensor, int]:
        """How many references have each anchor's label (N,), itself among them if it is one, and how many there are."""
        labels, _ = self.known()
        same = torch.searchsorted(labels, self.labels, right=True) - torch.searchsorted(labels, self.labels)
        return same, labels.shape[0]

    def singly(self) -> ReferenceSource:
        """The same references, met by every anchor one way, with no chunk of `both`."""
        raise NotImplementedError


class ChunkedPairs(Pairs):
    """N anchors, sorted, against what a source brings.

    Args:
        x: (N, D) sorted anchors; `order`: (N,) the caller's index of each; square: they are among the references.
        y: (M, D) sorted references of this process, where the source has need of them.
    """

    screens = False  # nobody named `tiled`, so that chunks may be screened

    def __init__(
        self,
        x: Tensor,
        order: Tensor,
        ref_source: LabelledSource,
        square: bool,
        distance: str,
        impl: str,
        y: Tensor | None = None,
    ) -> None:
        labels, none = ref_source.labels, order.new_empty(0)
        refs = labels if square else none
        super().__init__(
            x, y, LabelOrder(order, order, labels, refs, none, none, None, square), distance, impl, named=True
        )
        self.ref_source = ref_source
        self._counts: tuple[Tensor, int] | None = None

    def _rows(self, spec: Spec, scale: Tensor | None, vectors: list[Tensor]) -> tuple[Tensor, ...]:
        rows: Tensor = ChunkedRowReduce.apply(ChunkedCall(self.ref_source, spec), self.x, self._y, scale, *vectors)
        return rows.unbind(0)

    def _schedule_of(self, reductions: tuple[Reduction, ...]) -> str:
        """`impl`, or `screened` in place of `tiled`, for those chunks that are worth it."""
        if not self.screens or self.impl != "tiled" or screened.unsupported_reasons(reductions, self.x.shape[1]):
            return self.impl
        return "screened"

    def dense(self) -> ReferencePairs:
        raise RuntimeError("references in chunks have no dense matrix")

    @property
    def refs(self) -> Tensor:
        raise RuntimeError(
            "references in chunks are never all in memory at once: pairs.y and pairs.refs are not available"
        )

    @property
    def y(self) -> Tensor | None:
        return self.refs

    @property
    def ref_labels(self) -> Tensor:
        """Of all references, other processes' too (M,), sorted."""
        return self.ref_source.known()[0]

    def sums(self, step: int) -> tuple[Pairs, Tensor, Tensor, Tensor]:
        raise RuntimeError(
            "references in chunks have no sums of an anchor and its positive: pairs.sums is not available"
        )

    def counts(self) -> tuple[Tensor, int]:
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
        return places_of(self.ref_source.order, self.ref_source.known()[1])

    def positive_places(self, block: range) -> Tensor:
        """Where each anchor's positives stand among all references (N, K); beyond them anywhere, or -1."""
        labels, order = self.ref_source.known()
        lo = torch.searchsorted(labels, self.labels)
        at = lo[:, None] + torch.arange(block.start, block.stop, device=lo.device)
        if self.square:
            at = at + (at >= self.own_places()[:, None])
        count = order.shape[0]
        return order[at.clamp(max=count - 1)] if count else torch.full_like(at, -1)

    def positive_blocks(self, most: int) -> list[range]:
        """All K = `most` places at once, as each block would fetch every chunk again."""
        return [range(most)]

    def positives(self, most: int | None = None, block: range | None = None) -> tuple[Tensor, Tensor]:
        x, most = self.x.to(self.dtype), self.most_positives(most)
        block = range(most) if block is None else block
        z = Fetched.apply(self.ref_source.singly(), x, self.shared_refs(), self.positive_places(block), self.distance)
        bad = poison(self.x, None) if self.poison is None else self.poison
        return pad_positives(z, self.num_positives(), bad, most, block.start)

    def shared_refs(self) -> Tensor | None:
        """This process's references (M, D), of a square problem its anchors, for a source that takes them one way."""
        return self.x.to(self.dtype) if self.square else self._y

    def draw(self) -> ClassPairs:
        """As `Pairs.draw`, but positives by their places among all references."""
        labels, order = self.ref_source.known()
        found = draw(self.labels, None if self.square else labels)
        return found._replace(positives=order.index_select(0, found.positives))

    def select(self, rows: Tensor, refs: Tensor, labels: Tensor, count: Tensor) -> Pairs:
        y = FetchedRows.apply(self.ref_source.singly(), self.x, self.shared_refs(), refs)
        x = self.x.index_select(0, rows)
        return Pairs(x, y, one_to_one(labels, count), self.distance, self.impl, poison=poison(self.x, None))


def _visited(
    ref_source: ReferenceSource, x: Tensor, y: Tensor | None, wanted: Tensor
) -> Iterator[tuple[Chunk, Tensor, list[Any]]]:
    """Each chunk that has rows, its rows, and for each k whose references wanted[:, k] are here, and which they are."""
    for chunk in ref_source.chunks(x, y, None):
        assert chunk.y is not None
        rows = chunk.y.to(x.dtype)
        here = places_of(wanted.T, chunk.order) if rows.shape[0] else ()
        yield chunk, rows, [(at >= 0, at.clamp_min(0)) for at in here]


def _handed(ref_source: ReferenceSource, dy: Tensor | None, found: Any) -> None:
    for own, _, part in found:
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
        found = x.new_zeros(wanted.shape[0], x.shape[1])
        for _, rows, places in _visited(ref_source, x, y, wanted[:, None]):
            for here, at in places:
                found += torch.where(here[:, None], rows.index_select(0, at), 0.0)
        ctx.ref_source = ref_source
        ctx.save_for_backward(x, y, wanted)
        return found

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
