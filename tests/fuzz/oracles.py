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

from . import losses
from .case import Batch, Case, generator
from .class_oracles import CLASSES, SHARES, Classes
from .pair_lists import Pairs, Rows, lse, sp, total
from .row_oracles import ROWS, apart
from .whole_oracles import SHARED, margin_loss, n_pairs, n_pairs_count, snr_terms

MOST_PAIRS = 120


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
    """NT-Xent and tuplet margin: one term a positive pair."""
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
    z, sign, m = apart(p)
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
    "TripletMarginLoss": triplet_terms, "LiftedStructureLoss": lifted_terms, "AngularLoss": angular_terms,
}  # fmt: skip


def snr_loss(p: Pairs) -> Tensor:
    """Its penalty is added to every row that has a loss, or to averages of terms as it is."""
    terms, weight = snr_terms(p), p.o["regularizer_weight"]
    extra = weight * total([row.sum().abs() for row in p.x]) / p.n
    if p.o["reduction"] in ("nonzero", "mean_pairs"):
        return terms_of(p, terms) + extra
    valid = [any(a == i for kind in terms for a, _ in kind) for i in range(p.n)]
    rows = [total([t for kind in terms for a, t in kind if a == i]) + extra * valid[i] for i in range(p.n)]
    return reduced(torch.stack(rows), valid, p.n, p.o["reduction"])


def n_pairs_loss(p: Pairs) -> Tensor:
    rows = n_pairs(p)
    zero = torch.zeros((), dtype=torch.float64)
    found = torch.stack([zero if row is None else row for row in rows])
    return reduced(found, [row is not None for row in rows], n_pairs_count(p), p.o["reduction"])


WHOLE: dict[str, Callable[[Pairs], Tensor]] = {
    "MarginLoss": margin_loss, "SNRContrastiveLoss": snr_loss, "NPairsLoss": n_pairs_loss
}  # fmt: skip


def knows(case: Case, given: Batch) -> bool:
    """Whether there is a formula of the case, and it is small enough; of what is not finite there is none."""
    if not all(t is None or t.isfinite().all() for t in (given.x, given.y)):
        return False
    o, n = case.options, given.x.shape[0]
    if case.name in CLASSES:
        return 0 < n * o["classes"] * o.get("centers_per_class", 1) <= MOST_PAIRS
    m = n if given.y is None else given.y.shape[0]
    known = any(case.name in some for some in (ROWS, TERMS, SHARED, WHOLE))
    return known and 0 < n * m <= MOST_PAIRS and o.get("over") != "batch"


def evaluate(case: Case, given: Batch) -> dict[str, Tensor]:
    """Loss and gradients, by autograd over the loops: of the embeddings, or of those and of class weights."""
    x = given.x.detach().double().requires_grad_(case.need[0])
    y = None if given.y is None else given.y.detach().double()
    if y is not None:
        y.requires_grad_(case.need[1] and case.options.get("refs") == "tensor")
    o = {
        k: (float(torch.tensor(v)) if k in case.options.get("learn", ()) and case.dtype != "float64" else v)
        for k, v in case.options.items()
    }
    wanted = {"dx": x, "dy": y}
    of = _unit(x) if o["normalize"] else x
    if case.name in CLASSES:
        made = losses.criterion(case, x.shape[1], "reference", True)
        wanted["d weight"] = weight = made.weight.detach().requires_grad_()
        loss = _of_classes(case.name, Classes(of, given.labels.tolist(), _unit(weight), o))
    else:
        other = y if y is None or not o["normalize"] else _unit(y)
        p = Pairs(of, given.labels, other, given.ref_labels, o)
        p.raw = (x, y)
        loss = _loss(case, p)
    found = {"loss": loss.detach()}
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
    """Rows (..., D) of unit norm."""
    rows = x.flatten(0, -2)
    norm = [row.norm() for row in rows]
    unit = [row / size if size > 0 else row * 0 for row, size in zip(rows, norm, strict=True)]
    return torch.stack(unit).unflatten(0, x.shape[:-1])


def _of_classes(name: str, p: Classes) -> Tensor:
    rows = torch.stack(CLASSES[name](p))
    reduction = p.o["reduction"]
    if name in SHARES:
        return rows if reduction == "none" else rows.sum()
    return reduced(rows, [True] * len(rows), len(rows), reduction)


def _loss(case: Case, p: Pairs) -> Tensor:
    if case.name in WHOLE:
        return WHOLE[case.name](p)
    if case.name in SHARED:
        rows = torch.stack(SHARED[case.name](p))
        return rows if p.o["reduction"] == "none" else rows.sum()
    if case.name in ROWS and p.o.get("triplets", "hard") == "hard":
        return rows_of(p, ROWS[case.name](p))
    p.o["count"] = _count(case)
    return terms_of(p, TERMS[case.name](p))


def _count(case: Case) -> Callable[[Pairs, Any], int]:
    """What "mean" divides by: contrastive loss by N, the others by their terms."""
    return (lambda p, _: p.n) if case.name == "ContrastiveLoss" else (lambda _, terms: len(terms[0]))
