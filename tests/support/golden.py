"""Maps the oracle's cases (golden.json: naive float64 values and gradients) onto the library."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import flashpair

PATH = Path(__file__).with_name("golden.json")


def load() -> dict[str, Any]:
    return json.loads(PATH.read_text())


def _ms(p: dict[str, Any], epsilon: float | None) -> flashpair.Criterion:
    return flashpair.MultiSimilarityLoss(p["alpha"], p["beta"], p["lam"], epsilon, reduction=p["reduction"])


def _star(p: dict[str, Any], epsilon: float | None) -> flashpair.Criterion:
    return flashpair.LiftedStructureStarLoss(p["alpha"], p["beta"], epsilon, reduction=p["reduction"])


def _contrastive(p: dict[str, Any]) -> flashpair.Criterion:
    pos_margin = p["pos_offset"] if "pos_offset" in p else None
    return flashpair.ContrastiveLoss(pos_margin, p["lam"], "cosine", reduction=p["reduction"])


def _margins(p: dict[str, Any], distance: str) -> flashpair.Criterion:
    return flashpair.ContrastiveLoss(p["m_pos"], p["m_neg"], distance, p.get("power", 1), reduction=p["reduction"])


def _triplets(triplets: str, distance: str = "euclidean", power: int = 1, **fixed: str) -> Builder:
    return lambda p, golden: flashpair.TripletMarginLoss(
        p["margin"], distance, triplets, p.get("soft", False), power, **{"reduction": p.get("reduction"), **fixed}
    )


def _binomial(p: dict[str, Any], epsilon: float | None) -> flashpair.Criterion:
    return flashpair.BinomialDevianceLoss(p["alpha"], p["beta"], p["lam"], epsilon, reduction=p["reduction"])


def _nca(p: dict[str, Any], distance: str) -> flashpair.Criterion:
    return flashpair.NCALoss(p.get("scale", 1.0), distance, reduction=p["reduction"])


def _supcon(p: dict[str, Any], base: float | None) -> flashpair.Criterion:
    return flashpair.SupConLoss(p["tau"], base, reduction=p["reduction"])


def _margin(p: dict[str, Any]) -> flashpair.Criterion:
    beta = torch.tensor(p["beta"], dtype=torch.float64)
    several = len(p["beta"]) > 1
    return flashpair.MarginLoss(
        p["alpha"], p.get("nu", 0.0), beta if several else beta[0], p["mode"], True, len(beta) if several else None
    )


def _classes(make: Callable[..., flashpair.ClassCriterion], table: str = "proxies") -> Builder:
    """A criterion of class weights, which are the oracle's."""

    def build(p: dict[str, Any], golden: dict[str, Any]) -> flashpair.Criterion:
        weight = torch.tensor(golden[table], dtype=torch.float64)
        criterion = make(weight.shape[0], weight.shape[-1], p)
        assert criterion.weight.shape == weight.shape
        criterion.weight = torch.nn.Parameter(weight)
        return criterion

    return build


class _Soft(torch.nn.Module):
    """N-pair with soft labels: anchors and positives, by turns, whose classes may come up twice."""

    def __init__(self, labels: list[int]) -> None:
        super().__init__()
        self.inner, self.labels = flashpair.NPairsLoss("softlabel"), torch.tensor(labels)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return self.inner(x[::2], self.labels, ref_emb=x[1::2], ref_labels=self.labels)


