"""Losses that are not one number an anchor nor a mean of terms: of the whole batch, or with a part that is."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .pair_lists import Pairs, Rows, lse, sp, total

Terms = list[list[tuple[int, Tensor]]]


def snr_terms(p: Pairs) -> Terms:
    """Hinges of Var(x_i - x_j) / Var(x_i), which an embedding without variance has not."""
    small = 8 * torch.finfo(torch.float64).eps
    found: Terms = [[], []]
    x, y = ([row - row.mean() for row in t] for t in (p.x, p.y))
    for i, row in enumerate(x):
        noise = (row**2).sum()
        if row.abs().max() <= len(row) ** 0.5 * small * p.x[i].abs().max():
            continue
        for kind, js in enumerate((p.P[i], p.N[i])):
            for j in js:
                d = ((row - y[j]) ** 2).sum() / noise
                d = d if d > small**2 else d * 0
                over = d - p.o["pos_margin"] if kind == 0 else p.o["neg_margin"] - d
                found[kind].append((i, over.relu()))
    return found


def margin_terms(p: Pairs) -> tuple[list[tuple[int, int, Tensor]], float]:
    """(anchor, how often, hinge) of each pair, and what nu has to weigh: every row's beta, as often."""
    m, beta = p.o["margin"], p.o["beta"]
    found, often = [], 0
    for i in range(p.n):
        pos, neg = p.P[i], p.N[i]
        times = (len(neg), len(pos)) if p.o["mode"] == "triplets" else (1, 1)
        often += len(pos) * len(neg) if p.o["mode"] == "triplets" else 1
        found += [(i, times[0], (m + p.D[i][j] - beta).relu()) for j in pos]
        found += [(i, times[1], (m + beta - p.D[i][j]).relu()) for j in neg]
    return found, often * beta


def margin_loss(p: Pairs) -> Tensor:
    terms, weighed = margin_terms(p)
    reduction, nu = p.o["reduction"], p.o["nu"]
    every = total([times * t for _, times, t in terms])
    if reduction == "nonzero":
        above = sum(times for _, times, t in terms if t > 0)
        return (every + nu * weighed) / above if above else every * 0
    rows = []
    for i in range(p.n):
        triplets = len(p.P[i]) * len(p.N[i]) if p.o["mode"] == "triplets" else 1
        rows.append(total([times * t for a, times, t in terms if a == i]) + nu * p.o["beta"] * triplets)
    if reduction == "none":
        return torch.stack(rows)
    valid = sum(any(a == i and times for a, times, _ in terms) for i in range(p.n))
    return total(rows) / max({"sum": 1, "mean": p.n, "mean_valid": valid}[reduction], 1)


def intra_pair_variance(p: Pairs) -> Rows:
    """Each row's share of the two means."""
    pos = [[p.S[i][j] for j in p.P[i]] for i in range(p.n)]
    neg = [[p.S[i][j] for j in p.N[i]] for i in range(p.n)]
    many, few = max(sum(map(len, pos)), 1), max(sum(map(len, neg)), 1)
    low = (1 - p.o["pos_eps"]) * total([s for row in pos for s in row]) / many
    high = (1 + p.o["neg_eps"]) * total([s for row in neg for s in row]) / few
    return [
        total([(low - s).relu() ** 2 for s in a]) / many + total([(s - high).relu() ** 2 for s in b]) / few
        for a, b in zip(pos, neg, strict=True)
    ]


def histogram_loss(p: Pairs) -> Rows:
    """sum_r h-_r sum_{q <= r} h+_q, each row with the same share."""
    bins = p.o["n_bins"]
    step = 2 / bins
    pos = [p.S[i][j] for i in range(p.n) for j in p.P[i]]
    neg = [p.S[i][j] for i in range(p.n) for j in p.N[i]]
    loss = torch.zeros((), dtype=torch.float64)
    if pos and neg:
        heights = [
            [total([(1 - (s + 1 - r * step).abs() / step).relu() for s in side]) / len(side) for r in range(bins + 1)]
            for side in (pos, neg)
        ]
        loss = total([heights[1][r] * total(heights[0][: r + 1]) for r in range(bins + 1)])
    return [loss / p.n] * p.n


def drawn(p: Pairs) -> list[tuple[int, int]]:
    """The first two samples of each class, or its first sample and its first reference."""
    found = []
    for i in range(p.n):
        earlier = [j for j in range(i) if p.labels[j] == p.labels[i]]
        if not earlier and p.P[i]:
            found.append((i, min(p.P[i])))
    return found


def n_pairs(p: Pairs) -> Rows:
    """mc, ovo: one anchor and one positive a class, whose positives are the others' negatives; softlabel: the cross
    entropy against equal shares of an anchor's positives; all_pairs: a row's positive pairs."""
    rows: Rows = [None] * p.n
    if p.o["variant"] in ("mc", "ovo"):
        pairs = drawn(p)
        for i, own in pairs:
            apart = [p.S[i][other] - p.S[i][own] for _, other in pairs if other != own]
            rows[i] = lse(apart, True) if p.o["variant"] == "mc" else total([sp(a) for a in apart])
    elif p.o["variant"] == "softlabel":
        for i, s in enumerate(p.S):
            if p.P[i]:
                rows[i] = lse([s[j] for j in p.P[i] + p.N[i]]) - total([s[j] for j in p.P[i]]) / len(p.P[i])
    else:
        for i, s in enumerate(p.S):
            if p.P[i]:
                rows[i] = total([lse([s[n] - s[j] for n in p.N[i]], True) for j in p.P[i]])
    extra = n_pairs_penalty(p)
    return [None if row is None else row + extra for row in rows]


def n_pairs_count(p: Pairs) -> int:
    """What "mean" divides by."""
    if p.o["variant"] in ("mc", "ovo"):
        return len(drawn(p))
    return p.n if p.o["variant"] == "softlabel" else sum(map(len, p.P))


def n_pairs_penalty(p: Pairs) -> Tensor:
    x, y = p.raw
    if p.o["variant"] in ("mc", "ovo"):
        rows = [x[i] for i, _ in drawn(p)] + [(x if y is None else y)[j] for _, j in drawn(p)]
    else:
        rows = [*x, *(() if y is None else y)]
    squares = [(row**2).sum() for row in rows]
    if p.o["l2_kind"] == "mean_norm":
        squares = [s.sqrt() if s > 0 else s for s in squares]
    mean = total(squares) / max(len(rows), 1)
    return p.o["l2_weight"] * mean / (2 if p.o["l2_kind"] == "tf_contrib" else 1)


SHARED: dict[str, Callable[[Pairs], Rows]] = {
    "IntraPairVarianceLoss": intra_pair_variance, "HistogramLoss": histogram_loss,
}  # fmt: skip
"""Whose rows add up to the loss in every reduction."""
