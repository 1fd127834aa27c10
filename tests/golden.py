"""Maps the oracle's cases (golden.json: naive float64 values and gradients) onto the library."""

from __future__ import annotations

import json
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


BUILDERS: dict[str, Callable[[dict[str, Any]], flashpair.Criterion]] = {
    "npair_mc": lambda p: flashpair.NPairsLoss("mc"),
    "npair_mc_normalized": lambda p: flashpair.NPairsLoss("mc", normalize=True),
    "npair_mc_l2": lambda p: flashpair.NPairsLoss("mc", l2_weight=p["l2"], l2_kind=p["l2_kind"]),
    "npair_ovo": lambda p: flashpair.NPairsLoss("ovo"),
    "npair_nxm_all_pairs": lambda p: flashpair.NPairsLoss("all_pairs"),
    "lifted_song": lambda p: flashpair.LiftedStructureLoss(p["margin"], normalize=True),
    "lifted_song_raw": lambda p: flashpair.LiftedStructureLoss(p["margin"]),
    "lifted_general": lambda p: flashpair.GeneralizedLiftedStructureLoss(
        p["margin"], "euclidean", reduction=p["reduction"]
    ),
    "lifted_general_sim": lambda p: flashpair.GeneralizedLiftedStructureLoss(
        p["lam"], "cosine", reduction=p["reduction"]
    ),
    "lifted_star": lambda p: _star(p, None),
    "lifted_star_m": lambda p: _star(p, p["eps"]),
    "ms": lambda p: _ms(p, p["eps"]),
    "ms_weighting": lambda p: _ms(p, None),
}


def criterion_for(case: dict[str, Any], golden: dict[str, Any]) -> Callable[[Tensor, Tensor], Tensor]:
    """The library's loss of a case, a callable of raw embeddings (m, d) float64 and labels (m,) int64.

    Raises:
        KeyError: a loss that the library does not have yet.
    """
    return BUILDERS[case["loss"]](case["params"])


def batch(case: dict[str, Any], golden: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """The case's raw embeddings (m, d) float64 and labels (m,) int64."""
    found = golden["batches"][case["batch"]]
    return torch.tensor(found["x"], dtype=torch.float64), torch.tensor(found["labels"])


def gradient(case: dict[str, Any]) -> Tensor:
    """The case's gradient in the raw embeddings (m, d); N-pair cases list anchors and positives apart."""
    found = case["grad_raw"]
    if "x" in found:
        return torch.tensor(found["x"], dtype=torch.float64)
    pairs = torch.tensor([found["anchors"], found["positives"]], dtype=torch.float64)
    return pairs.transpose(0, 1).reshape(-1, pairs.shape[-1])
