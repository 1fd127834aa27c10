"""What every criterion shares: checks, normalisation, the pairs, and how row losses become one number."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..chunked.streamed_references import StreamedReferences
from ..core import checks
from ..core.class_pairs import ClassPairs
from ..core.pairs import PairAccess, PairReducer
from ..core.problem import AVERAGINGS
from ..core.reduction import DISTANCES
from ..core.row_formula import RowFormula
from ..core.similarity import autocasts, nan_unless_finite, no_autocast, upcast
from ..engine import small_batch
from ..engine.dispatch import check_name
from ..engine.pairs import checked_pairs
from .averages import reduce_losses
from .output_checks import (
    AT_ONCE,
    Penalty,
    RowLosses,
    Terms,
    checked_call,
    checked_extra,
    checked_penalty,
    checked_prepared,
    checked_rows,
    refuse_own,
)

__all__ = ["Criterion", "Penalty", "RowLosses", "Terms"]


class Criterion(nn.Module):
    """Base of all losses of pairs: a subclass computes each row's loss in `row_losses`, this class does the rest.

    It checks the arguments, normalises, chooses an implementation, and reduces the row losses to one number.

    Args:
        normalize: L2-normalise embeddings and references first. A zero row stays zero, and so does one whose squared
            norm underflows (in float32 a norm below 1e-19); a row whose squared norm overflows (1e19) becomes NaN.
        reduction: how the row losses become one number. An average over nothing is 0.

            - ``"mean"``: divides by N, or by the count that the loss's own docstring names.
            - ``"sum"``.
            - ``"none"``: no reduction, (N,).
            - ``"mean_valid"``: mean over rows that have a loss.
            - ``"nonzero"``: mean over row losses above 0; where the loss says so, over pairs or triplets above 0.
            - ``"mean_pairs"`` (contrastive losses): mean over all positive pairs plus mean over all negative pairs.
        impl: ``"auto"``, or ``"reference"``, ``"tiled"``, ``"screened"``, ``"fused"`` or ``"onchip"``. A named
            implementation never falls back to another; ``python -m flashpair info`` lists those that run here.

    Attributes:
        distance: what pairs are compared by: ``"dot"`` (the default; cosines when normalised), ``"euclidean"`` or
            ``"squared_euclidean"``.
        anchors: what a row of `row_losses` is: ``"samples"`` of the batch, or ``"proxies"``, the weights of a
            `ClassCriterion`, whose references are the batch.
        penalizes: what `penalty_of` is a mean over: ``"samples"``, or ``"classes"`` of a `ClassCriterion`.
        takes_references: False for a loss that is defined within a batch.
        averagings: the words that `reduction` takes.
        differentiates: False if the gradient is by definition not the value's derivative.
        shown: names of hyper-parameters that `repr` shows.

    Shape:
        - embeddings: (N, D), float16 to float64. labels: (N,), integers.
        - ref_emb: (M, D) and ref_labels: (M,), optional.
        - output: (), or (N,) with ``reduction="none"``; float32, or float64 for float64 inputs.

    Raises:
        TypeError: an argument of a wrong type, named, before any work.
        ValueError: an argument out of its range, or an unknown word, named, before any work.
        RuntimeError: in a call, a named `impl` that cannot run on the inputs' device, with every reason.

    Examples:
        >>> class HighestNegative(flashpair.Criterion):
        ...     def row_losses(self, pairs):
        ...         (highest,) = pairs.reduce(flashpair.Reduction("max", "negatives"))
        ...         return flashpair.RowLosses(highest, pairs.num_negatives() > 0, highest.shape[0])
        >>> criterion = HighestNegative(normalize=True, reduction="mean", impl="auto")
        >>> x = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0], [-0.8, 0.6]])
        >>> labels = torch.tensor([0, 0, 1, 1])
        >>> round(criterion(x, labels).item(), 4)
        0.4
    """

    anchors = "samples"
    penalizes = "samples"
    distance = "dot"
    takes_references = True
    averagings: tuple[str, ...] = AVERAGINGS[:5]
    differentiates = True  # False: the gradient is by definition not the value's derivative

    def __init__(self, *, normalize: bool, reduction: str, impl: str) -> None:
        super().__init__()
        if not isinstance(normalize, bool):
            raise TypeError(f"normalize must be a bool, got {type(normalize).__name__} {normalize!r}")
        check_name(impl)
        self._check_distance(self.distance)
        self.normalize = normalize
        self.reduction = checks.word(reduction, self.averagings, "reduction")
        self.impl = impl

    @property
    def preparation(self) -> tuple[bool, Callable[[Tensor], Tensor] | None]:
        """Whether rows are normalised, and a function that replaces normalisation (None: there is none).

        A subclass overrides it to transform embeddings and references, (n, D) to (n, D'), before they are compared.
        """
        return self.normalize, None

    def pairs_of(self, x: Tensor, labels: Tensor, y: Tensor | None, ref_labels: Tensor | None, impl: str) -> PairAccess:
        """The pairs of a call, whose arguments are those that `check` returns.

        Args:
            x: (N, D), the embeddings.
            labels: (N,) int64.
            y: (M, D), the references, or None.
            ref_labels: (M,) int64, or None.
            impl: the implementation to use.
        """
        self._check_distance(self.distance)
        x, y, normalize = self.prepared(x, y)
        return checked_pairs(x, labels, y, ref_labels, self.distance, normalize, impl)

    def prepared(self, x: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor | None, bool]:
        """Embeddings x (N, D) and references y (M, D) after `preparation`, and whether to normalise them afterwards."""
        normalize, prepare = self.preparation
        if prepare is None:
            return x, y, normalize
        x, y = upcast(x, y)
        name = type(self).__name__
        prepared_x = checked_prepared(prepare(x), x, name)
        return prepared_x, None if y is None else checked_prepared(prepare(y), y, name), normalize

    def row_losses(self, pairs: PairAccess) -> RowLosses:
        """The loss of each row; every subclass defines it.

        Args:
            pairs: a `PairAccess`, or a `PairReducer` where processes share class weights; `pairs.reduce` gives row
                values (N,), in the order of ``pairs.labels``.

        Returns:
            `RowLosses`, in the same order.
        """
        raise NotImplementedError(
            f"{type(self).__name__} has no row_losses(self, pairs); define one that returns RowLosses"
        )

    # For the error if a subclass does not call this `__init__`: an attribute that it sets, and its arguments.
    init_sets, init_takes = "impl", "normalize=..., reduction=..., impl=..."

    def __init_subclass__(cls) -> None:
        """Checks a subclass: its `distance` is known, and its `__init__` calls its parent's.

        A subclass that defines `row_losses` does not inherit its parent's `row_formula`.
        """
        super().__init_subclass__()
        if "__init__" in cls.__dict__:
            cls.__init__ = checks.after_init(cls, cls.init_sets, cls.init_takes)  # type: ignore[method-assign]
        if not isinstance(cls.distance, property):
            cls._check_distance(cls.distance)
        if "row_losses" in cls.__dict__ and "row_formula" not in cls.__dict__:
            cls.row_formula = Criterion.row_formula  # type: ignore[method-assign]

    @classmethod
    def _check_distance(cls, distance: Any) -> None:
        if distance not in DISTANCES:
            hint = '; cosines are "dot" with normalize=True' if distance == "cosine" else ""
            raise ValueError(
                f"distance of {cls.__name__} must be one of {', '.join(DISTANCES)}, got {distance!r}{hint}"
            )

    def row_formula(self) -> RowFormula | None:
        """The formula of the loss, if kernels can compute the whole loss from it; None (the default): they cannot."""
        return None

    penalizes_references = False

    def penalty_of(
        self, x: Tensor, labels: Tensor, y: Tensor | None, ref_labels: Tensor | None, chosen: ClassPairs | None = None
    ) -> Penalty | None:
        """A penalty on the embeddings before normalisation, whose mean is added to every valid row's loss.

        Args:
            x: (N, D), the embeddings.
            labels: (N,) int64.
            y: (M, D) or None, the references.
            ref_labels: (M,) int64 or None.
            chosen: for a loss of one pair of each class, which pairs take part, if this depends on other processes'
                samples.

        Returns:
            A `Penalty`, a sum and over how many it is a mean; None (the default): there is no penalty.
        """
        return None

    def checked_row_losses(self, pairs: PairReducer) -> RowLosses:
        """`row_losses`, whose result is checked."""
        return checked_rows(
            self.row_losses(cast(PairAccess, pairs)), type(self).__name__, pairs.count, pairs.labels.device
        )

    def regularizer(self, x: Tensor, labels: Tensor, y: Tensor | None, ref_labels: Tensor | None) -> Tensor | None:
        """The mean () of `penalty_of`, which is added to the loss of every valid row, or None."""
        penalty = checked_penalty(self.penalty_of(x, labels, y, ref_labels), type(self).__name__)
        return None if penalty is None else penalty.total / penalty.number.clamp_min(1)

    def forward(
        self, embeddings: Tensor, labels: Tensor, *tuples: Any, ref_emb: Tensor | None = None,
        ref_labels: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """The loss of a batch.

        With references, an anchor's pairs are with all references, even with one that equals the anchor. Without them,
        its pairs are with the rest of the batch. The loss is computed in float32, or in float64 for float64 inputs,
        also under autocast.

        Args:
            embeddings: (N, D), float16 to float64.
            labels: (N,), integers.
            tuples: not taken; the error explains where miners' tuples went.
            ref_emb: (M, D), `References` or `StreamedReferences` (which bring their labels); None: the batch itself.
            ref_labels: (M,), integers, with a tensor as `ref_emb`.

        Returns:
            A scalar, or (N,) with ``reduction="none"``.

        Raises:
            TypeError: embeddings or labels of a wrong type, or a miner's tuples.
            ValueError: shapes or devices that do not fit, or references for a loss that takes none.
            RuntimeError: a named `impl` that cannot run here, with every reason.
        """
        if tuples:
            raise TypeError(
                f"{type(self).__name__} takes no tuples of indices, got {len(tuples)} more argument(s): mining "
                "is an option of the loss (epsilon, triplets, ...), so leave the miner out; references go by name, "
                "ref_emb= and ref_labels="
            )
        if isinstance(ref_emb, StreamedReferences):
            return self._streamed(embeddings, labels, ref_emb, ref_labels)
        batch = self.check(embeddings, labels, ref_emb, ref_labels)
        if autocasts(batch[0].device.type):
            with no_autocast(batch[0].device.type):
                return self._loss(*batch)
        return self._loss(*batch)

    def check(
        self, embeddings: Any, labels: Any, ref_emb: Any, ref_labels: Any
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Checks the arguments of a call.

        Returns:
            Embeddings, labels as int64, references and their labels (or None).

        Raises:
            TypeError: an argument of a wrong type, named.
            ValueError: shapes or devices that do not fit, or references for a loss that takes none.
        """
        batch = checks.batch(embeddings, labels, ref_emb, ref_labels)
        checks.parameters(self, batch[0])
        if ref_emb is not None:
            self.check_references()
        return batch

    def check_references(self) -> None:
        if not self.takes_references:
            raise ValueError(
                f"{type(self).__name__} is defined within a batch and takes no references: ref_emb must be None"
            )

    def _loss(self, x: Tensor, labels: Tensor, y: Tensor | None, ref_labels: Tensor | None) -> Tensor:
        extra = self._extra(x, labels, y, ref_labels)
        plan = small_batch.plan(
            self.impl, self.row_formula(), x, y, reduction=self.reduction, normalize=self.normalize,
            distance=self.distance, penalty=extra is not None,
        )  # fmt: skip
        if plan is not None:
            dense = None if torch.compiler.is_compiling() else functools.partial(self._dense, labels, ref_labels)
            return small_batch.loss(plan, x, labels, y, ref_labels, extra, dense)
        return self._by_rows(x, labels, y, ref_labels, extra, self.impl)

    def _extra(self, x: Tensor, labels: Tensor, y: Tensor | None, ref_labels: Tensor | None) -> Tensor | None:
        return checked_extra(self.regularizer(x, labels, y, ref_labels), type(self).__name__, x)

    def _streamed(self, embeddings: Tensor, labels: Tensor, refs: StreamedReferences, ref_labels: Any) -> Tensor:
        if ref_labels is not None:
            raise ValueError("ref_labels must be None if ref_emb is a StreamedReferences, which has labels of its own")
        self.check_references()
        refuse_own(self, AT_ONCE, "StreamedReferences")
        if self.penalizes_references:
            raise ValueError(f"ref_emb must be one tensor, because {type(self).__name__} has a penalty on references")
        x, labels, _, _ = self.check(embeddings, labels, None, None)
        with no_autocast(x.device.type):
            pairs = refs.pairs(x, labels, self.distance, *self.preparation, self.impl)
            loss = self.of_chunks(x, labels, pairs)
            return loss + pairs.ref_source.nonfinite

    def of_chunks(self, x: Tensor, labels: Tensor, pairs: PairAccess) -> Tensor:
        """The loss of embeddings x (N, D) with labels (N,) whose references come in chunks."""
        rows = self.checked_row_losses(pairs)
        loss = reduce_losses(rows, self.reduction, pairs, self._extra(x, labels, None, None))
        return loss + self.not_finite(x, None).to(loss.dtype)

    def _by_rows(
        self, x: Tensor, labels: Tensor, y: Tensor | None, ref_labels: Tensor | None, extra: Tensor | None, impl: str
    ) -> Tensor:
        name = type(self).__name__
        rows, pairs = checked_call(self.rows(x, labels, y, ref_labels, impl), name)
        checked_rows(rows, name, x.shape[0] if pairs is None else pairs.count, x.device)
        loss = reduce_losses(rows, self.reduction, pairs, extra)
        return loss + self.not_finite(x, y).to(loss.dtype)

    def not_finite(self, x: Tensor, y: Tensor | None) -> Tensor:
        """0, or NaN if an embedding or reference is not finite. It is added to the loss, as rows may not show it."""
        return nan_unless_finite(x, y)

    def rows(
        self, x: Tensor, labels: Tensor, y: Tensor | None, ref_labels: Tensor | None, impl: str
    ) -> tuple[RowLosses, PairAccess | None]:
        """The row losses of a call, and the pairs, which know the order of rows.

        If the pairs are None, rows are in the caller's order. Arguments are those of `pairs_of`.
        """
        pairs = self.pairs_of(x, labels, y, ref_labels, impl)
        return self.row_losses(pairs), pairs

    def _dense(self, labels: Tensor, ref_labels: Tensor | None, x: Tensor, y: Tensor | None) -> Tensor:
        """The loss without its regularizer, by the reference, for second derivatives."""
        return self._by_rows(x, labels, y, ref_labels, None, "reference")

    def hyperparameters(self) -> dict[str, Any]:
        """The names and values of hyper-parameters, for `repr`."""
        return {name: getattr(self, name) for name in self.shown}

    shown: tuple[str, ...] = ()

    def extra_repr(self) -> str:
        values = {**self.hyperparameters(), "normalize": self.normalize, "reduction": self.reduction, "impl": self.impl}
        return ", ".join(f"{k}={v.item() if isinstance(v, Tensor) else v!r}" for k, v in values.items())
