"""The interface through which losses see pairs of anchors (rows) and references, wherever the references are.

PairReducer     row reductions, counts, sums over the batch and the order of rows, which every kind of pairs has
└─ PairAccess   also single pairs by index: the list of positives, one pair of each class, sums of two rows
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor

from .class_pairs import ClassPairs
from .positives import PLACES, STEPS, cut
from .reduction import Reduction
from .similarity import masked_logsumexp


def _old_name(old: str, new: str) -> Callable[..., Any]:
    """A method under its old name, which works for one more release and warns."""

    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        warnings.warn(f"pairs.{old} is now pairs.{new}", DeprecationWarning, stacklevel=2)
        return getattr(self, new)(*args, **kwargs)

    method.__doc__ = f"The old name of `{new}`, deprecated."
    return method


class PairReducer(ABC):
    """Anchors against references: what a loss may ask of any source of pairs, as `make_pairs` returns one.

    Row values stand in the order of `labels`; `restore` puts them into the caller's order.

    Attributes:
        labels: (N,) int64, of the anchors, in the order of the rows.
        square: the references are the anchors, and no anchor is a pair with itself.
        distance: ``"dot"``, ``"euclidean"`` or ``"squared_euclidean"``.
    """

    labels: Tensor
    square: bool
    distance: str
    limit = "is not available here"  # how the error ends where a method is not available

    @property
    @abstractmethod
    def count(self) -> int:
        """The number of rows, N."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """The dtype of row values."""

    @property
    @abstractmethod
    def ref_labels(self) -> Tensor:
        """(M,) int64, of the references."""

    @abstractmethod
    def reduce(self, *reductions: Reduction) -> tuple[Tensor, ...]:
        """The values of some reductions, one tensor (N,) for each. Reductions of one call share their passes.

        Args:
            reductions: one or more `Reduction`s; vectors in them are in the order of ``labels`` (``ref_labels``).

        Returns:
            A tuple of tensors (N,), float32 or float64, in the order of ``labels``.

        Raises:
            TypeError: an argument is not a Reduction, or has a value of a wrong type.
            ValueError: there is no reduction, or a vector has another length or device.
            RuntimeError: the `impl` that the caller named cannot compute these reductions; the error gives all reasons.
        """

    @abstractmethod
    def num_positives(self) -> Tensor:
        """The number of positives of each row, (N,) int64."""

    @abstractmethod
    def num_negatives(self) -> Tensor:
        """The number of negatives of each row, (N,) int64."""

    def squared_norms(self) -> Tensor:
        """The squared norms of the rows, (N,)."""
        self._refuse("squared_norms")

    def restore(self, values: Tensor) -> Tensor:
        """Puts row values (N,) into the caller's order."""
        self._refuse("restore")

    def arrange(self, values: Tensor) -> Tensor:
        """Puts values (N,) from the caller's order into the order of the rows: the inverse of `restore`."""
        self._refuse("arrange")

    def arrange_refs(self, values: Tensor) -> Tensor:
        """Puts values (M,) of the references from the caller's order into the order of `ref_labels`."""
        self._refuse("arrange_refs")

    def batch_sum(self, values: Tensor) -> Tensor:
        """The sum over all rows of values (..., N); where processes share the batch, over all processes' rows."""
        return values.sum(-1)

    def batch_logsumexp(self, values: Tensor) -> Tensor:
        """The log-sum-exp () over all rows of values (N,), which may be -inf; rows are those of `batch_sum`."""
        return masked_logsumexp(values[None], (values != -torch.inf)[None])[0]

    def _refuse(self, name: str) -> NoReturn:
        raise RuntimeError(f"pairs.{name} {self.limit}")

    total = _old_name("total", "batch_sum")
    total_logsumexp = _old_name("total_logsumexp", "batch_logsumexp")
    squares = _old_name("squares", "squared_norms")

    def __getattr__(self, name: str) -> Any:
        if hasattr(PairAccess, name) or name in ("x", "y", "refs", "dense"):
            raise AttributeError(f"pairs.{name} {self.limit}")
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")


