"""Random calls of `row_reduce`: some reductions with windows, bounds, transforms and operands of every form."""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor

from flashpair import Bound, Reduction, row_reduce

from . import scales
from .case import LABELS, LAYOUTS, Batch, Case, batch, draw_changes, draw_shape, generator, maybe_fused
from .compare import failure

TRANSFORMS = ("identity", "softplus", "hinge", "squared_hinge", "triangle", "lifted")
SIDES = ("positives", "negatives", "all")


def draw(seed: int, impls: tuple[str, ...]) -> Case:
    r = random.Random(seed)
    made: list[dict[str, Any]] = []
    for k in range(r.randint(1, 4)):
        op = r.choice(("logsumexp", "sum", "sum", "min", "max", "count"))
        one: dict[str, Any] = {"op": op, "side": r.choice(SIDES), "transform": "identity"}
        if op in ("logsumexp", "sum"):
            one["transform"] = r.choice(TRANSFORMS if op == "sum" else (*TRANSFORMS[:4], "identity", "identity"))
            one["scale"] = r.choice((1.0, -1.0, 3.0, -20.0))
            one["offset"] = r.choice(("none", "number", "vector"))
        mapped = op == "logsumexp" and one["transform"] != "identity"
        if one["transform"] == "lifted":
            one["offset"] = "vector"
        if mapped and one["offset"] == "vector":
            one["offset"] = "number"
        for name in ("lower", "upper") if not mapped else ():
            bounds = [b for b in range(k) if made[b].get("offset", "none") == "none"]
            kind = r.choice(("none", "none", "number", "vector", *(("bound",) if bounds else ())))
            # a shift, so that no pair stands at the bound that is its own
            one[name] = ["bound", r.choice(bounds), r.choice((0.13, -0.13))] if kind == "bound" else kind
        one["detach"] = r.random() < 0.2
        made.append(one)
    options = {"reductions": made, "distance": r.choice(("dot", "euclidean", "squared_euclidean"))}
    case = Case(
        "reduce", seed, "row_reduce", options,
        **draw_shape(r, 513, r.random() < 0.5), dtype=r.choice(("float32", "float64", "float16", "bfloat16")),
        labels=r.choice(LABELS), changes=draw_changes(r, False), layout=r.choice(LAYOUTS[:4]), impl=r.choice(impls),
        threads=r.choice((1, 2)), need=r.choice(([True, True], [True, False], [False, True])),
    )  # fmt: skip
    return maybe_fused(case)


def _made(case: Case, given: Batch, dtype: torch.dtype) -> tuple[list[Reduction], dict[str, Tensor]]:
    """The reductions, and what of them learns."""
    n, m = given.x.shape[0], (given.x if given.y is None else given.y).shape[0]
    found: list[Reduction] = []
    learn: dict[str, Tensor] = {}
    for k, one in enumerate(case.options["reductions"]):
        options: dict[str, Any] = {w: one[w] for w in ("op", "side", "transform", "detach")}
        vectors = {
            w: torch.randn(
                case.m if w == "ref_offset" and case.m >= 0 else case.n, generator=generator(case, f"{k}{w}")
            )
            for w in ("offset", "ref_offset", "lower", "upper")
        }
        for w, t in vectors.items():
            kept = case.refs if w == "ref_offset" and case.m >= 0 else case.rows
            vectors[w] = (t if kept is None else t[kept]).to(dtype)
            assert vectors[w].shape[0] == (m if w == "ref_offset" else n)
        if "scale" in one:
            options["scale"] = one["scale"]
        if one.get("offset", "none") != "none":
            options["offset"] = 0.37
        if one.get("offset") == "vector":
            options["offset"] = learn[f"offset {k}"] = vectors["offset"].requires_grad_()
        if one["transform"] == "lifted":
            options["ref_offset"] = learn[f"ref_offset {k}"] = vectors["ref_offset"].requires_grad_()
        for w, sign in (("lower", -1), ("upper", 1)):
            kind = one.get(w, "none")
            if isinstance(kind, list):
                options[w] = Bound(found[kind[1]], kind[2])
            elif kind != "none":
                options[w] = sign * 0.7 if kind == "number" else vectors[w] + sign
        found.append(Reduction(**options))
    return found, learn


