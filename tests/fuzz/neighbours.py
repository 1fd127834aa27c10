"""`nearest`, the miners and the retrieval metrics on whole numbers, whose similarities are exact and often equal: loops
say which indices there have to be, ties by index.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

import torch

import flashpair
from flashpair import metrics, miners

from .case import LABELS, LAYOUTS, Batch, Case, batch, draw_shape, laid_out

WHAT = ("nearest", "retrieval", "MultiSimilarityMiner", "BatchHardMiner", "TripletMarginMiner")


def draw(seed: int, impls: tuple[str, ...]) -> Case:
    r = random.Random(seed)
    name = r.choice(WHAT)
    options = {
        "distance": r.choice(("dot", "euclidean")), "k": r.randint(0, 6), "epsilon": r.choice((0.0, 1.0, 2.5)),
        "margin": r.choice((0.0, 1.0, 2.5)), "triplets": r.choice(miners.triplet.TRIPLETS),
        "impl": r.choice(("auto", "screened", "reference")), "range": r.choice((1, 2, 30)),
        "shift": r.choice((0, 0, 1000)),
    }  # fmt: skip
    if options["distance"] == "dot":
        options["shift"] = 0  # so large that float32 holds no sum of them
    shape = draw_shape(r, 129 if name.startswith("Triplet") else 257, r.random() < 0.5)
    shape["d"] = min(shape["d"], 33)
    return Case(
        "neighbours", seed, name, options, **shape, labels=r.choice(LABELS), dtype=r.choice(("float32", "float64")),
        layout=r.choice(LAYOUTS[:4]), threads=r.choice((1, 2)),
    )  # fmt: skip


def whole_numbers(case: Case) -> Batch:
    """The case's rows, rounded: small enough that every sum is exact in float32."""
    x, labels, y, ref_labels = batch(case)
    size, shift = case.options["range"], case.options["shift"]

    def rounded(t: torch.Tensor) -> torch.Tensor:
        return laid_out((t * size / 2).round().clamp(-size, size) + shift, case.layout)

    return Batch(rounded(x), labels, None if y is None else rounded(y), ref_labels)


def exact(given: Batch, distance: str) -> list[list[int]]:
    """Dot products, or squared distances, as Python's integers."""
    rows = [[int(v) for v in row] for row in given.x.tolist()]
    refs = rows if given.y is None else [[int(v) for v in row] for row in given.y.tolist()]
    if distance == "dot":
        return [[sum(a * b for a, b in zip(x, y, strict=True)) for y in refs] for x in rows]
    return [[sum((a - b) ** 2 for a, b in zip(x, y, strict=True)) for y in refs] for x in rows]


def run(case: Case) -> str:
    given = whole_numbers(case)
    if given.x.shape[0] == 0 or (given.y is not None and given.y.shape[0] == 0):
        return ""
    z = exact(given, case.options["distance"])
    more = {} if given.y is None else {"ref_emb": given.y, "ref_labels": given.ref_labels}
    if case.name in ("nearest", "retrieval"):
        return (_nearest if case.name == "nearest" else _retrieval)(case, given, z, more)
    wanted = list(_mined(case, given, z))
    distance = "cosine" if case.options["distance"] == "dot" else "euclidean"
    if case.name == "MultiSimilarityMiner":
        if distance == "euclidean":
            return ""
        miner = miners.MultiSimilarityMiner(case.options["epsilon"], normalize=False)
        a1, p, a2, n = miner(given.x, given.labels, **more)
        found = [("p", *t) for t in zip(a1.tolist(), p.tolist(), strict=True)]
        found += [("n", *t) for t in zip(a2.tolist(), n.tolist(), strict=True)]
        wanted = sorted(wanted, key=lambda t: (t[0] == "n", *t[1:]))
    else:
        kind = getattr(miners, case.name)
        options = {"margin": case.options["margin"], "triplets": case.options["triplets"]}
        miner = kind(distance=distance, normalize=False, **(options if "Triplet" in case.name else {}))
        found = list(zip(*(t.tolist() for t in miner(given.x, given.labels, **more)), strict=True))
    if found == wanted:
        return ""
    extra, missing = sorted(set(found) - set(wanted)), sorted(set(wanted) - set(found))
    return f"indices: {len(extra)} that should not be, {extra[:2]}, {len(missing)} missing, {missing[:2]}"


