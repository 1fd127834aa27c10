"""Random criteria: every form of losses/registry.py, and the hyper-parameters that each can have."""

from __future__ import annotations

import copy
import random
from typing import Any

import torch
from torch import Tensor

import flashpair
from flashpair import References, StreamedReferences
from flashpair.core.similarity import inverse_norm
from flashpair.losses.soft_triple import unit

from . import scales
from .case import LABELS, LAYOUTS, Batch, Case, batch, draw_changes, draw_shape, generator, maybe_fused

CLASS_LOSSES = (
    "NormalizedSoftmaxLoss", "CosFaceLoss", "ArcFaceLoss", "SphereFaceLoss", "ProxyNCALoss", "ProxyAnchorLoss",
    "SoftTripleLoss",
)  # fmt: skip
PAIR_LOSSES = (
    "MultiSimilarityLoss", "LiftedStructureLoss", "GeneralizedLiftedStructureLoss", "LiftedStructureStarLoss",
    "NPairsLoss", "ContrastiveLoss", "SNRContrastiveLoss", "TripletMarginLoss", "BinomialDevianceLoss",
    "BinLiftedLoss", "MinedPairLoss", "NCALoss", "NTXentLoss", "SupConLoss", "CircleLoss", "TupletMarginLoss",
    "IntraPairVarianceLoss", "MarginLoss", "AngularLoss", "HistogramLoss", "FastAPLoss",
)  # fmt: skip
WITHIN_BATCH = ("LiftedStructureLoss", "AngularLoss")
LEARNED = ("alpha", "beta", "base", "margin", "temperature", "scale", "softmax_scale", "pos_margin", "neg_margin")


def _options(r: random.Random, name: str) -> dict[str, Any]:
    """Hyper-parameters as the constructor takes them, of a criterion of pairs or of classes."""
    one = r.choice
    ms = {"alpha": one((0.5, 2.0, 10.0)), "beta": one((2.0, 50.0)), "base": one((0.5, 1.0, -0.2))}
    mined = {"epsilon": one((None, 0.0, 0.1, 0.5))}
    margins = {"margin": one((0.0, 0.2, 1.0, -0.3))}
    return {
        "MultiSimilarityLoss": {**ms, **mined},
        "LiftedStructureLoss": margins,
        "GeneralizedLiftedStructureLoss": {**margins, "distance": one(("cosine", "euclidean"))},
        "LiftedStructureStarLoss": {"alpha": ms["alpha"], "beta": ms["beta"], **mined},
        "NPairsLoss": {
            "variant": one(("mc", "ovo", "all_pairs", "softlabel")), "l2_weight": one((0.0, 0.0, 0.02)),
            "l2_kind": one(("mean_sq", "tf_contrib", "mean_norm")),
        },
        "ContrastiveLoss": {
            "pos_margin": one((0.0, 0.3, 0.9)), "neg_margin": one((1.0, 0.4, 0.2)),
            "distance": one(("euclidean", "cosine")), "power": one((1, 2)),
        },
        "SNRContrastiveLoss": {
            "pos_margin": one((0.0, 0.3)), "neg_margin": one((1.0, 2.0)), "regularizer_weight": one((0.0, 0.1))
        },
        "TripletMarginLoss": _triplets(r),
        "BinomialDevianceLoss": {**ms, **mined},
        "BinLiftedLoss": {**ms, "normalized": one((False, True))},
        "MinedPairLoss": {"epsilon": one((0.0, 0.1, 0.5)), "weights": one(("unit", "row_mean"))},
        "NCALoss": {"softmax_scale": one((1.0, 16.0)), "distance": one(("squared_euclidean", "cosine"))},
        "NTXentLoss": {"temperature": one((0.07, 0.5, 0.01))},
        "SupConLoss": {"temperature": one((0.1, 0.5)), "base_temperature": one((None, 0.07))},
        "CircleLoss": {"m": one((0.4, 0.25)), "gamma": one((8.0, 80.0, 256.0)), "over": one(("anchors", "batch"))},
        "TupletMarginLoss": {"margin": one((5.73, 20.0)), "scale": one((16.0, 64.0))},
        "IntraPairVarianceLoss": {"pos_eps": one((0.01, 0.2)), "neg_eps": one((0.01, 0.2))},
        "MarginLoss": {
            "margin": one((0.2, 0.5)), "nu": one((0.0, 0.05)), "beta": one((1.2, 0.7)),
            "mode": one(("pairs", "triplets")), "learn_beta": one((False, True)),
        },
        "AngularLoss": {"alpha": one((30.0, 40.0, 45.0)), "form": one(("logsumexp", "hinge"))},
        "HistogramLoss": {"n_bins": one((1, 8, 100))},
        "FastAPLoss": {"num_bins": one((1, 10, 17))},
        "NormalizedSoftmaxLoss": {"temperature": one((0.05, 0.5))},
        "CosFaceLoss": {"margin": one((0.35, 0.0)), "scale": one((8.0, 64.0))},
        "ArcFaceLoss": {
            "margin": one((28.6, 0.0, 100.0)), "scale": one((8.0, 64.0)), "fallback": one((True, False))
        },
        "SphereFaceLoss": {"margin": one((1, 2, 4)), "scale": one((1.0, 8.0)), "lam": one((0.0, 5.0))},
        "ProxyNCALoss": {"softmax_scale": one((1.0, 8.0)), "include_positive": one((False, True))},
        "ProxyAnchorLoss": {"margin": one((0.1, 0.3)), "alpha": one((4.0, 32.0))},
        "SoftTripleLoss": {
            "centers_per_class": one((1, 3)), "la": one((5.0, 20.0)), "gamma": one((0.1, 1.0)),
            "margin": one((0.01, 0.2)), "tau": one((0.0, 0.2)),
        },
    }[name]  # fmt: skip