def evaluate(case: Case, given: Batch, impl: str, wide: bool = False) -> dict[str, Tensor]:
    x, labels, y, ref_labels = given
    if wide:
        x, y = x.double(), None if y is None else y.double()
    x = x.detach().requires_grad_(wide or case.need[0])
    y = None if y is None else y.detach().requires_grad_(wide or case.need[1])
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    detached = [one["detach"] for one in case.options["reductions"]]
    if wide:  # a row without a gradient has terms, too
        case = case.with_(
            options={**case.options, "reductions": [one | {"detach": False} for one in case.options["reductions"]]}
        )
    reductions, learn = _made(case, given, dtype)
    with scales.watched() as seen:
        rows = row_reduce(
            x, labels, *reductions, ref_emb=y, ref_labels=ref_labels, distance=case.options["distance"], impl=impl
        )
    found = {f"row {k}": row.detach().double() for k, row in enumerate(rows)}
    wanted = {k: t for k, t in {"dx": x, "dy": y, **learn}.items() if t is not None and t.requires_grad}
    g = generator(case, "upstream")
    loss = torch.zeros((), dtype=torch.float64)
    for row, constant in zip(rows, detached, strict=True):
        upstream = torch.randn(row.shape, generator=g, dtype=torch.float64)
        if row.requires_grad:
            loss = loss + torch.where(row.isfinite(), row, 0.0).double() @ (upstream * (not constant))
    found |= {k: torch.zeros_like(t, dtype=torch.float64) for k, t in wanted.items() if k not in ("dx", "dy")}
    for k, t, need in (("dx", x, case.need[0]), ("dy", y, case.need[1])):
        if t is not None and need:
            found[k] = torch.zeros_like(t, dtype=torch.float64)
    if loss.requires_grad:
        grads = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True, retain_graph=wide)
        for (k, t), grad in zip(wanted.items(), grads, strict=True):
            if wide and k in ("dx", "dy") and not case.need[k == "dy"]:
                continue
            found[k] = torch.zeros_like(t, dtype=torch.float64) if grad is None else grad.double()
        if wide:
            found |= _scales(seen, list(rows), reductions, loss, y is None)
    return found


def _scales(
    seen: list[scales.Seen], rows: list[Tensor], reductions: list[Reduction], loss: Tensor, square: bool
) -> dict[str, Tensor]:
    """What each result is the sum of; of operands the pairs' weights."""
    w = scales.weights(seen, loss, torch.ones(()))
    if w is None:
        return {}
    found = scales.scales(seen[0], w, {}, False, square, torch.ones(()))
    found = {f"scale {k}": t for k, t in found.items() if k in ("dx", "dy")}
    for k, (row, z) in enumerate(zip(rows, seen[0].each, strict=True)):
        found |= {f"scale offset {k}": w.sum(1), f"scale ref_offset {k}": w.sum(0)}
        if row.requires_grad:
            (grad,) = torch.autograd.grad(row, z, torch.ones_like(row), retain_graph=True, allow_unused=True)
            if grad is not None:
                size = scales.scales(seen[0], grad.abs(), {}, False, square, torch.ones_like(row))["loss"]
                found[f"scale row {k}"] = size + _of_offsets(reductions[k], grad.abs())
    return found


def _of_offsets(r: Reduction, w: Tensor) -> Tensor:
    """What the offsets are among a row's terms: phi(scale z + offset) has the one derivative as often in both."""
    own = 0.0 if r.offset is None else torch.as_tensor(r.offset).detach().abs().double()
    ref = 0.0 if r.ref_offset is None else r.ref_offset.detach().abs().double()
    scale = float(r.scale) if r.op in ("logsumexp", "sum") else 1.0
    return (w.sum(1) * own + (w * ref).sum(1)) / abs(scale)


def run(case: Case) -> str:
    given = batch(case)
    found = evaluate(case, given, case.impl)
    return failure(
        case, given, found, evaluate(case, given, "reference", wide=True), lambda b: evaluate(case, b, "reference")
    )
