"""What the oracles loop over: similarities and distances of small batches, each anchor's positives and negatives."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def lse(terms: list[Tensor], extra_zero: bool = False) -> Tensor:
    terms = terms + [torch.zeros((), dtype=torch.float64)] * extra_zero
    return torch.logsumexp(torch.stack(terms), 0)


def sp(t: Tensor) -> Tensor:
    return torch.logaddexp(t, torch.zeros_like(t))


def total(terms: list[Tensor]) -> Tensor:
    return torch.stack(terms).sum() if terms else torch.zeros((), dtype=torch.float64)


class Pairs:
    """S, D, the lists of positives and negatives, hyper-parameters in `o`, and `raw`: the rows as they came."""

    def __init__(
        self, x: Tensor, labels: Tensor, y: Tensor | None, ref_labels: Tensor | None, o: dict[str, Any]
    ) -> None:
        self.square = y is None
        y, ref_labels = (x, labels) if y is None or ref_labels is None else (y, ref_labels)
        self.x, self.y, self.o, self.n, self.m = x, y, o, x.shape[0], y.shape[0]
        self.labels, self.raw = labels.tolist(), (x, None if self.square else y)
        self.S = [[(x[i] * y[j]).sum() for j in range(self.m)] for i in range(self.n)]
        self.D2 = [[((x[i] - y[j]) ** 2).sum() for j in range(self.m)] for i in range(self.n)]
        self.D = [[d2.sqrt() if d2 > 0 else d2 * 0 for d2 in row] for row in self.D2]
        same = [[bool(labels[i] == ref_labels[j]) for j in range(self.m)] for i in range(self.n)]
        other = [[j for j in range(self.m) if not (self.square and i == j)] for i in range(self.n)]
        self.P = [[j for j in other[i] if same[i][j]] for i in range(self.n)]
        self.N = [[j for j in other[i] if not same[i][j]] for i in range(self.n)]

    def mined(self, i: int) -> tuple[list[int], list[int]]:
        """Multi-Similarity, eq. 11-12."""
        P, N, s, eps = self.P[i], self.N[i], self.S[i], self.o.get("epsilon")
        if eps is None:
            return P, N
        if not P or not N:
            return [], []
        low, high = min(s[p].item() for p in P), max(s[n].item() for n in N)
        return [p for p in P if s[p].item() < high + eps], [n for n in N if s[n].item() > low - eps]


Rows = list[Tensor | None]  # None: the row has no loss