class _OneTuplet(torch.nn.Module):
    """An anchor, its positive, and negatives, one below the other."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = flashpair.NPairsLoss("all_pairs")

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return self.inner(x[:1], labels[:1], ref_emb=x[1:], ref_labels=labels[1:])


Builder = Callable[[dict[str, Any], dict[str, Any]], torch.nn.Module]
BUILDERS: dict[str, Builder] = {
    "npair_mc": lambda p, g: flashpair.NPairsLoss("mc"),
    "npair_mc_normalized": lambda p, g: flashpair.NPairsLoss("mc", normalize=True),
    "npair_mc_l2": lambda p, g: flashpair.NPairsLoss("mc", l2_weight=p["l2"], l2_kind=p["l2_kind"]),
    "npair_ovo": lambda p, g: flashpair.NPairsLoss("ovo"),
    "npair_nxm_all_pairs": lambda p, g: flashpair.NPairsLoss("all_pairs"),
    "npair_softlabel": lambda p, g: _Soft(p["labels"]),
    "tuplet_n1": lambda p, g: _OneTuplet(),
    "lifted_song": lambda p, g: flashpair.LiftedStructureLoss(p["margin"], normalize=True),
    "lifted_song_raw": lambda p, g: flashpair.LiftedStructureLoss(p["margin"]),
    "lifted_general": lambda p, g: flashpair.GeneralizedLiftedStructureLoss(
        p["margin"], "euclidean", reduction=p["reduction"]
    ),
    "lifted_general_sim": lambda p, g: flashpair.GeneralizedLiftedStructureLoss(
        p["lam"], "cosine", reduction=p["reduction"]
    ),
    "lifted_star": lambda p, g: _star(p, None),
    "lifted_star_m": lambda p, g: _star(p, p["eps"]),
    "ms": lambda p, g: _ms(p, p["eps"]),
    "ms_weighting": lambda p, g: _ms(p, None),
    "contrastive_sim": lambda p, g: _contrastive(p),
    "contrastive_sim_margins": lambda p, g: _margins(p, "cosine"),
    "contrastive_margins": lambda p, g: _margins(p, "euclidean"),
    "contrastive_margins_hadsell": lambda p, g: _margins(p, "euclidean"),
    "triplet_sim_all": _triplets("all", "cosine"),
    "triplet_all": _triplets("all"),
    "triplet_all_soft": _triplets("all"),
    "triplet_all_squared": _triplets("all", power=2),
    "triplet_batch_hard": _triplets("hard"),
    "triplet_batch_hard_soft": _triplets("hard"),
    "triplet_sim_batch_hard": _triplets("hard", "cosine"),
    "triplet_semihard_tf": _triplets("semihard", reduction="mean"),
    "triplet_semihard_all": _triplets("semihard_all", reduction="nonzero"),
    "binomial": lambda p, g: _binomial(p, None),
    "binomial_m": lambda p, g: _binomial(p, p["eps"]),
    "binlifted": lambda p, g: flashpair.BinLiftedLoss(p["alpha"], p["beta"], p["lam"], reduction=p["reduction"]),
    "ms_mining_only": lambda p, g: flashpair.MinedPairLoss(p["eps"], p["weights"], reduction=p["reduction"]),
    "nca_sim": lambda p, g: _nca(p, "cosine"),
    "nca_d2": lambda p, g: _nca(p, "squared_euclidean"),
    "ntxent": lambda p, g: flashpair.NTXentLoss(p["tau"], reduction=p["reduction"]),
    "simclr": lambda p, g: flashpair.NTXentLoss(p["tau"]),
    "supcon": lambda p, g: _supcon(p, None),
    "supcon_reference": lambda p, g: _supcon(p, p["tau"] / p["coef"]),
    "supcon_sum": lambda p, g: _supcon(p, None),
    "circle": lambda p, g: flashpair.CircleLoss(p["m"], p["gamma"], reduction=p["reduction"]),
    "circle_global": lambda p, g: flashpair.CircleLoss(p["m"], p["gamma"], "batch"),
    "tuplet_margin": lambda p, g: flashpair.TupletMarginLoss(math.degrees(p["beta_rad"]), p["scale"]),
    "intra_pair_variance": lambda p, g: flashpair.IntraPairVarianceLoss(p["eps_pos"], p["eps_neg"]),
    "margin": lambda p, g: _margin(p),
    "margin_per_class": lambda p, g: _margin(p),
    "angular_all_pairs": lambda p, g: flashpair.AngularLoss(p["alpha_deg"]),
    "angular_triplet_hinge": lambda p, g: flashpair.AngularLoss(p["alpha_deg"], "hinge"),
    "histogram": lambda p, g: flashpair.HistogramLoss(p["R"] - 1),
    "fastap": lambda p, g: flashpair.FastAPLoss(p["bins"], reduction=p["reduction"]),
    "snr_contrastive": lambda p, g: flashpair.SNRContrastiveLoss(
        p["m_pos"], p["m_neg"], p.get("reg", 0.0), normalize=p["normalize"], reduction=p["reduction"]
    ),
    "normalized_softmax": _classes(lambda c, d, p: flashpair.NormalizedSoftmaxLoss(c, d, p["temperature"])),
    "cosface": _classes(lambda c, d, p: flashpair.CosFaceLoss(c, d, p["m"], p["s"])),
    "arcface": _classes(lambda c, d, p: flashpair.ArcFaceLoss(c, d, math.degrees(p["m"]), p["s"], p["fallback"])),
    "sphereface": _classes(lambda c, d, p: flashpair.SphereFaceLoss(c, d, p["m"], lam=p["lam"])),
    "proxynca": _classes(lambda c, d, p: flashpair.ProxyNCALoss(c, d, include_positive=p["include_pos"])),
    "proxy_anchor": _classes(lambda c, d, p: flashpair.ProxyAnchorLoss(c, d, p["delta"], p["alpha"])),
    "soft_triple": _classes(
        lambda c, d, p: flashpair.SoftTripleLoss(c, d, 2, p["la"], p["gamma"], p["delta"], p["tau"]), "centers"
    ),
}


def criterion_for(case: dict[str, Any], golden: dict[str, Any]) -> Callable[[Tensor, Tensor], Tensor]:
    """The library's loss of a case, a callable of raw embeddings (m, d) float64 and labels (m,) int64.

    Raises:
        KeyError: a loss that the library does not have yet.
    """
    return BUILDERS[case["loss"]]({**case["params"], "normalize": case["normalize"]}, golden)


def batch(case: dict[str, Any], golden: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """The case's raw embeddings (m, d) float64 and labels (m,) int64."""
    if case["batch"] == "T":
        t = golden["tuplet"]
        rows = [t["anchor"], t["positive"], *t["negatives"]]
        return torch.tensor(rows, dtype=torch.float64), torch.tensor([0, 0, *range(1, len(rows) - 1)])
    found = golden["batches"][case["batch"]]
    return torch.tensor(found["x"], dtype=torch.float64), torch.tensor(found["labels"])


def gradient(case: dict[str, Any]) -> Tensor:
    """The case's gradient in the raw embeddings (m, d); N-pair cases list anchors and positives apart."""
    found = case["grad_raw"]
    if "x" in found:
        return torch.tensor(found["x"], dtype=torch.float64)
    if "anchor" in found:
        return torch.tensor([found["anchor"], found["positive"], *found["negatives"]], dtype=torch.float64)
    pairs = torch.tensor([found["anchors"], found["positives"]], dtype=torch.float64)
    return pairs.transpose(0, 1).reshape(-1, pairs.shape[-1])