def _triplets(r: random.Random) -> dict[str, Any]:
    found = {
        "margin": r.choice((0.0, 0.2, 1.0)), "distance": r.choice(("euclidean", "cosine")),
        "triplets": r.choice(("all", "hard", "semihard", "semihard_all")), "smooth": False, "power": 1,
    }  # fmt: skip
    if found["triplets"] in ("all", "hard"):
        found["smooth"] = r.choice((False, True))
    if found["distance"] == "euclidean":
        found["power"] = r.choice((1, 2))
    return found


def draw(seed: int, impls: tuple[str, ...]) -> Case:
    r = random.Random(seed)
    name = r.choice((*PAIR_LOSSES, *CLASS_LOSSES))
    of_classes = name in CLASS_LOSSES
    options = _options(r, name)
    kind = getattr(flashpair, name)
    options["reduction"] = r.choice(kind.averagings)
    normalize = r.random() < 0.8 or options.get("form") == "hinge"
    options["normalize"] = normalize
    if options.get("pos_margin", 0) is None:
        options["reduction"] = "mean"
    if r.random() < 0.3 and not of_classes:
        learn = [w for w in LEARNED if isinstance(options.get(w), float)]
        fixed = name in ("SNRContrastiveLoss", "AngularLoss", "TupletMarginLoss", "IntraPairVarianceLoss")
        options["learn"] = [
            w for w in learn if r.random() < 0.5 and not fixed and not (name == "MarginLoss" and w == "beta")
        ]
    if of_classes:
        options["classes"] = r.choice((1, 2, 5, 33))
    else:
        options["refs"] = r.choice(("none", "none", "tensor", "tensor", "References", "Streamed"))
        if name in WITHIN_BATCH:
            options["refs"] = "none"
        if options["refs"] == "Streamed":
            options["block"] = r.choice((1, 3, 16, 100))
            if name == "NPairsLoss":
                options["l2_weight"] = 0.0
    impl = r.choice(impls)
    if name == "SoftTripleLoss":
        impl = r.choice(("tiled", "auto"))
    if options.get("refs") == "Streamed" and impl == "screened":
        impl = "tiled"
    heavy = name in ("AngularLoss", "TripletMarginLoss")
    case = Case(
        "loss", seed, name, options, **draw_shape(r, 129 if heavy else 513, options.get("refs", "none") != "none"),
        dtype=r.choice(("float32", "float32", "float64", "float16", "bfloat16")), labels=r.choice(LABELS),
        changes=draw_changes(r, True), layout=r.choice(LAYOUTS[:4] * 3 + LAYOUTS), impl=impl,
        threads=r.choice((1, 2)), need=r.choice(([True, True], [True, True], [True, False], [False, True])),
    )  # fmt: skip
    return maybe_fused(case)


def criterion(case: Case, d: int, impl: str, wide: bool) -> torch.nn.Module:
    """The case's criterion, with the same parameters in float64 (of the case's own) if `wide`."""
    options = {k: v for k, v in case.options.items() if k not in ("refs", "block", "learn", "classes")}
    learned = {w: torch.nn.Parameter(torch.tensor(options.pop(w))) for w in case.options.get("learn", ())}
    kind = getattr(flashpair, case.name)
    if case.name in CLASS_LOSSES:
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(case.seed)
            made = kind(case.options["classes"], d, **options, impl=impl)
    else:
        made = kind(**options, **learned, impl=impl)
    return copy.deepcopy(made).double() if wide or case.dtype == "float64" else made


def inputs(case: Case) -> Batch:
    return batch(case, case.options.get("classes", 0))


