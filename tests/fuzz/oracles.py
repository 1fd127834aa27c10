"""Loops over pairs and triplets, as the papers write them: float64, small batches, nothing of the package's engine.

An oracle is a function of S (n, m) cosines or dot products, D (n, m) Euclidean distances by subtraction, P and N, each
anchor's positives and negatives as lists, and the hyper-parameters. It returns each anchor's loss and how the mean is
taken: the losses' sum over some number.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .case import Batch, Case, generator

MOST_PAIRS = 120
Lists = list[list[int]]


def lse(terms: list[Tensor], extra_zero: bool = False) -> Tensor:
    terms = terms + [torch.zeros((), dtype=torch.float64)] * extra_zero
    return torch.logsumexp(torch.stack(terms), 0)


def sp(t: Tensor) -> Tensor:
    return torch.logaddexp(t, torch.zeros_like(t))


def total(terms: list[Tensor]) -> Tensor:
    return torch.stack(terms).sum() if terms else torch.zeros((), dtype=torch.float64)


class Pairs:
    """S, D, the lists of positives and negatives, and the case's hyper-parameters as attributes of `o`."""

    def __init__(
        self, x: Tensor, labels: Tensor, y: Tensor | None, ref_labels: Tensor | None, o: dict[str, Any]
    ) -> None:
        self.square = y is None
        y, ref_labels = (x, labels) if y is None or ref_labels is None else (y, ref_labels)
        self.x, self.y, self.o, self.n, self.m = x, y, o, x.shape[0], y.shape[0]
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
    z, sign, m = _apart(p)
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


def _apart(p: Pairs) -> tuple[list[list[Tensor]], int, Any]:
    """z, the sign with which it grows with the distance, and the margin."""
    z = p.S if p.o["distance"] == "cosine" else p.D2 if p.o["power"] == 2 else p.D
    return z, -1 if p.o["distance"] == "cosine" else 1, p.o["margin"]


ROWS: dict[str, Callable[[Pairs], Rows]] = {
    "MultiSimilarityLoss": multi_similarity, "LiftedStructureStarLoss": lifted_star,
    "GeneralizedLiftedStructureLoss": generalized_lifted, "BinomialDevianceLoss": binomial,
    "BinLiftedLoss": bin_lifted, "MinedPairLoss": mined_pairs, "NCALoss": nca, "SupConLoss": sup_con,
    "CircleLoss": circle, "FastAPLoss": fast_ap, "TripletMarginLoss": hardest,
}  # fmt: skip


def rows_of(p: Pairs, rows: Rows) -> Tensor:
    """The loss of every reduction, of rows: "mean" over all of them."""
    zero = torch.zeros((), dtype=torch.float64)
    losses = torch.stack([zero if row is None else row for row in rows])
    return reduced(losses, [row is not None for row in rows], p.n, p.o["reduction"])


def reduced(losses: Tensor, valid: list[bool], by: int, reduction: str) -> Tensor:
    if reduction == "none":
        return losses
    if reduction == "nonzero":
        return losses[losses > 0].sum() / max(int((losses > 0).sum()), 1)
    by = {"sum": 1, "mean": by, "mean_valid": sum(valid)}[reduction]
    return losses.sum() / max(by, 1)


def terms_of(p: Pairs, terms: list[list[tuple[int, Tensor]]]) -> Tensor:
    """The loss of a loss of terms, each kind (anchor, term): averages of each kind are added."""
    zero, reduction = torch.zeros((), dtype=torch.float64), p.o["reduction"]
    if reduction in ("nonzero", "mean_pairs"):
        loss = zero
        for kind in terms:
            count = len(kind) if reduction == "mean_pairs" else sum(bool(t > 0) for _, t in kind)
            loss = loss + total([t for _, t in kind]) / max(count, 1)
        return loss
    losses = torch.stack([total([t for k in terms for a, t in k if a == i]) for i in range(p.n)])
    valid = [any(a == i for k in terms for a, _ in k) for i in range(p.n)]
    return reduced(losses, valid, p.o["count"](p, terms), reduction)


def pair_terms(p: Pairs) -> list[list[tuple[int, Tensor]]]:
    """Of contrastive loss: the hinges of positives, and of negatives."""
    z, sign, power = (p.S, 1, p.o["power"]) if p.o["distance"] == "cosine" else (p.D, -1, p.o["power"])
    pos = [(i, (sign * (p.o["pos_margin"] - z[i][j])).relu() ** power / power) for i in range(p.n) for j in p.P[i]]
    neg = [(i, (sign * (z[i][j] - p.o["neg_margin"])).relu() ** power / power) for i in range(p.n) for j in p.N[i]]
    return [pos, neg]


def softmax_pairs(p: Pairs) -> list[list[tuple[int, Tensor]]]:
    """NT-Xent, N-pair of all pairs and tuplet margin: one term a positive pair."""
    found = []
    for i, s in enumerate(p.S):
        for j in p.P[i]:
            k, own = 1 / p.o.get("temperature", 1.0), s[j]
            if "scale" in p.o:
                k, turn = p.o["scale"], math.radians(p.o["margin"])
                rest = 1 - s[j] ** 2
                own = s[j] * math.cos(turn) + (rest.sqrt() if rest > 0 else rest * 0) * math.sin(turn)
            found.append((i, lse([k * (s[n] - own) for n in p.N[i]], True)))
    return [found]


