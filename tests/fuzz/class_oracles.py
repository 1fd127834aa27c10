"""Losses of embeddings against class weights, as the papers write them: loops over rows and classes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .pair_lists import lse, total

Rows = list[Tensor]


class Classes(NamedTuple):
    """Embeddings (B, D), labels in [0, C), unit weights (C, D) or, of several centres a class, (C, K, D)."""

    x: Tensor
    labels: list[int]
    w: Tensor
    o: dict[str, Any]

    def cosines(self) -> list[list[Tensor]]:
        """Of row i and class c; dot products where embeddings are not of unit norm."""
        return [[(x * w).sum() for w in self.w] for x in self.x]


def cross_entropy(logits: list[Tensor], label: int) -> Tensor:
    return lse(logits) - logits[label]


def normalized_softmax(p: Classes) -> Rows:
    return [
        cross_entropy([s / p.o["temperature"] for s in row], y) for row, y in zip(p.cosines(), p.labels, strict=True)
    ]


def with_target(p: Classes, row: list[Tensor], label: int, target: Tensor) -> Tensor:
    """The cross entropy of scaled logits with the own class's in another form."""
    logits = [p.o["scale"] * (target if c == label else s) for c, s in enumerate(row)]
    return cross_entropy(logits, label)


def cos_face(p: Classes) -> Rows:
    rows = zip(p.cosines(), p.labels, strict=True)
    return [with_target(p, row, y, row[y] - p.o["margin"]) for row, y in rows]


def arc_face(p: Classes) -> Rows:
    """Where theta + m is over 180 degrees, cos theta - m sin m, if that is asked for."""
    m, rows = math.radians(p.o["margin"]), []
    for row, y in zip(p.cosines(), p.labels, strict=True):
        rest = 1 - row[y] ** 2
        target = row[y] * math.cos(m) - (rest.sqrt() if rest > 0 else rest * 0) * math.sin(m)
        if p.o["fallback"] and not row[y] >= -math.cos(m):
            target = row[y] - m * math.sin(m)
        rows.append(with_target(p, row, y, target))
    return rows


def sphere_face(p: Classes) -> Rows:
    """cos(m theta) by the double angle, which has a derivative at both ends."""
    m, lam, rows = p.o["margin"], p.o["lam"], []
    for x, row, y in zip(p.x, p.cosines(), p.labels, strict=True):
        if not x.any():
            rows.append(with_target(p, row, y, row[y] * 0))
            continue
        norm = (x * x).sum().sqrt()
        cosine = (row[y] / norm).clamp(-1, 1)
        k = min(int(m * math.acos(cosine.item()) / math.pi), m - 1)
        turned = cosine
        for _ in range(int(math.log2(m))):
            turned = 2 * turned**2 - 1
        psi = (-1) ** k * turned - 2 * k
        rows.append(with_target(p, row, y, norm * (lam * cosine + psi) / (1 + lam)))
    return rows


def proxy_nca(p: Classes) -> Rows:
    k, rows = p.o["softmax_scale"], []
    for x, y in zip(p.x, p.labels, strict=True):
        far = [-k * ((x - w) ** 2).sum() for w in p.w]
        others = far if p.o["include_positive"] else far[:y] + far[y + 1 :]
        rows.append(lse(others) - far[y] if others else far[y] * 0)
    return rows


def proxy_anchor(p: Classes) -> Rows:
    """A row is a proxy, with its share of the two means."""
    s, a, delta = p.cosines(), p.o["alpha"], p.o["margin"]
    present, rows = len(set(p.labels)), []
    for c in range(len(p.w)):
        pos = [-a * (row[c] - delta) for row, y in zip(s, p.labels, strict=True) if y == c]
        neg = [a * (row[c] + delta) for row, y in zip(s, p.labels, strict=True) if y != c]
        rows.append((lse(pos, True) / present if pos else 0) + lse(neg, True) / len(p.w))
    return rows


def soft_triple(p: Classes) -> Rows:
    o, rows = p.o, []
    centres = len(p.w[0])
    apart = [(2 + 1e-5 - 2 * (of[t] * of[s]).sum()).sqrt() for of in p.w for s in range(centres) for t in range(s)]
    extra = o["tau"] * total(apart) / max(len(p.w) * centres * (centres - 1), 1)
    for x, y in zip(p.x, p.labels, strict=True):
        logits = []
        for c, of in enumerate(p.w):
            s = [(x * w).sum() for w in of]
            share = torch.softmax(torch.stack(s) / o["gamma"], 0)
            logits.append(o["la"] * (total([a * b for a, b in zip(share, s, strict=True)]) - o["margin"] * (c == y)))
        rows.append(cross_entropy(logits, y) + extra)
    return rows


CLASSES: dict[str, Callable[[Classes], Rows]] = {
    "NormalizedSoftmaxLoss": normalized_softmax, "CosFaceLoss": cos_face, "ArcFaceLoss": arc_face,
    "SphereFaceLoss": sphere_face, "ProxyNCALoss": proxy_nca, "ProxyAnchorLoss": proxy_anchor,
    "SoftTripleLoss": soft_triple,
}  # fmt: skip
SHARES = ("ProxyAnchorLoss",)  # whose rows add up to the loss in every reduction