def _nearest(case: Case, given: Batch, z: list[list[int]], more: dict) -> str:
    m = len(z[0]) - (given.y is None)
    k, far = min(case.options["k"], max(m, 0)), case.options["distance"] == "euclidean"
    found = flashpair.nearest(
        given.x, k, ref_emb=given.y, distance=case.options["distance"], impl=case.options["impl"]
    ).indices.tolist()
    for i, row in enumerate(z):
        order = sorted(range(len(row)), key=lambda j, row=row: (row[j] if far else -row[j], j))
        order = [j for j in order if given.y is not None or j != i][:k]
        if found[i] != order:
            return f"ranks: row {i} has {found[i]} where it is {order}"
    return ""


def _retrieval(case: Case, given: Batch, z: list[list[int]], more: dict) -> str:
    far = case.options["distance"] == "euclidean"
    labels = given.labels.tolist()
    refs = labels if given.y is None else given.ref_labels.tolist()
    if len(refs) <= (given.y is None):
        return ""
    found = metrics.query_scores(
        given.x, given.labels, **more, distance=case.options["distance"], impl=case.options["impl"]
    )
    for i, row in enumerate(z):
        order = sorted(range(len(row)), key=lambda j, row=row: (row[j] if far else -row[j], j))
        hits = [refs[j] == labels[i] for j in order if given.y is not None or j != i]
        r = sum(hits)
        precision = sum(sum(hits[: k + 1]) / (k + 1) for k in range(r) if hits[k])
        wanted = (sum(hits[:r]) / max(r, 1), precision / max(r, 1), r)
        have = (found.r_precision[i].item(), found.map_at_r[i].item(), int(found.relevant[i]))
        if any(abs(a - b) > 1e-12 for a, b in zip(have, wanted, strict=True)):
            return f"scores: row {i} has {have} where they are {wanted}"
    return ""


def _mined(case: Case, given: Batch, z: list[list[int]]) -> Iterator[tuple]:
    o, labels = case.options, given.labels.tolist()
    refs = labels if given.y is None else given.ref_labels.tolist()
    for i, row in enumerate(z):
        d = [-s for s in row] if o["distance"] == "dot" else [s**0.5 for s in row]
        pos = [j for j in range(len(row)) if refs[j] == labels[i] and (given.y is not None or j != i)]
        neg = [j for j in range(len(row)) if refs[j] != labels[i]]
        if not pos or not neg:
            continue
        if case.name == "MultiSimilarityMiner":
            low, high = min(row[p] for p in pos), max(row[n] for n in neg)
            yield from (("p", i, p) for p in pos if row[p] < high + o["epsilon"])
            yield from (("n", i, n) for n in neg if row[n] > low - o["epsilon"])
        elif case.name == "BatchHardMiner":
            yield i, max(pos, key=lambda j: (d[j], -j)), min(neg, key=lambda j: (d[j], j))
        else:
            for p in pos:
                yield from ((i, p, n) for n in _wanted(o, d, p, neg))


def _wanted(o: dict, d: list[float], p: int, neg: list[int]) -> list[int]:
    if o["triplets"] == "semihard":
        farther = [n for n in neg if d[n] > d[p]]
        return [min(farther, key=lambda n: (d[n], n)) if farther else max(neg, key=lambda n: (d[n], -n))]
    low, high = {"semihard_all": (0, o["margin"]), "hard_all": (None, 0), "violating": (None, o["margin"])}[
        o["triplets"]
    ]
    return [n for n in neg if d[n] - d[p] <= high and (low is None or d[n] - d[p] > low)]