def evaluate(case: Case, given: Batch, impl: str, wide: bool = False) -> dict[str, Tensor]:
    """Loss and gradients in float64. wide: all of it is computed in float64.

    A sample against which others are compared has the reference's own tensors for References and streams.
    """
    x, labels, y, ref_labels = given
    if wide:
        x, y = x.double(), None if y is None else y.double()
    made = criterion(case, x.shape[1], impl, wide)
    need = [True, True] if wide else case.need  # a truth's scales need the pairs' weights
    x = x.detach().requires_grad_(need[0])
    refs = case.options.get("refs", "none")
    more: dict[str, Any] = {}
    plain = impl == "reference" or refs in ("none", "tensor")
    if y is not None and plain:
        y = y.detach().requires_grad_(need[1] and refs == "tensor")
        more = {"ref_emb": y, "ref_labels": ref_labels}
    elif y is not None and refs == "References":
        more = {"ref_emb": References(y, ref_labels)}
    elif y is not None:
        more = {"ref_emb": StreamedReferences(y, ref_labels, block=case.options["block"])}
    with scales.watched() as seen:
        loss = made(x, labels, **more)
    found = {"loss": loss.detach().double()}
    learned = {k: v for k, v in _learned(made)}
    wanted = {"dx": x, "dy": y, **{f"d {k}": v for k, v in learned.items()}}
    wanted = {k: t for k, t in wanted.items() if t is not None and t.requires_grad}
    if loss.requires_grad and wanted:
        upstream = torch.randn(loss.shape, generator=generator(case, "upstream"), dtype=torch.float64)
        grads = torch.autograd.grad(
            loss, list(wanted.values()), upstream.to(loss.dtype), allow_unused=True, retain_graph=wide
        )
        for (k, t), g in zip(wanted.items(), grads, strict=True):
            if wide and k in ("dx", "dy") and not case.need[k == "dy"]:
                continue
            found[k] = torch.zeros_like(t, dtype=torch.float64) if g is None else g.detach().double()
        if wide:
            found |= _scales(
                case, made, seen, {"dx": x.detach(), **({} if y is None else {"dy": y.detach()})}, loss, upstream
            )
    return found


def _scales(
    case: Case, made: Any, seen: Any, raw: dict[str, Tensor], loss: Tensor, upstream: Tensor
) -> dict[str, Tensor]:
    w = scales.weights(seen, loss, upstream)
    if w is None:
        return {}
    if case.name not in CLASS_LOSSES:
        of = scales.scales(seen[0], w, raw, made.normalize, "dy" not in raw, upstream)
        if case.name == "FastAPLoss":  # 1 less the precision
            of["loss"] = of["loss"] + (len(raw["dx"]) if made.reduction == "sum" else 1)
        of |= {f"d {k}": of["d"] / value.detach().abs().clamp(1e-300, 1) for k, value in _learned(made)}
        return {f"scale {k}": v for k, v in of.items()}
    weight = made.weight.detach().flatten(0, -2)
    sides = {"dx": raw["dx"] if made.normalize else None, "d weight": weight}
    if case.name == "ProxyAnchorLoss":  # whose anchors are the proxies
        sides = dict(reversed(sides.items()))
    if case.name == "SoftTripleLoss":
        w = torch.maximum(w, _of_softmaxes(made, seen[0].z.detach(), w))
    of = scales.scales(seen[0], w, {}, True, False, upstream)
    for mine, (name, rows) in zip(("dx", "dy"), list(sides.items()), strict=True):
        of[f"of {name}"] = of.pop(mine) * (1 if rows is None else inverse_norm(rows)[:, 0])
    if case.name == "SoftTripleLoss":
        of["of d weight"] = of["of d weight"] + _of_centres(made, len(raw["dx"]), upstream)
    return {f"scale {k.removeprefix('of ')}": v for k, v in of.items()}


def _of_softmaxes(made: Any, s: Tensor, w: Tensor) -> Tensor:
    """SoftTriple's weights (B, C K) before the terms of dS/ds_k = pi_k (1 + s_k / gamma - S / gamma) cancel."""
    s, w = (t.unflatten(1, made.weight.shape[:2]) for t in (s, w))
    share = torch.softmax(s / made.gamma, 2)
    size = s.abs() + (share * s).sum(2, keepdim=True).abs()
    return (w.sum(2, keepdim=True) * share * (1 + size / made.gamma)).flatten(1)


def _of_centres(made: Any, rows: int, upstream: Tensor) -> Tensor:  # (C K,)
    """What SoftTriple's regulariser gives to each centre's gradient before it cancels."""
    w = unit(made.weight.detach())
    count = w.shape[1]
    apart = (2 + 1e-5 - 2 * torch.bmm(w, w.transpose(1, 2))).rsqrt() * (1 - torch.eye(count))
    each = made.tau * apart.sum(2).flatten() / max(len(w) * count * (count - 1), 1)
    times = upstream.abs().sum() * (rows if made.reduction == "sum" else 1)
    return times * each * inverse_norm(made.weight.detach().flatten(0, 1))[:, 0]


def _learned(made: torch.nn.Module) -> list[tuple[str, Tensor]]:
    """Parameters, and the tensors that are hyper-parameters."""
    found = dict(made.named_parameters())
    for name in LEARNED:
        value = getattr(made, name, None)
        if isinstance(value, Tensor) and value.requires_grad:
            found[name] = value
    return sorted(found.items())
