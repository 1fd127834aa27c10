"""`References`, which stay the same from call to call: they are sorted, normalised and rounded to int8 once."""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backends.cpu.screened import keep_rounded
from ..core import checks
from ..core.tensor_cache import TensorCache
from .sorted_rows import sorted_rows

_owners: TensorCache[weakref.ref[References]] = TensorCache()  # by the embeddings that they hold


class Ordered(NamedTuple):
    """References sorted by label: the caller's index of each (M,), their labels (M,), and their embeddings (M, D)."""

    order: Tensor
    labels: Tensor
    rows: Tensor


def _tracked(t: Tensor) -> Tensor:
    """`t` without its graph. A tensor of inference mode is copied, because torch does not count changes of it."""
    with torch.inference_mode(False):
        return t.clone() if t.is_inference() else t.detach()


class References(checks.Labelled):
    """Embeddings (M, D) with labels (M,) that stay the same over many calls and are prepared once.

    They stand where `ref_emb` does and bring their own labels: ``criterion(x, labels, ref_emb=References(y,
    y_labels))``.

    The first call makes a sorted copy, one for each dtype and one each for normalised and plain rows. For `screened` on
    the CPU it also makes an int8 copy (a quarter of float32; half without VNNI). After a change in place by torch the
    copies are made anew. Changes through ``.data`` or NumPy are not noticed. Tensors that
    were made in inference mode are copied at once, so later changes of them have no effect. References get no gradient.

    Args:
        embeddings: (M, D), float16 to float64.
        labels: (M,), integers.

    Shape:
        - embeddings: (M, D), float16 to float64. labels: (M,), integers.

    Raises:
        TypeError: embeddings or labels of a wrong type.
        ValueError: shapes or devices that do not fit.

    Examples:
        >>> x = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0], [-0.8, 0.6]])
        >>> labels = torch.tensor([0, 0, 1, 1])
        >>> gallery = flashpair.References(torch.eye(2), torch.tensor([0, 1]))
        >>> round(flashpair.NTXentLoss(temperature=0.5)(x, labels, ref_emb=gallery).item(), 4)
        0.3065
    """

    def __init__(self, embeddings: Tensor, labels: Tensor) -> None:
        self.embeddings = _tracked(checks.embeddings(embeddings, "ref_emb", "M, D"))
        checks.labels(labels, self.embeddings, "ref_labels", "M", "ref_emb")
        self._source = _tracked(labels)
        self._forget()
        _owners[self.embeddings] = weakref.ref(self)

    def __len__(self) -> int:
        return self.embeddings.shape[0]

    def __reduce__(self) -> tuple[Any, ...]:
        return References, (self.embeddings.clone(), self._source)

    @property
    def labels(self) -> Tensor:  # type: ignore[override]
        """(M,) int64."""
        if torch.compiler.is_compiling():  # the versions of tensors are no constants of a graph
            return self._source.to(torch.int64)
        self._refresh()
        return self._labels

    def ordered(self, dtype: torch.dtype, normalize: bool, impl: str) -> Ordered:
        """The references in label order, from a copy that is kept.

        Args:
            dtype: the dtype of the rows.
            normalize: L2-normalise the rows.
            impl: the backend that will read them.
        """
        self._refresh()
        key = (dtype, normalize, impl == "fused")
        if key not in self._kept:
            with torch.inference_mode(False), torch.no_grad():  # so that training can use them
                labels, order = torch.sort(self._labels, stable=True)
                rows = sorted_rows(self.embeddings.to(dtype), order, normalize=normalize, impl=impl)
            keep_rounded(rows)
            self._kept[key] = Ordered(order, labels, rows)
        return self._kept[key]

    def _refresh(self) -> None:
        if (self.embeddings._version, self._source._version) != self._versions:
            self._forget()

    def _forget(self) -> None:
        self._kept: dict[tuple[Any, ...], Ordered] = {}
        self._versions = self.embeddings._version, self._source._version
        with torch.inference_mode(False):
            self._labels = self._source.to(torch.int64)


def owner(y: Tensor | None, labels: Tensor | None) -> References | None:
    """The `References` that hold exactly these tensors, y (M, D) and labels (M,); None: none does."""
    if y is None or torch.compiler.is_compiling():
        return None
    held_by = _owners.get(y)
    holder = None if held_by is None else held_by()
    return holder if holder is not None and holder.labels is labels else None
