"""What losses reduce: the pairs of anchors (rows) and references, wherever these are.

PairReducer   row reductions, counts, sums over the batch, the order of rows: what every source of pairs has
└─ PairAccess   single pairs by index: positives one by one, one pair of each class, sums of two rows
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
    """A method under its old name, which works for one more release."""

    def method(self: Any, *args: Any) -> Any:
        warnings.warn(f"pairs.{old} is now pairs.{new}", DeprecationWarning, stacklevel=2)
        return getattr(self, new)(*args)

    method.__doc__ = f"The old name of `{new}`, deprecated."
    return method


class PairReducer(ABC):
    """Anchors against references: what a loss may ask of any source of pairs, as `make_pairs` returns one.

    Row values stand in the order of `labels`, which is the source's own; `restore` puts them into the caller's.

    Attributes:
        labels: (N,) int64, of the anchors, in the order of the rows.
        square: the references are the anchors, none of which is a pair with itself.
        distance: ``"dot"``, ``"euclidean"`` or ``"squared_euclidean"``.
    """

    labels: Tensor
    square: bool
    distance: str
    limit = "is not available here"  # the end of the error for what a source cannot give

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

    @abstractmethod
    def num_positives(self) -> Tensor:
        """How many positives each row has (N,) int64."""

    @abstractmethod
    def num_negatives(self) -> Tensor:
        """How many negatives each row has (N,) int64."""

    def squared_norms(self) -> Tensor:
        """Squared norms of the rows (N,)."""
        self._refuse("squared_norms")

    def restore(self, values: Tensor) -> Tensor:
        """Row values (N,) in the caller's order."""
        self._refuse("restore")

    def arrange(self, values: Tensor) -> Tensor:
        """Values (N,) in the caller's order, in the order of the rows: the inverse of `restore`."""
        self._refuse("arrange")

    def arrange_refs(self, values: Tensor) -> Tensor:
        """Values (M,) of the references in the caller's order, in the order of `ref_labels`."""
        self._refuse("arrange_refs")

    def batch_sum(self, values: Tensor) -> Tensor:
        """The sum over all rows of values (..., N); over all processes' rows where they share the batch."""
        return values.sum(-1)

    def batch_logsumexp(self, values: Tensor) -> Tensor:
        """The log-sum-exp () of values (N,), which may be -inf; over all processes' rows where they share the batch."""
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

    `row_losses` of a `Criterion` receives one. A source says which references are each row's positives
    (`positive_places`) and what their similarities are (`similarities_at`); `positives` is made of these two.
    """

    nonfinite: Tensor  # () 0, or NaN where an embedding is not finite: added to what is read

    @abstractmethod
    def positive_places(self, places: range) -> Tensor:
        """Which references are each row's positives (N, K), of these K places of its list.

        Beyond the end of the list: anything that `similarities_at` takes.
        """

    @abstractmethod
    def similarities_at(self, refs: Tensor) -> Tensor:
        """z (N, K) of each row with K references (N, K), by their index; differentiable."""

    def most_positives(self, most: int | None = None) -> int:
        """The largest number of positives of a row, at least 1; `most` if it is given. Otherwise the host waits for the
        count.
        """
        if most is not None:
            return most
        if torch.compiler.is_compiling():  # which then leaves this call to Python, or, to be one graph, fails
            raise RuntimeError("max_positives must be given where the call is to be one compiled graph, got None")
        if self.labels.device.type == "meta":
            raise RuntimeError(
                "max_positives must be given for meta tensors, whose positives cannot be counted, got None"
            )
        return max(1, int(self.num_positives().amax())) if self.count else 1

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
        most = self.most_positives(most)
        block = range(most) if block is None else block
        z, count = self.similarities_at(self.positive_places(block)), self.num_positives()
        there = torch.arange(block.start, block.stop, device=z.device) < count[:, None]
        lost = torch.where(count > most, torch.nan, 0.0).to(z.dtype)
        return torch.where(there, z, 0.0) + lost[:, None] + self.nonfinite, there

    @abstractmethod
    def class_pairs(self) -> ClassPairs:
        """One anchor and one positive of each class."""

    @abstractmethod
    def take_pairs(self, chosen: ClassPairs) -> PairAccess:
        """The pairs of the chosen anchors with the chosen positives: row k has reference k as its one positive, and the
        others as negatives.

        Args:
            chosen: what `class_pairs` returned, or a choice of one's own.
        """

    def matched_similarities(self) -> Tensor:
        """z_kk (N,) of pairs whose rows and references belong together one by one, as `take_pairs` gives them."""
        self._refuse("matched_similarities")

    def pair_sum_blocks(self, most: int) -> list[range]:
        """The steps of `pair_sums` that visit every pair of rows with up to `most` positives, in small blocks."""
        return cut(range(1, (most + 1) // 2 + 1), STEPS)

    def pair_sums(self, step: int) -> tuple[PairReducer, Tensor, Tensor, Tensor]:
        """Rows x_i + x_p of a square problem, where p follows i by `step` places around its class.

        Steps 1 to (K + 1) // 2 visit every unordered pair of a class of K + 1 once.

        Args:
            step: from 1 on.

        Returns:
            The pairs of these rows with all samples; z_ip (N,); p (N,); and a bool (N,), where i and p differ and i
            comes first.
        """
        self._refuse("pair_sums")

    def symmetrize(self, values: Tensor, other: Tensor, first: Tensor) -> Tensor:
        """Adds values (N,) of `pair_sums`'s unordered pairs to both ends: each row, where `first`, and row `other`."""
        values = torch.where(first, values, 0.0)
        return values + torch.empty_like(values).index_copy(0, other, values)

    paired = _old_name("paired", "matched_similarities")
    draw = _old_name("draw", "class_pairs")
    sum_blocks = _old_name("sum_blocks", "pair_sum_blocks")
    sums = _old_name("sums", "pair_sums")
    at_both_ends = _old_name("at_both_ends", "symmetrize")

    def select(self, rows: Tensor, refs: Tensor, labels: Tensor, count: Tensor) -> PairAccess:
        """The old form of `take_pairs`, deprecated."""
        warnings.warn("pairs.select is now pairs.take_pairs", DeprecationWarning, stacklevel=2)
        return self.take_pairs(ClassPairs(rows, refs, labels, count))


class DensePairs(PairAccess):
    """Pairs whose similarities are stored.

    Attributes:
        z: (N, M), similarities or distances; gradients flow into it.
    """

    z: Tensor


def class_partners(lo: Tensor, hi: Tensor, step: int) -> tuple[Tensor, Tensor, Tensor]:
    """The partners of sorted rows whose classes are rows [lo, hi), `step` places further around the class.

    Returns:
        The rows (N,); their partners (N,); and whether no other row has the same pair (N,): in a class of even size,
        pairs of opposite places come up twice.
    """
    i = torch.arange(lo.shape[0], device=lo.device)
    size = hi - lo
    partner = lo + (i - lo + step) % size
    return i, partner, (2 * step < size) | ((2 * step == size) & (i < partner))
