"""Losses that are one number an anchor, as the papers write them: loops over its positives and negatives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .pair_lists import Pairs, Rows, lse, sp, total


def multi_similarity(p: Pairs) -> Rows:
    a, b, lam = p.o["alpha"], p.o["beta"], p.o["base"]
    rows: Rows = []
    for i, s in enumerate(p.S):
        pos, neg = p.mined(i)
        some = lse([-a * (s[j] - lam) for j in pos], True) / a + lse([b * (s[j] - lam) for j in neg], True) / b
        rows.append(some if pos or neg else None)
    return rows


def lifted_star(p: Pairs) -> Rows:
    a, b = p.o["alpha"], p.o["beta"]
    mined = [p.mined(i) for i in range(p.n)]
    return [
        lse([-a * s[j] for j in pos]) / a + lse([b * s[j] for j in neg]) / b if pos and neg else None
        for s, (pos, neg) in zip(p.S, mined, strict=True)
    ]


def generalized_lifted(p: Pairs) -> Rows:
    m, cosine = p.o["margin"], p.o["distance"] == "cosine"
    rows: Rows = []
    for i in range(p.n):
        if not (p.P[i] and p.N[i]):
            rows.append(None)
            continue
        far, near = (p.S[i], -1) if cosine else (p.D[i], 1)
        rows.append((lse([near * far[j] for j in p.P[i]]) + lse([-near * far[j] for j in p.N[i]]) + m).relu())
    return rows


def binomial(p: Pairs) -> Rows:
    a, b, lam = p.o["alpha"], p.o["beta"], p.o["base"]
    rows: Rows = []
    for i, s in enumerate(p.S):
        pos, neg = p.mined(i)
        one = total([sp(a * (lam - s[j])) for j in pos]) / max(len(pos), 1)
        two = total([sp(b * (s[j] - lam)) for j in neg]) / max(len(neg), 1)
        rows.append(one + two if pos or neg else None)
    return rows


def bin_lifted(p: Pairs) -> Rows:
    a, b, lam = p.o["alpha"], p.o["beta"], p.o["base"]
    rows: Rows = []
    for i, s in enumerate(p.S):
        pos, neg = p.P[i], p.N[i]
        by_pos, by_neg = (max(len(pos), 1), max(len(neg), 1)) if p.o["normalized"] else (a, b)
        row = total([sp(a * (lam - s[j])) for j in pos]) / by_pos + total([sp(b * (s[j] - lam)) for j in neg]) / by_neg
        row = row + (lse([-a * s[j] for j in pos]) / a if pos else 0) + (lse([b * s[j] for j in neg]) / b if neg else 0)
        rows.append(row / 2 if pos or neg else None)
    return rows


def mined_pairs(p: Pairs) -> Rows:
    rows: Rows = []
    for i, s in enumerate(p.S):
        pos, neg = p.mined(i)
        by = (1, 1) if p.o["weights"] == "unit" else (max(len(pos), 1), max(len(neg), 1))
        row = total([1 - s[j] for j in pos]) / by[0] + total([s[j] for j in neg]) / by[1]
        rows.append(row if pos and neg else None)
    return rows


def nca(p: Pairs) -> Rows:
    z, k = (p.S, 1) if p.o["distance"] == "cosine" else (p.D2, -1)
    k = k * p.o["softmax_scale"]
    return [
        lse([k * z[i][j] for j in p.P[i] + p.N[i]]) - lse([k * z[i][j] for j in p.P[i]]) if p.P[i] else None
        for i in range(p.n)
    ]


def sup_con(p: Pairs) -> Rows:
    t, base = p.o["temperature"], p.o["base_temperature"]
    rows: Rows = []
    for i, s in enumerate(p.S):
        every = [s[j] / t for j in p.P[i] + p.N[i]]
        row = -total([s[j] / t - lse(every) for j in p.P[i]]) / len(p.P[i]) if p.P[i] else None
        rows.append(row if row is None or base is None else row * (t / base))
    return rows


def circle(p: Pairs) -> Rows:
    m, g = p.o["m"], p.o["gamma"]
    rows: Rows = []
    for i, s in enumerate(p.S):
        neg = [g * (s[j] + m).relu().detach() * (s[j] - m) for j in p.N[i]]
        pos = [-g * (1 + m - s[j]).relu().detach() * (s[j] - 1 + m) for j in p.P[i]]
        rows.append(sp(lse(neg) + lse(pos)) if pos and neg else None)
    return rows


def fast_ap(p: Pairs) -> Rows:
    bins = p.o["num_bins"]
    step = 4 / bins
    rows: Rows = []
    for i in range(p.n):
        if not p.P[i]:
            rows.append(None)
            continue

        def node(js: list[int], k: int, i: int = i) -> Tensor:
            return total([(1 - (p.D2[i][j] - k * step).abs() / step).relu() for j in js])

        pos = [node(p.P[i], k) for k in range(bins + 1)]
        both = [node(p.P[i] + p.N[i], k) for k in range(bins + 1)]
        row = torch.zeros((), dtype=torch.float64)
        for k in range(bins + 1):
            height = total(both[: k + 1])
            row = row + (pos[k] * total(pos[: k + 1]) / height if height > 0 else 0)
        rows.append(1 - row / len(p.P[i]))
    return rows


def hardest(p: Pairs) -> Rows:
    """Of equals the lowest index."""
    z, sign, m = apart(p)
    rows: Rows = []
    for i in range(p.n):
        if not (p.P[i] and p.N[i]):
            rows.append(None)
            continue
        far = max(p.P[i], key=lambda j: (sign * z[i][j].item(), -j))
        near = min(p.N[i], key=lambda j: (sign * z[i][j].item(), j))
        d = sign * (z[i][far] - z[i][near]) + m
        rows.append(sp(d) if p.o["smooth"] else d.relu())
    return rows


def apart(p: Pairs) -> tuple[list[list[Tensor]], int, Any]:
    """z, the sign with which it grows with the distance, and the margin."""
    z = p.S if p.o["distance"] == "cosine" else p.D2 if p.o["power"] == 2 else p.D
    return z, -1 if p.o["distance"] == "cosine" else 1, p.o["margin"]


ROWS: dict[str, Callable[[Pairs], Rows]] = {
    "MultiSimilarityLoss": multi_similarity, "LiftedStructureStarLoss": lifted_star,
    "GeneralizedLiftedStructureLoss": generalized_lifted, "BinomialDevianceLoss": binomial,
    "BinLiftedLoss": bin_lifted, "MinedPairLoss": mined_pairs, "NCALoss": nca, "SupConLoss": sup_con,
    "CircleLoss": circle, "FastAPLoss": fast_ap, "TripletMarginLoss": hardest,
}  # fmt: skip
