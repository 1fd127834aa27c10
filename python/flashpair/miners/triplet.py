"""Triplets: the hardest of each anchor (Hermans et al., 2017, eq. 5), and those that violate a margin (Schroff et al.,
CVPR 2015, section 3.2), semi-hard ones among them.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..core import checks
from ..core.distances import ENGINE_WORDS, argument_word
from .base import Block, Miner, Triplets, chunk

TRIPLETS = ("semihard", "semihard_all", "hard_all", "violating")


class _TripletMiner(Miner[Triplets]):
    mined = Triplets

    def __init__(self, distance: str, *, normalize: bool) -> None:
        super().__init__(normalize=normalize)
        self.distance = ENGINE_WORDS[checks.word(distance, ("euclidean", "cosine"), "distance")]

    def apart(self, block: Block) -> Tensor:
        """(B, M): what grows with the distance, D itself or -s."""
        return -block.z if self.distance == "dot" else block.z

    def hyperparameters(self) -> dict[str, object]:
        return {**super().hyperparameters(), "distance": argument_word(self.distance)}


class BatchHardMiner(_TripletMiner):
    """For each anchor its farthest positive and its nearest negative (Hermans et al., 2017, eq. 5).

    These are the triplets of ``TripletMarginLoss(triplets="hard")``. Anchors without a positive or without a negative
    have none; of equally far references the lowest index is taken.

    Args:
        distance: ``"euclidean"`` (the default) or ``"cosine"``.
        normalize: L2-normalise embeddings and references first (the default).

    Shape:
        - embeddings: (N, D), float16 to float64. labels: (N,), integers.
        - ref_emb: (M, D) and ref_labels: (M,), optional.
        - output: `Triplets`, indices (T,), (T,), (T,), at most one for each anchor.

    Raises:
        TypeError: `normalize` is not a bool.
        ValueError: an unknown `distance`.

    Examples:
        >>> x = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0], [-0.8, 0.6]])
        >>> labels = torch.tensor([0, 0, 1, 1])
        >>> flashpair.miners.BatchHardMiner()(x, labels).n.tolist()
        [2, 2, 1, 1]
    """

    shown = ("distance",)

    def __init__(self, distance: str = "euclidean", *, normalize: bool = True) -> None:
        super().__init__(distance, normalize=normalize)

    def mine(self, block: Block) -> Iterator[Triplets]:
        d = self.apart(block)
        p = torch.where(block.positives, d, -torch.inf).argmax(1)
        n = torch.where(block.negatives, d, torch.inf).argmin(1)
        (a,) = (block.positives.any(1) & block.negatives.any(1)).nonzero(as_tuple=True)
        yield Triplets(a + block.first, p[a], n[a])


class TripletMarginMiner(_TripletMiner):
    """Triplets selected by how much farther the negative is than the positive (Schroff et al., 2015, section 3.2).

    With the gap D_an - D_ap of Euclidean distances, or s_ap - s_an of cosines, `triplets` selects:

    - ``"violating"``: all with gap <= margin, so "hard_all" and "semihard_all" together; but for those of gap = margin,
      the triplets with a loss above 0 in ``TripletMarginLoss(triplets="all")``;
    - ``"hard_all"``: all with gap <= 0;
    - ``"semihard_all"``: all with 0 < gap <= margin;
    - ``"semihard"``: for each positive pair the nearest negative with a gap above 0, or the farthest negative if there
      is none (TensorFlow Addons' choice; of equally far ones the lowest index).

    "semihard" and "semihard_all" mean the same in `TripletMarginLoss`. There can be N^3 triplets; `blocks` yields them
    in parts.

    Args:
        margin: a number, used by "semihard_all" and "violating".
        distance: ``"euclidean"`` (the default) or ``"cosine"``.
        triplets: ``"violating"`` (the default), ``"hard_all"``, ``"semihard_all"`` or ``"semihard"``.
        normalize: L2-normalise embeddings and references first (the default).

    Shape:
        - embeddings: (N, D), float16 to float64. labels: (N,), integers.
        - ref_emb: (M, D) and ref_labels: (M,), optional.
        - output: `Triplets`, indices (T,), (T,), (T,).

    Raises:
        TypeError: `margin` is not a number, or `normalize` not a bool.
        ValueError: an unknown `distance` or `triplets`.

    Examples:
        >>> x = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0], [-0.8, 0.6]])
        >>> labels = torch.tensor([0, 0, 1, 1])
        >>> triplets = flashpair.miners.TripletMarginMiner(distance="cosine")(x, labels)
        >>> [t.tolist() for t in triplets]
        [[1, 2], [0, 3], [2, 1]]
    """

    shown = ("margin", "distance", "triplets")

    def __init__(
        self, margin: float = 0.2, distance: str = "euclidean", triplets: str = "violating", *, normalize: bool = True
    ) -> None:
        super().__init__(distance, normalize=normalize)
        self.margin = checks.plain_number(margin, "margin")
        self.triplets = checks.word(triplets, TRIPLETS, "triplets")

    def mine(self, block: Block) -> Iterator[Triplets]:
        """One by one the positive pairs are rows of M numbers again, and taken in chunks of a block's size."""
        d, m = self.apart(block), block.z.shape[1]
        a, p = (block.positives & block.negatives.any(1, keepdim=True)).nonzero(as_tuple=True)
        farthest = torch.where(block.negatives, d, -torch.inf).argmax(1)
        for i, q in zip(*(t.split(chunk(m, d.itemsize)) for t in (a, p)), strict=True):
            near, far, negatives = d[i, q][:, None], d[i], block.negatives[i]
            if self.triplets == "semihard":
                farther = negatives & (far > near)
                n = torch.where(farther, far, torch.inf).argmin(1)
                yield Triplets(i + block.first, q, torch.where(farther.any(1), n, farthest[i]))
            else:
                k, n = (negatives & self._wanted(far - near)).nonzero(as_tuple=True)
                yield Triplets(i[k] + block.first, q[k], n)

    def _wanted(self, gap: Tensor) -> Tensor:
        if self.triplets == "hard_all":
            return gap <= 0
        return gap <= self.margin if self.triplets == "violating" else (gap > 0) & (gap <= self.margin)
