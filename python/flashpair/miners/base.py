"""What every miner shares: checks, and the pairs a block of anchors at a time, so that no N x M matrix exists."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from ..core import checks
from ..core.similarity import alike, copies, dense_pairs, l2_normalize, nan_unless_finite, upcast
from ..engine.cached_references import References

BLOCK_BYTES = 2**23  # of similarities that exist at a time; with what is made of them up to eight times that


class MinedPairs(NamedTuple):
    """Positive pairs ``(a1[k], p[k])`` and negative pairs ``(a2[k], n[k])``, as indices on the embeddings' device.

    `MultiSimilarityMiner` returns them.

    Attributes:
        a1: int64 (P,), anchors of the positive pairs, indices into the embeddings.
        p: int64 (P,), their positives, indices into the references.
        a2: int64 (Q,), anchors of the negative pairs.
        n: int64 (Q,), their negatives, indices into the references.
    """

    a1: Tensor
    p: Tensor
    a2: Tensor
    n: Tensor


class Triplets(NamedTuple):
    """Anchor, positive and negative of each triplet, as indices on the embeddings' device.

    `TripletMarginMiner`, `BatchHardMiner` and `DistanceWeightedMiner` return them.

    Attributes:
        a: int64 (T,), anchors, indices into the embeddings.
        p: int64 (T,), positives, indices into the references.
        n: int64 (T,), negatives, indices into the references.
    """

    a: Tensor
    p: Tensor
    n: Tensor


class Block(NamedTuple):
    """Anchors ``first`` to ``first + B`` against all M references: what `mine` of a `Miner` gets.

    Attributes:
        first: the index of the first anchor.
        z: (B, M) similarities or distances, float32 or float64.
        positives: (B, M) bool, without self pairs.
        negatives: (B, M) bool.
        width: D, of the embeddings.
    """

    first: int
    z: Tensor
    positives: Tensor
    negatives: Tensor
    width: int


ALIKE = {MinedPairs: (("a1", "p"), ("a2", "n")), Triplets: (("a", "p"), ("a", "n"))}  # fields of one length
Mined = TypeVar("Mined", MinedPairs, Triplets)


def chunk(m: int, itemsize: int) -> int:
    """How many rows of M numbers take BLOCK_BYTES; at least one."""
    return max(1, BLOCK_BYTES // max(1, m * itemsize))


class _Indices:
    """An int64 vector that grows at its end, in pages.

    A list of every block's small results would not do: they lie where the block's large temporaries have been, and an
    allocator that cannot put the next ones there asks for more, block after block.
    """

    def __init__(self, device: torch.device) -> None:
        self.pages = [torch.empty(0, dtype=torch.int64, device=device)]
        self.used, self.count = 0, 0  # of the last page, of all

    def extend(self, more: Tensor) -> None:
        last = self.pages[-1]
        fits = min(more.shape[0], last.shape[0] - self.used)
        last[self.used : self.used + fits] = more[:fits]
        self.used, self.count = self.used + fits, self.count + more.shape[0]
        if rest := more.shape[0] - fits:
            page = last.new_empty(max(rest, min(self.count, BLOCK_BYTES // last.itemsize)))
            page[:rest] = more[fits:]
            self.pages.append(page)
            self.used = rest

    def whole(self) -> Tensor:
        return torch.cat([*self.pages[:-1], self.pages[-1][: self.used]])


class Miner(Generic[Mined]):
    """Base of the miners, which return indices of pairs or triplets; a subclass selects those of a block in `mine`.

    All decisions on a block are taken from the same numbers. Their last bits can differ between block sizes, and from a
    loss's own, so a pair that is at its threshold to the last bit can fall on either side. Equal references are equally
    near.

    Args:
        normalize: L2-normalise embeddings and references first; a zero row stays zero.

    Shape:
        - embeddings: (N, D), float16 to float64. labels: (N,), integers.
        - ref_emb: (M, D) and ref_labels: (M,), optional.
        - output: `MinedPairs` or `Triplets`, as the class attribute ``mined`` says.

    Raises:
        TypeError: `normalize` is not a bool, or ``mined`` of a subclass is neither of the two.

    Examples:
        >>> class EveryNegative(flashpair.miners.Miner):
        ...     mined = flashpair.miners.MinedPairs
        ...     def mine(self, block):
        ...         none = block.positives.new_zeros(0, dtype=torch.int64)
        ...         a, n = block.negatives.nonzero(as_tuple=True)
        ...         yield self.mined(none, none, a + block.first, n)
        >>> EveryNegative(normalize=True)(torch.eye(3), torch.tensor([0, 0, 1])).n.tolist()
        [2, 2, 0, 1]
    """

    distance = "dot"
    shown: tuple[str, ...] = ()
    mined: type[Mined]

    def __init__(self, *, normalize: bool) -> None:
        self.normalize = checks.flag(normalize, "normalize")

    def __init_subclass__(cls) -> None:
        """A subclass says what it mines, and its `__init__` calls its parent's."""
        super().__init_subclass__()
        if "mine" in cls.__dict__ and getattr(cls, "mined", None) not in (MinedPairs, Triplets):
            raise TypeError(f"{cls.__name__}.mined must be MinedPairs or Triplets, which mine yields")
        if "__init__" in cls.__dict__:
            cls.__init__ = checks.after_init(cls, "normalize", "normalize=...")  # type: ignore[method-assign]

    def __call__(
        self, embeddings: Tensor, labels: Tensor, ref_emb: Tensor | References | None = None,
        ref_labels: Tensor | None = None,
    ) -> Mined:  # fmt: skip
        """Everything that is mined, ordered by anchor, then by reference (triplets: by positive, then by negative).

        Memory is twice the result plus some eight times BLOCK_BYTES (or a row of M, if that is more), whatever N is. On
        a GPU the host waits for it. No gradient flows.

        Args:
            embeddings: (N, D), float16 to float64; similarities are float32, or float64 if either side is.
            labels: (N,), integers.
            ref_emb: (M, D), a tensor or `References`, none of which is taken for an anchor itself; None: the rest of
                the embeddings.
            ref_labels: (M,), integers, with a tensor as `ref_emb`.

        Returns:
            `MinedPairs` or `Triplets`, int64 indices on the embeddings' device.

        Raises:
            TypeError: an argument of a wrong type, named.
            ValueError: shapes or devices that do not fit; embeddings that are not finite, which have no order.
        """
        blocks = self.blocks(embeddings, labels, ref_emb, ref_labels)
        fields = [_Indices(labels.device) for _ in self.mined._fields]
        for mined in blocks:
            for indices, more in zip(fields, mined, strict=True):
                indices.extend(more)
        return self.mined(*(indices.whole() for indices in fields))

    def blocks(
        self, embeddings: Tensor, labels: Tensor, ref_emb: Tensor | References | None = None,
        ref_labels: Tensor | None = None,
    ) -> Iterator[Mined]:  # fmt: skip
        """The result of a call in parts, in the same order: what is mined of a block of anchors, or of some of their
        positives.

        Concatenated, the parts are what a call returns; any can be empty. Arguments are checked before the first.

        Args:
            embeddings: as in a call.
            labels: as in a call.
            ref_emb: as in a call.
            ref_labels: as in a call.

        Returns:
            An iterator of `MinedPairs` or `Triplets`.

        Raises:
            TypeError: as a call.
            ValueError: as a call.
        """
        rows = self.rows(embeddings, labels, ref_emb, ref_labels)
        return (self._checked(mined) for block in rows for mined in self._mined(block))

    def _mined(self, block: Block) -> Iterator[Mined]:
        results = self.mine(block)
        if not isinstance(results, Iterable) or isinstance(results, tuple):
            name = type(self).__name__
            raise TypeError(
                f"mine of {name} must yield {self.mined.__name__} by and by, as a generator, got {checks.what(results)}"
            )
        return iter(results)

    def _checked(self, mined: Any) -> Mined:
        """What a `mine`, a user's own too, has yielded, or the error that says what is wrong with it."""
        name, kind = type(self).__name__, self.mined
        if not isinstance(mined, kind):
            raise TypeError(f"mine of {name} must yield {kind.__name__}, got {checks.what(mined)}")
        for field, t in zip(kind._fields, mined, strict=True):
            if not isinstance(t, Tensor) or t.dtype != torch.int64 or t.dim() != 1:
                raise TypeError(
                    f"{field} of the {kind.__name__} of {name} must be an int64 tensor of one dimension, got "
                    f"{checks.what(t)}"
                )
        lengths = dict(zip(kind._fields, map(len, mined), strict=True))
        if any(lengths[a] != lengths[b] for a, b in ALIKE[kind]):
            raise ValueError(f"the {kind.__name__} of {name} must have one length for each kind of pair, got {lengths}")
        return mined

    def mine(self, block: Block) -> Iterator[Mined]:
        """Yields what is mined of `block`, in parts of any size; every subclass defines it.

        Args:
            block: a `Block`. Anchors are counted from the first of all: add ``block.first``.

        Returns:
            An iterator of `MinedPairs` or `Triplets`, as the class attribute ``mined`` says.
        """
        raise NotImplementedError

    def rows(
        self, embeddings: Any, labels: Any, ref_emb: Any, ref_labels: Any, first: int = 0, count: int | None = None
    ) -> Iterator[Block]:
        """Blocks of the anchors `first` to ``first + count`` (None: to the end)."""
        x, labels, y, ref_labels = checks.batch(embeddings, labels, ref_emb, ref_labels)
        x, y = upcast(x.detach(), None if y is None else y.detach())
        if self.normalize:
            x, y = l2_normalize(x), None if y is None else l2_normalize(y)
        for name, rows in (("embeddings", x), ("ref_emb", y)):
            if rows is not None and nan_unless_finite(rows, None).isnan():
                raise ValueError(f"{name} must be finite, got NaN, infinite or overflowing entries")
        last = x.shape[0] if count is None else min(first + count, x.shape[0])
        return self._rows(x, labels, y, labels if ref_labels is None else ref_labels, first, last)

    def _rows(
        self, x: Tensor, labels: Tensor, y: Tensor | None, ref_labels: Tensor, first: int, last: int
    ) -> Iterator[Block]:
        refs = x if y is None else y
        if refs.shape[0] == 0:
            return
        size = chunk(refs.shape[0], refs.itemsize)
        twins = copies(refs) if self.distance == "dot" else None
        for at in range(first, last, size):
            end = min(at + size, last)
            z = alike(dense_pairs(x[at:end], refs, self.distance), twins)
            positives = labels[at:end, None] == ref_labels[None, :]
            negatives = ~positives
            if y is None:
                positives.diagonal(at).fill_(False)
            yield Block(at, z, positives, negatives, x.shape[1])

    def hyperparameters(self) -> dict[str, object]:
        """Name and value of what the constructor took, for `repr`."""
        return {name: getattr(self, name) for name in (*self.shown, "normalize")}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in self.hyperparameters().items())})"