class PairAccess(PairReducer):
    """A `PairReducer` whose pairs can also be read one by one, as `make_pairs` returns it.

    `row_losses` of a `Criterion` receives one. A subclass says which references are each row's positives
    (`positive_places`), and computes the similarities of given pairs (`similarities_at`). `positives` uses both.

    Attributes:
        nonfinite: () 0, or NaN if an embedding is not finite; it is added to the similarities that are read.
    """

    nonfinite: Tensor

    @abstractmethod
    def positive_places(self, places: range) -> Tensor:
        """The references at K places of each row's list of positives, (N, K) int64.

        Beyond the end of a row's list stands any number that `similarities_at` takes.
        """

    @abstractmethod
    def similarities_at(self, refs: Tensor) -> Tensor:
        """z (N, K) of each row with K references. refs: (N, K) int64, their indices. Differentiable."""

    def most_positives(self, most: int | None = None) -> int:
        """The largest number of positives that a row has, at least 1. The host waits for it, unless `most` is given."""
        if most is not None:
            return most
        if torch.compiler.is_compiling():  # torch.compile then breaks the graph here, or fails with fullgraph=True
            raise RuntimeError("max_positives must be given where the call is to be one compiled graph, got None")
        if self.labels.device.type == "meta":
            raise RuntimeError(
                "max_positives must be given for meta tensors, whose positives cannot be counted, got None"
            )
        return max(1, int(self.num_positives().amax())) if self.count else 1

    def positive_blocks(self, most: int) -> list[range]:
        """Splits `most` places into blocks. For one block `positives` needs memory linear in N."""
        return cut(range(most), PLACES)

    def positives(self, most: int | None = None, block: range | None = None) -> tuple[Tensor, Tensor]:
        """The similarities of each row's positives, padded to K places.

        Args:
            most: K; None: the largest number of positives that a row has, at least 1, for which the host waits. The
                results of a row with more than K positives are NaN.
            block: the places to return; None: all K.

        Returns:
            z (N, K), 0 in places without a positive, and a bool (N, K) that is true in places with one.
        """
        most = self.most_positives(most)
        block = range(most) if block is None else block
        z, count = self.similarities_at(self.positive_places(block)), self.num_positives()
        mask = torch.arange(block.start, block.stop, device=z.device) < count[:, None]
        too_many = torch.where(count > most, torch.nan, 0.0).to(z.dtype)
        return torch.where(mask, z, 0.0) + too_many[:, None] + self.nonfinite, mask

    @abstractmethod
    def class_pairs(self) -> ClassPairs:
        """One anchor and one positive of each class."""

    @abstractmethod
    def take_pairs(self, chosen: ClassPairs) -> PairAccess:
        """The pairs of the chosen anchors with the chosen positives.

        Reference k is the one positive of row k, and the other references are its negatives.

        Args:
            chosen: a result of `class_pairs`, or your own choice.
        """

    def matched_similarities(self) -> Tensor:
        """The similarity of row k and reference k, (N,), for pairs that `take_pairs` returned."""
        self._refuse("matched_similarities")

    def pair_sum_blocks(self, most: int) -> list[range]:
        """The steps of `pair_sums` that together visit every pair of positives, in blocks.

        Args:
            most: the largest number of positives that a row has.
        """
        return cut(range(1, (most + 1) // 2 + 1), STEPS)

    def pair_sums(self, step: int) -> tuple[PairReducer, Tensor, Tensor, Tensor]:
        """Pairs whose rows are sums x_i + x_p of two samples of a class.

        In a square problem, p is the sample that follows i by `step` places, cyclically within its class. Steps 1 to
        (K + 1) // 2 visit every unordered pair of a class of K + 1 samples once.

        Args:
            step: at least 1.

        Returns:
            The pairs of the rows x_i + x_p with all samples; z_ip (N,); p (N,) int64; and a bool (N,), which over all
            steps selects every unordered pair of two samples once. `symmetrize` gives its value to both samples.
        """
        self._refuse("pair_sums")

    def symmetrize(self, values: Tensor, other: Tensor, first: Tensor) -> Tensor:
        """Gives the values of unordered pairs to both of their rows.

        Args:
            values: (N,), a value for each row i of `pair_sums`.
            other: (N,) int64, p of `pair_sums`.
            first: (N,) bool, the last result of `pair_sums`; other values do not count.

        Returns:
            (N,), for each row the sum of the values of its pairs.
        """
        values = torch.where(first, values, 0.0)
        return values + torch.empty_like(values).index_copy(0, other, values)

    paired = _old_name("paired", "matched_similarities")
    draw = _old_name("draw", "class_pairs")
    sum_blocks = _old_name("sum_blocks", "pair_sum_blocks")
    sums = _old_name("sums", "pair_sums")
    at_both_ends = _old_name("at_both_ends", "symmetrize")

    def select(self, rows: Tensor, refs: Tensor, labels: Tensor, count: Tensor, source: Any = None) -> PairAccess:
        """The old form of `take_pairs`, deprecated."""
        warnings.warn("pairs.select is now pairs.take_pairs", DeprecationWarning, stacklevel=2)
        return self.take_pairs(ClassPairs(rows, refs, labels, count, source))


class DensePairs(PairAccess):
    """Pairs whose similarities are stored as a matrix.

    Attributes:
        z: (N, M), similarities or distances; gradients flow into it.
    """

    z: Tensor


def class_partners(lo: Tensor, hi: Tensor, step: int) -> tuple[Tensor, Tensor, Tensor]:
    """The partner of each sorted row: the row `step` places further, cyclically within its class.

    Args:
        lo: (N,) int64; the class of row i is rows [lo_i, hi_i).
        hi: (N,) int64, see `lo`.
        step: at least 1.

    Returns:
        The rows (N,), their partners (N,), and a bool (N,), which over all steps selects every unordered pair once. In
        a class of even size, rows at opposite places are each other's partners, and the first of the two is selected.
    """
    i = torch.arange(lo.shape[0], device=lo.device)
    size = hi - lo
    partner = lo + (i - lo + step) % size
    return i, partner, (2 * step < size) | ((2 * step == size) & (i < partner))
