"""The engine: pairs of anchors and references, whose row reductions are fused and never stored.

    criterion -> Pairs.reduce -> one registered op -> the implementation that `dispatch` chose

A `Pairs` sorts once by label; its rows stand in the order of its `labels` until `restore` puts them back.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends.cpu import screened
from ..backends.reference import ReferencePairs, pad_positives, partners
from ..core import checks, transforms
from ..core.class_pairs import ClassPairs, draw
from ..core.label_order import LabelOrder, make_label_order, one_to_one
from ..core.positives import PLACES, STEPS, cut
from ..core.problem import accumulator, solid
from ..core.reduction import BUILT_IN, DISTANCES, Bound, Reduction, check_call
from ..core.similarity import masked_logsumexp, poison, upcast
from .cached_references import Ordered, owner
from .dispatch import choose, native
from .positive_pairs import dense_similarities, positive_pairs
from .row_reduce_op import RowReduce, Spec, encode
from .sorted_rows import sorted_rows


class Pairs:
    """N anchors against M references, sorted by label, whose row reductions are fused; `make_pairs` returns it.

    `row_losses` of a `Criterion` receives it. Row values stand in the order of `labels`; `restore` puts them into the
    caller's. `ReferencePairs` is the same over the dense matrix.

    Args:
        x: (N, D), sorted anchors.
        y: (M, D), sorted references; None if they are the anchors.
        label_order: the order by label and where each row's positives are.
        distance: ``"dot"``, ``"euclidean"`` or ``"squared_euclidean"``.
        impl: the implementation that runs.
        named: whether the caller asked for it by name, so that no other may run.
        poison: NaN or 0, added to row values, to show embeddings that are not finite.

    Attributes:
        x: (N, D), sorted anchors, float32 or float64, or 16 bits where the implementation takes them.
        y: (M, D), sorted references; None if they are the anchors.
        impl: the implementation that runs.
        named: whether the caller asked for it by name.
        labels: (N,) int64, in the order of the rows.
        ref_labels: (M,) int64, in the order of the references.
    """

    def __init__(
        self, x: Tensor, y: Tensor | None, label_order: LabelOrder, distance: str, impl: str, *, named: bool = True,
        poison: Tensor | None = None,
    ) -> None:  # fmt: skip
        self.x, self._y, self.label_order, self.distance, self.poison = x, y, label_order, distance, poison
        self.impl, self.named = impl, named
        self.labels, self.square = label_order.labels, label_order.square

    @classmethod
    def from_embeddings(
        cls, x: Tensor, labels: Tensor, y: Tensor | None, ref_labels: Tensor | None, distance: str, unit: bool,
        impl: str, named: bool, ordered: Ordered | None = None,
    ) -> Pairs:  # fmt: skip
        """`ordered`: the references, where they are sorted already."""
        if ordered is not None:
            label_order, y = make_label_order(labels, ordered.labels, ordered.order), ordered.rows
        else:
            label_order = make_label_order(labels, ref_labels)
            y = None if y is None else sorted_rows(y, label_order.ref_order, unit=unit, impl=impl)
        return cls(sorted_rows(x, label_order.order, unit=unit, impl=impl), y, label_order, distance, impl, named=named)

    def reduce(self, *reductions: Reduction) -> tuple[Tensor, ...]:
        """One tensor (N,) for each reduction, in the order of ``labels``; reductions of one call share their passes.

        Args:
            reductions: one or more `Reduction`s; vectors in them are in the order of ``labels`` (``ref_labels``).

        Returns:
            A tuple of tensors (N,), float32 or float64.

        Raises:
            TypeError: something else than a Reduction, or a value of a wrong type in one.
            ValueError: no reduction, or vectors of another length or device.
            RuntimeError: an implementation asked for by name that cannot compute these reductions, with every reason.
        """
        check_call(reductions, self.x, self.count, self.label_order.ref_labels.shape[0])
        if foreign := [r.transform for r in reductions if r.transform not in BUILT_IN]:
            device = self.x.device.type
            refused = [why for name in foreign if (why := transforms.unsupported_reasons(name, self.impl, device))]
            if refused and self.named:
                raise RuntimeError(f"impl={self.impl!r} cannot run: {'; '.join(refused)}")
            if refused:
                return self.dense().reduce(*reductions)
        impl = self._schedule_of(reductions)
        n, dtype = self.x.shape[0], accumulator(self.x.dtype)

        def tensor(value: float | Tensor) -> Tensor:
            if isinstance(value, Tensor):
                return value.to(self.x.device, dtype)
            return torch.full((), value, dtype=dtype, device=self.x.device)  # no copy from the host, which would wait

        slots: list[int] = []
        vectors: list[Tensor] = []
        for k, r in enumerate(reductions):
            own = (r.offset if isinstance(r.offset, Tensor) and not r.offset_outside else None,
                   r.ref_offset, r.lower, r.upper)  # fmt: skip
            for slot, value in enumerate(own):
                if value is None or isinstance(value, Bound):
                    continue
                size = self.label_order.ref_labels.shape[0] if slot == 1 else n
                vector = solid(tensor(value).expand(size))
                slots.append(4 * k + slot)
                vectors.append(vector.detach() if slot > 1 else vector)
        scale = None
        if any(isinstance(r.scale, Tensor) for r in reductions):
            scale = torch.stack([tensor(r.scale) for r in reductions])
        rows = self._rows(encode(reductions, tuple(slots), self.distance, impl), scale, vectors)
        found = []
        for row, r in zip(rows, reductions, strict=True):
            if r.offset_outside and r.offset is not None:
                row = row + (tensor(r.offset) if isinstance(r.offset, Tensor) else r.offset)
            row = row if self.poison is None else row + self.poison
            found.append(row.detach() if r.detach else row)
        return tuple(found)

    def _rows(self, spec: Spec, scale: Tensor | None, vectors: list[Tensor]) -> tuple[Tensor, ...]:
        """The values (N,) of an encoded call."""
        p = self.label_order
        given: list[Tensor | None] = [*vectors]
        if len(vectors) == 2:  # so many more arguments than parameters make torch.compile leave out `ctx`
            given.append(None)
        rows: tuple[Tensor, ...] = RowReduce.apply(spec, p.lo, p.hi, p.end, p.ref_order, self.x, self.y, scale, *given)
        return rows

    def _schedule_of(self, reductions: tuple[Reduction, ...]) -> str:
        """`impl`, or `screened` in place of `tiled` for a call that it speeds up and that nobody named `tiled` for."""
        if self.impl == "screened":
            if reasons := screened.unsupported_reasons(reductions, self.x.shape[1]):
                raise RuntimeError(f"impl='screened' cannot run: {'; '.join(reasons)}")
        elif (
            not self.named
            and screened.worthwhile(self.impl, self.x, self.refs)
            and not screened.unsupported_reasons(reductions, self.x.shape[1])
        ):
            return "screened"
        return self.impl

    def dense(self) -> ReferencePairs:
        """The same pairs, in the same order of rows, over the dense matrix."""
        wide = accumulator(self.x.dtype)
        z = dense_similarities(self.x.to(wide), self.refs.to(wide), self.distance)
        column = torch.arange(self.ref_labels.shape[0], device=z.device)
        valid = None if self.label_order.end is None else column < self.label_order.end
        bad = poison(self.x, self.y) if self.poison is None else self.poison
        return ReferencePairs(
            z,
            self.labels,
            self.ref_labels,
            square=self.square,
            ref_valid=valid,
            poison=bad,
            order=self.label_order.ref_order,
        )

    def num_positives(self) -> Tensor:  # (N,) int64
        return self.label_order.hi - self.label_order.lo - int(self.square)

    def num_negatives(self) -> Tensor:  # (N,) int64
        end = self.ref_labels.shape[0] if self.label_order.end is None else self.label_order.end
        return end - (self.label_order.hi - self.label_order.lo)

    def paired(self) -> Tensor:  # (N,)
        """z_kk (N,) of a rectangular problem whose rows and references belong together one by one; for dot products."""
        wide = accumulator(self.x.dtype)
        return (self.x.to(wide) * self.refs.to(wide)).sum(1)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of row values."""
        return accumulator(self.x.dtype)

    @property
    def y(self) -> Tensor | None:
        return self._y

    @property
    def ref_labels(self) -> Tensor:
        return self.label_order.ref_labels

    @property
    def count(self) -> int:
        """The number of rows."""
        return self.x.shape[0]

    def squares(self) -> Tensor:  # (N,)
        """Squared norms of the rows."""
        x = self.x.to(accumulator(self.x.dtype))
        return (x * x).sum(1)

    def most_positives(self, most: int | None = None) -> int:
        """The largest number of positives of a row, at least 1; `most` if it is given. Otherwise the host waits for the
        count.
        """
        if most is not None:
            return most
        if torch.compiler.is_compiling():  # which then leaves this call to Python, or, to be one graph, fails
            raise RuntimeError("max_positives must be given where the call is to be one compiled graph, got None")
        return max(1, int(self.num_positives().amax())) if self.x.shape[0] else 1

    def positive_blocks(self, most: int) -> list[range]:
        """Splits K = `most` places into blocks, for each of which `positives` needs memory linear in N."""
        return cut(range(most), PLACES)

    def positives(self, most: int | None = None, block: range | None = None) -> tuple[Tensor, Tensor]:
        """z of each row's positives, padded to the same number.

        Args:
            most: K, the number of places; None: the largest number that a row has, at least 1, for which the host
                waits. A row with more positives is NaN.
            block: only these of the K places.

        Returns:
            z (N, K), 0 where a row has fewer, and a bool (N, K) that says where there is a positive.
        """
        wide = accumulator(self.x.dtype)
        x, y, p = self.x.to(wide), self.refs.to(wide), self.label_order
        most = self.most_positives(most)
        block = range(most) if block is None else block
        at = p.lo[:, None] + torch.arange(block.start, block.stop, device=x.device)
        if self.square:
            at = at + (at >= torch.arange(x.shape[0], device=x.device)[:, None])
        at = at.clamp(max=max(y.shape[0] - 1, 0))
        z = positive_pairs(x, y, at, self.distance)
        return pad_positives(z, self.num_positives(), poison(self.x, self.y), most, block.start)

    def sum_blocks(self, most: int) -> list[range]:
        """The steps of `sums` that visit every pair of rows with up to `most` positives, split into small blocks."""
        return cut(range(1, (most + 1) // 2 + 1), STEPS)

    def at_both_ends(self, values: Tensor, other: Tensor, first: Tensor) -> Tensor:
        """Adds values (N,) of the unordered pairs of `sums` to both ends: each row, where `first`, and row `other`."""
        values = torch.where(first, values, 0.0)
        return values + torch.empty_like(values).index_copy(0, other, values)

    def sums(self, step: int) -> tuple[Pairs, Tensor, Tensor, Tensor]:
        """Rows x_i + x_p of a square problem, where p follows i by `step` places around its class.

        Steps 1 to (K + 1) // 2 visit every unordered pair of a class of K + 1 once.

        Args:
            step: from 1 on.

        Returns:
            The pairs of these rows with all samples; z_ip (N,); p (N,); and a bool (N,), where i and p differ and i
            comes first.
        """
        p = self.label_order
        _, partner, first = partners(p.lo, p.hi, step)
        x = self.x.to(accumulator(self.x.dtype))
        other = x.index_select(0, partner)
        label_order = LabelOrder(p.order, p.ref_order, p.labels, p.ref_labels, p.lo, p.hi, p.end, False)
        sums = Pairs(x + other, x, label_order, self.distance, self.impl, named=self.named)
        return sums, (x * other).sum(1), partner, first

    @property
    def refs(self) -> Tensor:
        return self.x if self.y is None else self.y

    def draw(self) -> ClassPairs:
        """One anchor and one positive of each class, as `select` takes them."""
        return draw(self.labels, None if self.square else self.ref_labels)

    def select(self, rows: Tensor, refs: Tensor, labels: Tensor, count: Tensor) -> Pairs:
        """The pairs of row rows[k] with all refs, reference refs[k] being its one positive, for k < count.

        Args:
            rows: (K,), of the anchors.
            refs: (K,), of the references.
            labels: (K,), 0, 1, ...
            count: (), how many of the K there are.
        """
        label_order = one_to_one(labels, count)
        bad = poison(self.x, self.y)  # of the samples left out, too
        x, y = self.x.index_select(0, rows), self.refs.index_select(0, refs)
        return Pairs(x, y, label_order, self.distance, self.impl, named=self.named, poison=bad)

    def total(self, values: Tensor) -> Tensor:
        """The sum over all rows of values (..., N); over all processes' rows where they share the batch."""
        return values.sum(-1)

    def total_logsumexp(self, values: Tensor) -> Tensor:
        """The log-sum-exp () of values (N,), which may be -inf; over all processes' rows where they share the batch."""
        return masked_logsumexp(values[None], (values != -torch.inf)[None])[0]

    def restore(self, values: Tensor) -> Tensor:
        """Row values (N,) in the caller's order."""
        return torch.empty_like(values).index_copy(0, self.label_order.order, values)


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
    """The pairs of embeddings with one another, or with references: what losses reduce.

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
    """`make_pairs` of arguments that `checks.batch` has returned."""
    chosen = choose(impl, x, y)
    kept = owner(y, ref_labels) if chosen != "reference" else None
    if kept is not None and y is not None:
        dtype = x.dtype if native(chosen, x, y) else accumulator(torch.promote_types(x.dtype, y.dtype))
        ordered = kept.ordered(dtype, normalize, chosen)
        return Pairs.from_embeddings(
            x.to(dtype), labels, None, None, distance, normalize, chosen, impl != "auto", ordered
        )
    if not native(chosen, x, y):
        x, y = upcast(x, y)
    if chosen == "reference":
        return ReferencePairs.from_embeddings(x, labels, y, ref_labels, distance, normalize)
    return Pairs.from_embeddings(x, labels, y, ref_labels, distance, normalize, chosen, impl != "auto")
