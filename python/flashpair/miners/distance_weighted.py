"""Distance weighted sampling (Wu et al., ICCV 2017, section 4).

    P(n | a) ~ 1 / q(max(D_an, cutoff)),  q(d) ~ d^(D-2) (1 - d^2/4)^((D-3)/2)

q is the density of distances between points spread evenly over the sphere of R^D.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..core import checks
from ..core.similarity import upcast
from ..engine.cached_references import References
from .base import Block, Miner, Triplets


class DistanceWeightedMiner(Miner[Triplets]):
    """Distance weighted sampling: one negative drawn for each ordered positive pair (Wu et al., 2017, section 4).

    Negatives are drawn with replacement, so that all distances come up alike:

        P(n | a) ~ 1 / q(max(D_an, cutoff)),  q(d) ~ d^(D-2) (1 - d^2/4)^((D-3)/2)

    where q is the density of distances between points spread evenly over the sphere of R^D. Negatives at a distance of
    `nonzero_loss_cutoff` or more are not drawn; where all of an anchor's are, each is equally likely. Anchors without
    negatives have no triplets. What is drawn depends on the generator's state and, on a GPU, on the block size.

    Args:
        cutoff: nearer negatives count as being at this distance, above 0; it bounds the weight of the nearest.
        nonzero_loss_cutoff: above `cutoff`; the margin loss's beta + margin. Above 2 all negatives can be drawn.
        generator: a torch.Generator on the embeddings' device; None: torch's default one.
        normalize: L2-normalise embeddings and references first (the default). False: they must be unit vectors already,
            which the density assumes.

    Shape:
        - embeddings: (N, D), float16 to float64. labels: (N,), integers.
        - ref_emb: (M, D) and ref_labels: (M,), optional.
        - output: `Triplets`, indices (T,), (T,), (T,), one for each ordered positive pair.

    Raises:
        TypeError: a cutoff is not a number, `generator` not a torch.Generator, `normalize` not a bool.
        ValueError: `cutoff` is not above 0, or `nonzero_loss_cutoff` not above `cutoff`.

    Examples:
        >>> x = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0], [-0.8, 0.6]])
        >>> labels = torch.tensor([0, 0, 1, 1])
        >>> miner = flashpair.miners.DistanceWeightedMiner()
        >>> triplets = miner(x, labels)
        >>> triplets.a.tolist(), triplets.p.tolist()
        ([0, 1, 2, 3], [1, 0, 3, 2])
    """

    distance = "euclidean"
    shown = ("cutoff", "nonzero_loss_cutoff")
    mined = Triplets

    def __init__(
        self, cutoff: float = 0.5, nonzero_loss_cutoff: float = 1.4, generator: torch.Generator | None = None, *,
        normalize: bool = True,
    ) -> None:  # fmt: skip
        super().__init__(normalize=normalize)
        self.cutoff = checks.plain_number(cutoff, "cutoff", above=0)
        self.nonzero_loss_cutoff = checks.plain_number(nonzero_loss_cutoff, "nonzero_loss_cutoff", above=self.cutoff)
        if not (generator is None or isinstance(generator, torch.Generator)):
            raise TypeError(f"generator must be a torch.Generator or None, got {type(generator).__name__}")
        self.generator = generator

    def probabilities(
        self, embeddings: Tensor, labels: Tensor, ref_emb: Tensor | References | None = None,
        ref_labels: Tensor | None = None, *, first: int = 0, rows: int | None = None,
    ) -> Tensor:  # fmt: skip
        """P(n | a) of some anchors and all references.

        Args:
            embeddings: as in a call.
            labels: as in a call.
            ref_emb: as in a call.
            ref_labels: as in a call.
            first: the first anchor, at least 0.
            rows: how many anchors; None: to the end.

        Returns:
            (rows, M), float32 or float64; a row sums to 1, or is 0 if the anchor has no negatives.

        Raises:
            TypeError: as a call.
            ValueError: as a call.
        """
        first, rows = checks.integer(first, "first"), None if rows is None else checks.integer(rows, "rows")
        blocks = self.rows(embeddings, labels, ref_emb, ref_labels, first, rows)
        x, _, y, _ = checks.batch(embeddings, labels, ref_emb, ref_labels)
        last = x.shape[0] if rows is None else min(first + rows, x.shape[0])
        probabilities = upcast(x.detach(), y)[0].new_zeros(max(0, last - first), (x if y is None else y).shape[0])
        for block in blocks:
            at = block.first - first
            probabilities[at : at + block.z.shape[0]] = self._probabilities(block)
        return probabilities

    def mine(self, block: Block) -> Iterator[Triplets]:
        positives = block.positives & block.negatives.any(1, keepdim=True)
        a, p = positives.nonzero(as_tuple=True)
        # In float64, so that a running sum of M shares stays one, and steps up at every negative of weight above 0.
        reached = self._probabilities(block).cumsum(1, dtype=torch.float64)
        drawn = torch.rand(a.shape, generator=self.generator, dtype=torch.float64, device=a.device)
        count = positives.sum(1)
        place = torch.arange(a.shape[0], device=a.device) - (count.cumsum(0) - count)[a]
        at = drawn.new_zeros(count.shape[0], int(count.max()))
        at[a, place] = drawn * reached[a, -1]
        yield Triplets(a + block.first, p, torch.searchsorted(reached, at, right=True)[a, place])

    def _probabilities(self, block: Block) -> Tensor:  # -> (B, M)
        """In logarithms: 1 / q spans more than the range of float32 from D = 100 or so on."""
        d, dim = block.z.clamp(self.cutoff, 2.0), block.width
        log_weights = (2 - dim) * d.log() - torch.special.xlog1py((dim - 3) / 2, d * d / -4)
        drawn = block.negatives & (block.z < self.nonzero_loss_cutoff) & log_weights.isfinite()
        log_weights = torch.where(drawn, log_weights, -torch.inf)
        weights = (log_weights - log_weights.amax(1, keepdim=True)).exp()
        weights = torch.where(drawn.any(1, keepdim=True), weights, block.negatives.to(weights.dtype))
        return weights / weights.sum(1, keepdim=True).clamp_min(1.0)