def triplet_terms(p: Pairs) -> list[list[tuple[int, Tensor]]]:
    z, sign, m = _apart(p)
    found = []
    for i, row in enumerate(z):
        if p.o["triplets"] == "semihard":
            for j in p.P[i] if p.N[i] else []:
                farther = [n for n in p.N[i] if sign * row[n] > sign * row[j]]
                pick = min if farther else max
                n = pick(farther or p.N[i], key=lambda n, row=row: sign * row[n].item())
                found.append((i, (sign * (row[j] - row[n]) + m).relu()))
            continue
        for j, n in itertools.product(p.P[i], p.N[i]):
            d = sign * (row[j] - row[n]) + m
            inside = p.o["triplets"] == "all" or (sign * (row[n] - row[j]) > 0 and d >= 0)
            found.append((i, sp(d) if p.o["smooth"] else d.relu() if inside else d * 0))
    return [found]


def lifted_terms(p: Pairs) -> list[list[tuple[int, Tensor]]]:
    m, found = p.o["margin"], []
    for i in range(p.n):
        for j in p.P[i]:
            reach = [m - p.D[i][k] for k in p.N[i]] + [m - p.D[j][k] for k in p.N[j]]
            found.append((i, (lse(reach) + p.D[i][j]).relu() ** 2 / 2 if reach else p.D[i][j] * 0))
    return [found]


def angular_terms(p: Pairs) -> list[list[tuple[int, Tensor]]]:
    t2, found = math.tan(math.radians(p.o["alpha"])) ** 2, []
    for i in range(p.n):
        for j in p.P[i]:
            if p.o["form"] == "logsumexp":
                f = [4 * t2 * (p.S[i][n] + p.S[j][n]) - 2 * (1 + t2) * p.S[i][j] for n in p.N[i]]
                found.append((i, lse(f, True)))
                continue
            for n in p.N[i]:
                far = ((p.x[n] - (p.x[i] + p.x[j]) / 2) ** 2).sum()
                found.append((i, (p.D2[i][j] - 4 * t2 * far).relu()))
    return [found]


TERMS: dict[str, Callable[[Pairs], list[list[tuple[int, Tensor]]]]] = {
    "ContrastiveLoss": pair_terms, "NTXentLoss": softmax_pairs, "TupletMarginLoss": softmax_pairs,
    "NPairsLoss": softmax_pairs, "TripletMarginLoss": triplet_terms, "LiftedStructureLoss": lifted_terms,
    "AngularLoss": angular_terms,
}  # fmt: skip


def knows(case: Case, given: Batch) -> bool:
    """Whether there is a formula of the case, and it is small enough."""
    o, n = case.options, given.x.shape[0]
    m = n if given.y is None else given.y.shape[0]
    special = o.get("over") == "batch" or o.get("variant", "all_pairs") != "all_pairs" or o.get("l2_weight", 0.0)
    return (case.name in ROWS or case.name in TERMS) and 0 < n * m <= MOST_PAIRS and not special


def evaluate(case: Case, given: Batch) -> dict[str, Tensor]:
    """Loss and gradients of the embeddings, by autograd over the loops."""
    x = given.x.detach().double().requires_grad_(case.need[0])
    y = None if given.y is None else given.y.detach().double()
    if y is not None:
        y.requires_grad_(case.need[1] and case.options.get("refs") == "tensor")
    o = {
        k: (float(torch.tensor(v)) if k in case.options.get("learn", ()) and case.dtype != "float64" else v)
        for k, v in case.options.items()
    }
    unit = o["normalize"]
    p = Pairs(_unit(x) if unit else x, given.labels, y if y is None or not unit else _unit(y), given.ref_labels, o)
    loss = _loss(case, p)
    found, wanted = {"loss": loss.detach()}, {"dx": x, "dy": y}
    upstream = torch.randn(loss.shape, generator=generator(case, "upstream"), dtype=torch.float64)
    if case.dtype != "float64":
        upstream = upstream.float().double()
    for name, t in wanted.items():
        if t is not None and t.requires_grad:
            g = (
                torch.autograd.grad(loss, t, upstream, allow_unused=True, retain_graph=True)[0]
                if loss.requires_grad
                else None
            )
            found[name] = torch.zeros_like(t) if g is None else g
    return found


def _unit(x: Tensor) -> Tensor:
    norm = [row.norm() for row in x]
    return torch.stack([row / size if size > 0 else row * 0 for row, size in zip(x, norm, strict=True)])


def _loss(case: Case, p: Pairs) -> Tensor:
    if case.name in ROWS and p.o.get("triplets", "hard") == "hard":
        return rows_of(p, ROWS[case.name](p))
    p.o["count"] = _count(case)
    return terms_of(p, TERMS[case.name](p))


def _count(case: Case) -> Callable[[Pairs, Any], int]:
    """What "mean" divides by: contrastive loss by N, the others by their terms."""
    return (lambda p, _: p.n) if case.name == "ContrastiveLoss" else (lambda _, terms: len(terms[0]))
