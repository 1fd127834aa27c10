"""The values of a call over the chunks so far, and what of the call does not depend on other terms any more."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..core.call import LOWER, UPPER
from ..core.chunks import NO_REFERENCE
from ..core.problem import (
    COUNT,
    LOGSUMEXP,
    MAX,
    MIN,
    SUM,
    Operands,
    Terms,
    accumulator,
    merge_logsumexp,
    num_rows,
    tops,
)


class MergedValues:
    """The values of all anchors over the chunks so far, and the references that attained extremes.

    Args:
        terms: the K terms of the call.
        scales: (K,), a number or a tensor () for each term.
        n: the number of anchors.
        like: a tensor of the embeddings' dtype on their device.

    Attributes:
        total: (R, N) float64, rows as in core/problem.py.
        winner: (K, N) int64, the index among all references of each extreme; None where backward needs none.
    """

    def __init__(self, terms: Terms, scales: Sequence[float | Tensor] | Tensor, n: int, like: Tensor) -> None:
        start = {LOGSUMEXP: -torch.inf, MAX: -torch.inf, MIN: torch.inf, SUM: 0.0, COUNT: 0.0}
        self.terms, self.scales, self.dtype, self.tops = terms, scales, accumulator(like.dtype), tops(terms)
        self.total = like.new_zeros(num_rows(terms), n, dtype=torch.float64)
        for row, t, top in zip(self.total, terms, self.tops, strict=False):
            row.fill_(start[t.op])
            if top >= 0:
                self.total[top + 1] = torch.inf
        self.winner = None
        if any(t.indexed for t in terms):
            self.winner = torch.full((len(terms), n), NO_REFERENCE, dtype=torch.int64, device=like.device)

    def values(self) -> Tensor:
        """(R, N), `total` in the dtype of row values."""
        return self.total.to(self.dtype)

    def merge(self, term_numbers: Sequence[int], anchors: slice, values: Tensor, winner: Tensor | None) -> None:
        """Adds the results of a chunk.

        Args:
            term_numbers: the k terms that the results are of.
            anchors: the n anchors that they are of.
            values: (r, n), rows as in core/problem.py.
            winner: (k, n) int64, the index among all references of each extreme, or None.
        """
        new_tops = tops([self.terms[k] for k in term_numbers])
        for row, k in enumerate(term_numbers):
            op, old, new = self.terms[k].op, self.total[k, anchors], values[row].double()
            if op == LOGSUMEXP:
                old_rows, new_rows = [k, self.tops[k], self.tops[k] + 1], [row, new_tops[row], new_tops[row] + 1]
                scale = 1.0 if self.terms[k].transformed else self.scales[k]
                merged = merge_logsumexp(self.total[old_rows][:, anchors], values[new_rows].double(), scale)
                for old_row, merged_row in zip(old_rows, merged, strict=True):
                    self.total[old_row, anchors] = merged_row
            elif op in (SUM, COUNT):
                old += new
            else:
                if self.winner is not None and winner is not None:
                    old_winner, new_winner = self.winner[k, anchors], winner[row]
                    better = (new > old) if op == MAX else (new < old)
                    better = better | ((new == old) & (new_winner < old_winner))
                    old_winner.copy_(torch.where(better, new_winner, old_winner))
                old.copy_((torch.maximum if op == MAX else torch.minimum)(old, new))


def resolved(terms: Terms, operands: Operands, term_numbers: Sequence[int], values: Tensor) -> tuple[Terms, Operands]:
    """Some terms of a call on their own: where another term's value bounds a window, a vector does so instead.

    Args:
        terms: all K terms.
        operands: their operands.
        term_numbers: the terms to return.
        values: (R, N), the values of the terms that bound windows, over all chunks.

    Returns:
        The terms, and their operands.
    """
    vectors: list[Tensor] = []
    resolved_terms = []
    for k in term_numbers:
        t, slots = terms[k], []
        bounds = {LOWER: (t.lower_of, t.lower_shift), UPPER: (t.upper_of, t.upper_shift)}
        for role, slot in enumerate(t.slots):
            bounding_term, shift = bounds.get(role, (-1, 0.0))
            vector = values[bounding_term] + shift if bounding_term >= 0 else operands.vector(slot)
            slots.append(-1 if vector is None else len(vectors))
            vectors += [] if vector is None else [vector]
        resolved_terms.append(t._replace(lower_of=-1, upper_of=-1, slots=tuple(slots)))
    scale = None if operands.scale is None else torch.stack([operands.scale[k] for k in term_numbers])
    return tuple(resolved_terms), Operands(scale, [operands.scales[k] for k in term_numbers], vectors)
