"""Verification: how often a positive is nearer than some of the negatives."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..core import checks
from ..core.reduction import Reduction
from ..engine.cached_references import References
from ..engine.pairs import make_pairs
from .arguments import several
from .ranking import DISTANCES, search

PASS_BYTES = 2**26  # of bounds that one pass over the pairs compares with


def verification_rate(
    embeddings: Tensor, labels: Tensor, ref_emb: Tensor | References | None = None, ref_labels: Tensor | None = None,
    *, negatives: int | Sequence[int] = (1,), distance: str = "cosine", impl: str = "auto",
) -> dict[int, float]:  # fmt: skip
    """Verification rate: how often a query's positive is nearer than K of its negatives (Sohn, 2016).

    Sohn estimates the rate by drawing negatives. Here it is exact. It is the mean over all positive pairs of:

        C(b, K) / C(n, K)

    where b of the query's n negatives are farther than the positive and C is the binomial coefficient. Chance is
    1 / (K + 1). As with hinges, pairs whose similarities differ only by rounding can fall on either side.

    The negatives are counted in passes over tiles and not stored. The similarities of positive pairs are stored: N
    times the largest number of positives of a query.

    Args:
        embeddings: (N, D) queries, float16 to float64.
        labels: (N,), integers.
        ref_emb: (M, D), the gallery, a tensor or `References`; None: the other embeddings.
        ref_labels: (M,), integers, with a tensor as `ref_emb`.
        negatives: one K, or several.
        distance: ``"cosine"`` (the default), ``"dot"`` or ``"euclidean"``.
        impl: as `Criterion` takes it.

    Shape:
        - embeddings: (N, D), ref_emb: (M, D), float16 to float64. labels: (N,), ref_labels: (M,), integers.
        - output: a dict from K to a float.

    Returns:
        The rate of each K, from 0 to 1.

    Raises:
        TypeError: an argument of a wrong type, named.
        ValueError: an argument out of its range, no positive pair, or a query with fewer negatives than K.

    Examples:
        >>> x = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0], [-0.8, 0.6]])
        >>> labels = torch.tensor([0, 0, 1, 1])
        >>> flashpair.metrics.verification_rate(x, labels, negatives=(1, 2))
        {1: 0.75, 2: 0.5}
    """
    counts = [checks.integer(k, "negatives", at_least=1) for k in several(negatives, "negatives", "ints")]
    found = search(embeddings, labels, ref_emb, ref_labels, distance, "auto")
    metric, unit = DISTANCES[distance]
    refs_labels = None if found.gallery is None else found.gallery_labels
    with torch.no_grad():
        pairs = make_pairs(
            found.queries, found.labels, ref_emb=found.gallery, ref_labels=refs_labels, normalize=unit, impl=impl,
            distance="squared_euclidean" if metric == "euclidean" else metric,  # the same order, no rounded roots
        )  # fmt: skip
        z, there = pairs.positives()
        of, others = there.sum(1), pairs.num_negatives()
        if not there.any():
            raise ValueError("labels must have two samples of some class, got no positive pair")
        fewest = int(others[of > 0].min())
        if max(counts, default=0) > fewest:
            raise ValueError(f"negatives must be at most {fewest}, the number that some query has, got {max(counts)}")
        side = "lower" if metric == "euclidean" else "upper"
        totals = torch.zeros(len(counts), dtype=torch.float64, device=z.device)
        for bounds, valid in zip(
            *(t.T.split(max(1, PASS_BYTES // (z.itemsize * len(z)))) for t in (z, there)), strict=True
        ):
            less_near = pairs.reduce(*(Reduction("count", "negatives", detach=True, **{side: row}) for row in bounds))
            beaten = torch.stack(less_near).double()
            for place, k in enumerate(counts):
                chance = torch.ones_like(beaten)
                for t in range(k):
                    chance *= (beaten - t).clamp(min=0) / (others - t).clamp(min=1)
                totals[place] += chance[valid].sum()
        return dict(zip(counts, (totals / of.sum()).tolist(), strict=True))
