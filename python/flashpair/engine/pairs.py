"""The engine: pairs of anchors and references, whose row reductions run without the matrix of similarities.

    criterion -> Pairs.reduce -> compile_call -> one registered operator -> the backend of the call's `Route`

`Pairs` sorts embeddings by label once. Row values stand in that order until `restore` puts them into the caller's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends.reference import ReferencePairs
from ..core import checks
from ..core.call import Call, as_tensor, compile_call, operands_of
from ..core.class_pairs import ClassPairs, pick_class_pairs
from ..core.label_order import LabelOrder, make_label_order, one_to_one
from ..core.pairs import PairAccess, PairReducer, class_partners
from ..core.problem import Operands, accumulator
from ..core.reduction import DISTANCES, Reduction, check_call
from ..core.similarity import nan_unless_finite, upcast
from .cached_references import Ordered, owner
from .dispatch import Route, route_call, route_pairs
from .positive_pairs import dense_similarities, positive_pairs
from .row_reduce_op import RowReduce
from .sorted_rows import sorted_rows


class FusedPairs(PairAccess):
    """The parts that `Pairs` and `ChunkedPairs` share: sorted anchors, whose reductions a backend computes.

    Args:
        x: (N, D), the anchors, sorted by label.
        label_order: the order by label, and where each row's positives are.
        distance: ``"dot"``, ``"euclidean"`` or ``"squared_euclidean"``.
        route: the backend that runs, and its dtype.
        nonfinite: () 0 or NaN, which is added to row values; None: the backend shows embeddings that are not finite.
    """

    def __init__(
        self, x: Tensor, label_order: LabelOrder, distance: str, route: Route, nonfinite: Tensor | None = None
    ) -> None:
        self.x, self.label_order, self.distance, self.route = x, label_order, distance, route
        self.labels, self.square = label_order.labels, label_order.square
        self._nonfinite = nonfinite

    @property
    def impl(self) -> str:
        """The name of the backend that runs."""
        return self.route.backend

    @property
    def count(self) -> int:
        return self.x.shape[0]

    @property
    def dtype(self) -> torch.dtype:
        return accumulator(self.x.dtype)

    def squared_norms(self) -> Tensor:
        x = self.x.to(self.dtype)
        return (x * x).sum(1)

    def restore(self, values: Tensor) -> Tensor:
        return torch.empty_like(values).index_copy(0, self.label_order.order, values)

    def arrange(self, values: Tensor) -> Tensor:
        return values.index_select(0, self.label_order.order)

    def arrange_refs(self, values: Tensor) -> Tensor:
        return values.index_select(0, self.label_order.ref_order)

    def reduce(self, *reductions: Reduction) -> tuple[Tensor, ...]:
        n, m = self.count, self.label_order.ref_labels.shape[0]
        check_call(reductions, self.x, n, m)
        call = compile_call(reductions, self.distance, self.impl)
        route = self._route_of(call)
        if route.backend == "reference":
            return self._dense().reduce(*reductions)
        call = call if route.backend == call.backend else call._replace(backend=route.backend)
        rows = self._rows(call, operands_of(call, reductions, n, m, self.dtype, self.x.device))
        values = []
        for row, r in zip(rows, reductions, strict=True):
            if r.offset_outside and r.offset is not None:
                by_row = isinstance(r.offset, Tensor)
                row = row + (as_tensor(r.offset, self.dtype, self.x.device) if by_row else r.offset)
            row = row if self._nonfinite is None else row + self._nonfinite
            values.append(row.detach() if r.detach else row)
        return tuple(values)

    def _route_of(self, call: Call) -> Route:
        """The route of a call, which may run on another backend than the batch."""
        return self.route

    def _rows(self, call: Call, operands: Operands) -> tuple[Tensor, ...]:
        """The values of a compiled call, K tensors (N,)."""
        raise NotImplementedError

    def _dense(self) -> PairReducer:
        """The same pairs over the dense matrix, for a call that only the reference computes."""
        self._refuse("dense")


class Pairs(FusedPairs):
    """N anchors against M references, sorted by label, whose row reductions are fused; `make_pairs` returns it.

    `row_losses` of a `Criterion` receives it. Row values stand in the order of `labels`; `restore` puts them into the
    caller's order. `ReferencePairs` has the same methods over the dense matrix.

    Args:
        x: (N, D), the anchors, sorted by label.
        y: (M, D), the references, sorted by label; None if they are the anchors.
        label_order: the order by label, and where each row's positives are.
        distance: ``"dot"``, ``"euclidean"`` or ``"squared_euclidean"``.
        route: the backend that runs, and its dtype.
        nonfinite: () 0 or NaN, which is added to row values; None: the backend shows embeddings that are not finite.

    Attributes:
        x: (N, D), the sorted anchors, float32 or float64, or 16 bits if the backend takes these.
        y: (M, D), the sorted references; None if they are the anchors.
        impl: the name of the backend that runs.
        labels: (N,) int64, in the order of the rows.
        ref_labels: (M,) int64, in the order of the references.
    """

    def __init__(
        self, x: Tensor, y: Tensor | None, label_order: LabelOrder, distance: str, route: Route, *,
        nonfinite: Tensor | None = None,
    ) -> None:  # fmt: skip
        super().__init__(x, label_order, distance, route, nonfinite)
        self.y = y

    @classmethod
    def from_embeddings(
        cls, x: Tensor, labels: Tensor, y: Tensor | None, ref_labels: Tensor | None, distance: str, normalize: bool,
        route: Route, ordered: Ordered | None = None,
    ) -> Pairs:  # fmt: skip
        """The pairs of embeddings that are not sorted yet.

        Args:
            x: (N, D), the anchors.
            labels: (N,) int64.
            y: (M, D), the references, or None.
            ref_labels: (M,) int64, with `y`.
            distance: ``"dot"``, ``"euclidean"`` or ``"squared_euclidean"``.
            normalize: L2-normalise the rows first.
            route: the backend that runs, and its dtype.
            ordered: references that are sorted (and normalised) already; then `y` and `ref_labels` are None.
        """
        if ordered is not None:
            label_order, y = make_label_order(labels, ordered.labels, ordered.order), ordered.rows
        else:
            label_order = make_label_order(labels, ref_labels)
            y = None if y is None else sorted_rows(y, label_order.ref_order, normalize=normalize, impl=route.backend)
        x = sorted_rows(x, label_order.order, normalize=normalize, impl=route.backend)
        return cls(x, y, label_order, distance, route)

    @property
    def refs(self) -> Tensor:
        """(M, D), the sorted references."""
        return self.x if self.y is None else self.y

    @property
    def ref_labels(self) -> Tensor:
        return self.label_order.ref_labels

    @property
    def nonfinite(self) -> Tensor:  # type: ignore[override]
        return nan_unless_finite(self.x, self.y) if self._nonfinite is None else self._nonfinite

    def num_positives(self) -> Tensor:
        return self.label_order.hi - self.label_order.lo - int(self.square)

    def num_negatives(self) -> Tensor:
        end = self.ref_labels.shape[0] if self.label_order.end is None else self.label_order.end
        return end - (self.label_order.hi - self.label_order.lo)

    def _route_of(self, call: Call) -> Route:
        return route_call(self.route, call, self.x, self.refs.shape[0])

    def _rows(self, call: Call, operands: Operands) -> tuple[Tensor, ...]:
        p = self.label_order
        padded: list[Tensor | None] = [*operands.vectors]
        if len(padded) == 2:  # for exactly two vectors torch.compile leaves out `ctx`
            padded.append(None)
        rows: tuple[Tensor, ...] = RowReduce.apply(
            call, p.lo, p.hi, p.end, p.ref_order, self.x, self.y, operands.scale, *padded
        )
        return rows

    def dense(self) -> ReferencePairs:
        """The same pairs, in the same order of rows, over the dense matrix."""
        wide = self.dtype
        z = dense_similarities(self.x.to(wide), self.refs.to(wide), self.distance)
        column = torch.arange(self.ref_labels.shape[0], device=z.device)
        valid = None if self.label_order.end is None else column < self.label_order.end
        return ReferencePairs(
            z,
            self.labels,
            self.ref_labels,
            square=self.square,
            ref_valid=valid,
            nonfinite=self.nonfinite,
            order=self.label_order.ref_order,
        )

    def _dense(self) -> ReferencePairs:
        return self.dense()

    def positive_places(self, places: range) -> Tensor:
        p = self.label_order
        refs = p.lo[:, None] + torch.arange(places.start, places.stop, device=p.lo.device)
        if self.square:  # skip the row itself
            refs = refs + (refs >= torch.arange(self.count, device=refs.device)[:, None])
        return refs.clamp(max=max(self.refs.shape[0] - 1, 0))

    def similarities_at(self, refs: Tensor) -> Tensor:
        return positive_pairs(self.x.to(self.dtype), self.refs.to(self.dtype), refs, self.distance)

    def class_pairs(self) -> ClassPairs:
        return pick_class_pairs(self.labels, None if self.square else self.ref_labels)

    def take_pairs(self, chosen: ClassPairs) -> Pairs:
        x, y = self.x.index_select(0, chosen.anchors), self.refs.index_select(0, chosen.positives)
        order = one_to_one(chosen.place, chosen.taken)
        return Pairs(x, y, order, self.distance, self.route, nonfinite=self.nonfinite)  # of all samples

    def matched_similarities(self) -> Tensor:
        """The dot product of row k and reference k, (N,), for pairs that `take_pairs` returned."""
        return (self.x.to(self.dtype) * self.refs.to(self.dtype)).sum(1)

    def pair_sums(self, step: int) -> tuple[Pairs, Tensor, Tensor, Tensor]:
        if not self.square:
            raise RuntimeError("pairs.pair_sums is of a batch with itself, without references")
        p = self.label_order
        _, partner, first = class_partners(p.lo, p.hi, step)
        x = self.x.to(self.dtype)
        other = x.index_select(0, partner)
        order = p._replace(square=False)
        return Pairs(x + other, x, order, self.distance, self.route), (x * other).sum(1), partner, first


def dense_pairs_of(z: Tensor, labels: Tensor, ref_labels: Tensor, nonfinite: Tensor) -> ReferencePairs:
    """Pairs of anchors and references, whose similarities the caller has computed.

    Args:
        z: (N, M), the similarities.
        labels: (N,) int64, of the anchors.
        ref_labels: (M,) int64, of the references, which are not the anchors.
        nonfinite: () 0, or NaN if an embedding is not finite.
    """
    return ReferencePairs(z, labels, ref_labels, square=False, nonfinite=nonfinite)


def make_pairs(
    embeddings: Tensor,
    labels: Tensor,
    *,
    ref_emb: Tensor | None = None,
    ref_labels: Tensor | None = None,
    distance: str = "dot",
    normalize: bool = False,
    impl: str = "auto",
) -> Pairs | ReferencePairs:
    """The pairs of embeddings with one another, or with references, which losses reduce.

    Args:
        embeddings: (N, D), float16 to float64.
        labels: (N,), integers.
        ref_emb: (M, D), or None: the embeddings themselves, without self pairs.
        ref_labels: (M,), integers, with `ref_emb`.
        distance: ``"dot"`` (the default), ``"euclidean"`` or ``"squared_euclidean"``.
        normalize: L2-normalise the rows first; by default they are taken as they are.
        impl: as `Criterion` takes it.

    Returns:
        A `Pairs`, or for ``impl="reference"`` a `ReferencePairs` with the same methods.

    Raises:
        TypeError: an argument of a wrong type, named.
        ValueError: an unknown word, or shapes and devices that do not fit.
        RuntimeError: a named `impl` that cannot run here, with every reason.

    Examples:
        >>> x = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0], [-0.8, 0.6]])
        >>> labels = torch.tensor([0, 0, 1, 1])
        >>> pairs = flashpair.make_pairs(x, labels)
        >>> (highest,) = pairs.reduce(flashpair.Reduction("max", "negatives"))
        >>> [round(value, 4) + 0.0 for value in pairs.restore(highest).tolist()]
        [0.0, 0.8, 0.8, 0.0]
    """
    checks.word(distance, DISTANCES, "distance")
    return checked_pairs(*checks.batch(embeddings, labels, ref_emb, ref_labels), distance, normalize, impl)


def checked_pairs(
    x: Tensor, labels: Tensor, y: Tensor | None, ref_labels: Tensor | None, distance: str, normalize: bool, impl: str
) -> Pairs | ReferencePairs:
    """`make_pairs` for arguments that are checked already.

    Args:
        x: (N, D), from `checks.batch`.
        labels: (N,) int64.
        y: (M, D), or None.
        ref_labels: (M,) int64, or None.
        distance: ``"dot"``, ``"euclidean"`` or ``"squared_euclidean"``.
        normalize: L2-normalise the rows first.
        impl: as `Criterion` takes it.
    """
    route = route_pairs(impl, x, y)
    if route.backend == "reference":
        x, y = upcast(x, y)
        return ReferencePairs.from_embeddings(x, labels, y, ref_labels, distance, normalize)
    if (references := owner(y, ref_labels)) is not None:
        ordered = references.ordered(route.dtype, normalize, route.backend)
        return Pairs.from_embeddings(x.to(route.dtype), labels, None, None, distance, normalize, route, ordered)
    x, y = x.to(route.dtype), None if y is None else y.to(route.dtype)
    return Pairs.from_embeddings(x, labels, y, ref_labels, distance, normalize, route)
