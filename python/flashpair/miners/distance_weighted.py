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
    """One negative for each ordered positive pair, drawn with replacement by its distance from the anchor (Wu et al.,
    2017, section 4). Anchors without negatives have no triplets.

    A negative as far as `nonzero_loss_cutoff` is not drawn; where all of an anchor's are, each is as likely as another.
    Positives never are. What is drawn depends on the generator's state and, on a GPU, on the block size.

    Args:
        cutoff: what nearer negatives count as being apart, above 0: the weight of the nearest is bounded by it.
        nonzero_loss_cutoff: above `cutoff`. The margin loss's beta + margin; above 2, all negatives are drawn.
        generator: a torch.Generator on the embeddings' device; None: torch's own.
        normalize: see `Miner`. False is for rows of unit norm, which the density is of.

    Raises:
        TypeError, ValueError: a cutoff out of its range, or what is no generator.
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
        """P(n | a) of the anchors `first` to ``first + rows`` (None: to the end) and all references.

        Returns:
            (rows, M), float32 or float64; a row sums to 1, or is 0 if the anchor has no negatives.

        Raises:
            TypeError, ValueError: as a call.
        """
        first, rows = checks.integer(first, "first"), None if rows is None else checks.integer(rows, "rows")
        blocks = self.rows(embeddings, labels, ref_emb, ref_labels, first, rows)
        x, _, y, _ = checks.batch(embeddings, labels, ref_emb, ref_labels)
        last = x.shape[0] if rows is None else min(first + rows, x.shape[0])
        found = upcast(x.detach(), y)[0].new_zeros(max(0, last - first), (x if y is None else y).shape[0])
        for block in blocks:
            at = block.first - first
            found[at : at + block.z.shape[0]] = self._probabilities(block)
        return found

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
