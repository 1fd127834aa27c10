"""`CrossBatchMemory` over some batches, against the dense reference with a list of all that has come; `GradCache`
against a plain step; `pair_weights` against the gradient that it says there is.
"""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor, nn

import flashpair
import flashpair.backends.reference
from flashpair.backends.reference import ReferencePairs
from flashpair.core.similarity import inverse_norm, l2_normalize, nan_unless_finite

from . import losses, scales
from .case import Batch, Case, batch, generator
from .compare import failure, working

WHAT = ("memory", "memory", "grad cache", "weights")


def draw(seed: int, impls: tuple[str, ...]) -> Case:
    r = random.Random(seed)
    what = r.choice(WHAT)
    at = seed * 7919
    while True:
        case = losses.draw(at, ("auto", "tiled"))
        at += 1
        plain = case.name not in losses.CLASS_LOSSES and case.dtype in ("float32", "float64")
        drawn = case.options.get("variant") in ("mc", "ovo")
        takes = case.name not in losses.WITHIN_BATCH and not case.options.get("l2_weight") and not drawn
        finite = not any(w in ("nan", "inf") for w, _ in case.changes)
        if plain and finite and (takes or what == "grad cache"):
            break
    options = {**case.options, "refs": "none", "learn": [], "what": what}
    options["batches"] = [r.choice((0, 1, 2, 5, 8)) for _ in range(r.randint(2, 5))] + [r.choice((3, 7))]
    options["size"] = r.choice((8, 11, 20))
    options["micro_batch"] = r.choice((1, 2, 3, 100))
    if what == "grad cache" and options["reduction"] == "none":
        options["reduction"] = "sum"
    n = sum(options["batches"]) if what == "memory" else min(case.n, 33)
    return case.with_(kind="memories", seed=seed, options=options, n=n, m=-1, layout="plain", need=[True, True])


class DensePairs(ReferencePairs):
    """Anchors against themselves, each but for itself, and constants."""

    def __init__(self, x: Tensor, labels: Tensor, memory: Tensor, memory_labels: Tensor, distance: str) -> None:
        z = flashpair.backends.reference.dense_pairs(x, torch.cat([x, memory]), distance)
        every = torch.cat([labels, memory_labels])
        super().__init__(z, labels, every, square=False, nonfinite=nan_unless_finite(x, memory))
        other = ~torch.eye(*z.shape, dtype=torch.bool)
        self.masks = {side: mask & other for side, mask in self.masks.items()}
        self.embeddings, self.square = x, True


def _criterion(case: Case, impl: str, wide: bool) -> Any:
    options = {k: v for k, v in case.options.items() if k not in ("what", "batches", "size", "micro_batch")}
    return losses.criterion(case.with_(options=options), case.d, impl, wide)


def _last(case: Case, given: Batch, impl: str, wide: bool = False) -> dict[str, Tensor]:
    """The last batch's loss and gradient."""
    x, labels = given.x.double() if wide else given.x, given.labels
    criterion = _criterion(case, impl, wide)
    size = case.options["size"]
    memory = None if impl == "reference" else flashpair.CrossBatchMemory(criterion, x.shape[1], size, dtype=x.dtype)
    held, held_labels = x[:0], labels[:0]
    unit, prepare = criterion.preparation
    counts = list(case.options["batches"])
    for part, names in zip(x.split(counts), labels.split(counts), strict=True):
        a = part.detach().requires_grad_()
        if memory is not None:
            loss = memory(a, names)
        else:
            own = prepare(a) if prepare is not None else l2_normalize(a) if unit else a
            keep = min(len(held), size - len(a))
            held, held_labels = held[len(held) - keep :], held_labels[len(held_labels) - keep :]
            with scales.watched() as seen:
                loss = criterion.of_chunks(a, names, DensePairs(own, names, held, held_labels, criterion.distance))
            held, held_labels = torch.cat([held, own.detach()]), torch.cat([held_labels, names])
    upstream = torch.randn(loss.shape, generator=generator(case, "upstream"), dtype=torch.float64).to(loss.dtype)
    grad = (
        torch.autograd.grad(loss, a, upstream, retain_graph=True, allow_unused=True)[0] if loss.requires_grad else None
    )
    found = {"loss": loss.detach().double(), "dx": torch.zeros_like(a).double() if grad is None else grad.double()}
    w = scales.weights(seen, loss, upstream) if wide and grad is not None else None
    if w is not None:
        of = scales.scales(seen[0], w, {}, criterion.normalize, False, upstream)
        both = of["dx"] + of["dy"][: len(a)]
        found["scale dx"] = both * inverse_norm(a.detach())[:, 0] if criterion.normalize else both
        found["scale loss"] = of["loss"]
    return found


def _step(case: Case, given: Batch, cached: bool, wide: bool = False) -> dict[str, Tensor]:
    x = given.x.double() if wide else given.x.to(working(case))
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(case.seed)
        encoder = nn.Linear(x.shape[1], 5).to(x.dtype)
    criterion = _criterion(case, "reference" if wide else case.impl, wide)
    x = x.detach().requires_grad_()
    if cached:
        loss = flashpair.GradCache(encoder, criterion, micro_batch=case.options["micro_batch"])(x, given.labels)
    else:
        loss = criterion(encoder(x), given.labels)
        if loss.requires_grad:
            loss.backward()
    found = {"loss": loss.detach().double(), "dx": x.grad, **{f"d {k}": p.grad for k, p in encoder.named_parameters()}}
    return {k: (torch.zeros_like(x) if g is None else g).double() for k, g in found.items()}


def _weights(case: Case, given: Batch) -> str:
    """Of unnormalised dot products: dL/dx = (W + W^T) x, in float64."""
    criterion = _criterion(case, "reference", True)
    criterion.normalize = False
    if criterion.distance != "dot" or case.options.get("form") == "hinge" or case.name in ("FastAPLoss", "AngularLoss"):
        return ""
    x = given.x.double().requires_grad_()
    loss = criterion(x, given.labels).sum()
    found = torch.autograd.grad(loss, x)[0] if loss.requires_grad else torch.zeros_like(x)
    w = flashpair.pair_weights(criterion, x.detach(), given.labels)
    wanted, size = (w + w.T) @ x.detach(), (w.abs() + w.T.abs()) @ x.detach().abs()
    if not wanted.isfinite().all():
        return ""
    eps, tiny = torch.finfo(x.dtype).eps, 2.0**-1074  # roundings, under the smallest normal number too
    bound = 4 * x.shape[0] * (eps * size.amax(1, keepdim=True) + tiny)  # of sums of 2 N terms, twice
    off = ((found - wanted).abs() - bound).amax().item() if x.numel() else 0.0
    return f"weights: gradients are {off:.3g} apart" if off > 0 else ""


def run(case: Case) -> str:
    given = batch(case)
    what = case.options["what"]
    if what == "weights":
        return _weights(case, given)
    if what == "memory":
        if case.rows is not None:
            return ""  # the batches' sizes are the case
        found, truth = _last(case, given, case.impl), _last(case, given, "reference", wide=True)
        return failure(case, given, found, truth, lambda b: _last(case, b, "reference"))
    found, truth = _step(case, given, True), _step(case, given, False, wide=True)
    return failure(case, given, found, truth, lambda b: _step(case, b, False))
