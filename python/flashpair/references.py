"""References that stay the same from call to call: sorted, normalised and rounded to int8 once."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import checks
from .rows import sorted_rows


class Ordered(NamedTuple):
    """References by label: the caller's index of each (M,), labels (M,), rows (M, D)."""

    order: Tensor
    labels: Tensor
    rows: Tensor


class References(checks.Labelled):
    """Embeddings (M, D) with labels (M,), for many calls: ``criterion(x, labels, ref_emb=References(y, y_labels))``.

    They stand where `ref_emb` does, and bring their own labels. What a call does to references alone (sorting them by
    label, normalising them, rounding them to int8 for `screened`) is done at the first call and kept, in one more copy
    and a quarter. Changing the tensors in place is seen, and it is done anew. No gradient reaches them.

    Args:
        embeddings: (M, D), float16 to float64.
        labels: (M,), integers.

    Raises:
        TypeError, ValueError: as a criterion's `ref_emb` and `ref_labels`.
    """

    def __init__(self, embeddings: Tensor, labels: Tensor) -> None:
        self.embeddings = checks.embeddings(embeddings, "ref_emb", "M, D").detach()
        self.labels = checks.labels(labels, self.embeddings, "ref_labels", "M", "ref_emb")
        self._source = labels
        self._kept: dict[tuple[Any, ...], Ordered] = {}
        self._versions = self._version()
        self.embeddings.__dict__[_OWNER] = self

    def __len__(self) -> int:
        return self.embeddings.shape[0]

    def _version(self) -> tuple[int, int]:
        return self.embeddings._version, self._source._version

    def ordered(self, dtype: torch.dtype, unit: bool, impl: str) -> Ordered:
        """In the order of their labels, in that dtype, of unit norm if `unit`."""
        if self._version() != self._versions:
            self.labels = self._source.to(torch.int64)
            self._kept.clear()
            self._versions = self._version()
        key = (dtype, unit, impl)
        if key not in self._kept:
            labels, order = torch.sort(self.labels, stable=True)
            rows = sorted_rows(self.embeddings.to(dtype), order, unit=unit, impl=impl)
            rows.__dict__[_ROUNDED] = {}
            self._kept[key] = Ordered(order, labels, rows)
        return self._kept[key]


_OWNER, _ROUNDED = "_flashpair_references", "_flashpair_rounded"  # attributes of the tensors that are kept


def owner(y: Tensor | None) -> References | None:
    """The References whose embeddings `y` are, if it is any's."""
    if y is None or torch.compiler.is_compiling():
        return None
    return y.__dict__.get(_OWNER)


def rounded(rows: Tensor | None) -> dict[Any, Any] | None:
    """Where int8 forms of `rows` are kept: of References' ordered rows; None for others."""
    return None if rows is None else rows.__dict__.get(_ROUNDED)
