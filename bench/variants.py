"""Who runs: a variant is a function of the case that returns a criterion, called as flashpair's are.

One's own is named `module:function` on the command line, and checked, limited and timed like the rest.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

import flashpair as fp

from .cases import Batch, Case
from .floor import floor_products, make_floor
from .options import FLOORS

Step = Callable[[], Any]
CRITERIA: dict[str, Callable[..., torch.nn.Module]] = {
    "ms": fp.MultiSimilarityLoss,
    "ms_weighting": partial(fp.MultiSimilarityLoss, epsilon=None),
    "n_pairs": fp.NPairsLoss,
    "lifted": fp.LiftedStructureLoss,
    "generalized_lifted": fp.GeneralizedLiftedStructureLoss,
    "lifted_star": fp.LiftedStructureStarLoss,
}


class NotThere(Exception):
    """This variant does not have this loss, or not on this machine; the message says why."""


def criterion(case: Case, impl: str) -> torch.nn.Module:
    return CRITERIA[case.options.loss](impl=impl)


def _fused(case: Case) -> Callable[..., Tensor]:
    return criterion(case, "auto")


def _reference(case: Case) -> Callable[..., Tensor]:
    return criterion(case, "reference")


def _compiled(case: Case, mode: str = "default") -> Callable[..., Tensor]:
    return torch.compile(criterion(case, "reference"), dynamic=False, mode=mode)


def _pml(case: Case) -> Callable[..., Tensor]:
    """pytorch-metric-learning's loss where it has one with the same formula."""
    try:
        from pytorch_metric_learning import distances, losses, miners
    except ImportError as error:
        raise NotThere(f"pytorch-metric-learning is not installed: {error}") from error
    loss = case.options.loss
    if loss == "n_pairs" and not case.square:
        raise NotThere("its NPairsLoss takes no references")
    miner = miners.MultiSimilarityMiner(epsilon=0.1) if loss == "ms" else None
    if loss in ("ms", "ms_weighting"):
        function = losses.MultiSimilarityLoss(alpha=2, beta=50, base=0.5, distance=distances.CosineSimilarity())
    elif loss == "n_pairs":
        function = losses.NPairsLoss(distance=distances.DotProductSimilarity(normalize_embeddings=False))
    elif loss == "lifted":
        distance = distances.LpDistance(normalize_embeddings=False)
        function = losses.LiftedStructureLoss(neg_margin=1, pos_margin=0, distance=distance)
    elif loss == "generalized_lifted":  # its margins are subtracted on either side: 1 - s and s - 0
        cosine = distances.CosineSimilarity()
        function = losses.GeneralizedLiftedStructureLoss(neg_margin=0, pos_margin=1, distance=cosine)
    else:
        raise NotThere("it has no loss of this formula")

    def call(x: Tensor, labels: Tensor, ref_emb: Tensor | None = None, ref_labels: Tensor | None = None) -> Tensor:
        mined = None if miner is None else miner(x, labels, ref_emb, ref_labels)
        return function(x, labels, mined, ref_emb, ref_labels)

    return call


def _flex(case: Case) -> Callable[..., Tensor]:
    """FlexAttention's log-sum-exps, where they are all that a loss needs. Its block masks are made once, untimed."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    o = case.options
    if o.loss != "ms_weighting" or not case.square:
        raise NotThere("its log-sum-exps express Multi-Similarity without mining, of a batch against itself")
    if o.device != "cuda":
        raise NotThere("it has no backward on the CPU")
    compiled, masks, mine = torch.compile(flex_attention, dynamic=False), {}, criterion(case, "reference")

    def logsumexp(x: Tensor, scale: float, mask: Any) -> Tensor:
        row = x[None, None]
        return compiled(row, row, row, scale=scale, block_mask=mask, return_lse=True)[1][0, 0]

    def call(x: Tensor, labels: Tensor) -> Tensor:
        if not masks:
            n = labels.shape[0]

            def positive(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
                return (labels[i] == labels[j]) & (i != j)

            def negative(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
                return labels[i] != labels[j]

            for name, rule in (("positives", positive), ("negatives", negative)):
                masks[name] = create_block_mask(rule, None, None, n, n, device=labels.device, _compile=True)
        unit = torch.nn.functional.normalize(x)
        pos = logsumexp(unit, -mine.alpha, masks["positives"]).float()
        neg = logsumexp(unit, mine.beta, masks["negatives"]).float()
        softplus = torch.nn.functional.softplus
        rows = softplus(pos + mine.alpha * mine.base) / mine.alpha + softplus(neg - mine.beta * mine.base) / mine.beta
        return rows.mean()

    return call


def _inf_cl(case: Case) -> Callable[..., Tensor]:
    """inf_cl's contrastive loss is the N-pair loss: its rows are one anchor, its columns one positive a class."""
    if case.options.loss != "n_pairs" or not case.square:
        raise NotThere("its one loss is N-pair's")
    if case.options.device != "cuda":
        raise NotThere("its kernels need a GPU")
    try:
        from inf_cl import cal_flash_loss
    except ImportError as error:
        raise NotThere(f"inf_cl is not installed: {error}") from error

    def call(x: Tensor, labels: Tensor) -> Tensor:
        order = torch.sort(labels, stable=True).indices
        start = torch.searchsorted(labels[order], torch.unique(labels))
        return cal_flash_loss(x[order[start]], x[order[start + 1]], scale=1.0, head_dim=case.d).mean()

    return call


REGISTRY: dict[str, Callable[[Case], Callable[..., Tensor]]] = {
    "flashpair": _fused,
    "reference": _reference,
    "compiled": _compiled,
    "pytorch-metric-learning": _pml,
    "flex-attention": _flex,
    "inf-cl": _inf_cl,
    "flashpair-onchip": partial(criterion, impl="onchip"),
    "flashpair-fused": partial(criterion, impl="fused"),
    "flashpair-tiled": partial(criterion, impl="tiled"),
    "flashpair-screened": partial(criterion, impl="screened"),
    "compiled-max-autotune": partial(_compiled, mode="max-autotune"),  # with CUDA graphs
}


def training_step(call: Callable[..., Tensor], batch: Batch, backward: bool = True) -> Step:
    """Forward and, if wanted, backward; the gradient is left in ``batch.x.grad``, fresh each time."""
    refs = {} if batch.y is None else {"ref_emb": batch.y, "ref_labels": batch.ref_labels}

    def step() -> Tensor:
        batch.x.grad = None
        loss = call(batch.x, batch.labels, **refs)
        if backward:
            loss.backward()
        return loss.detach()

    return step


def make_step(variant: str, case: Case, batch: Batch) -> Step:
    """Raises NotThere."""
    if variant in FLOORS:
        return make_floor(case, batch, floor_products(case, variant))
    if variant in REGISTRY:
        return training_step(REGISTRY[variant](case), batch, case.options.backward)
    module, _, name = variant.partition(":")
    return training_step(getattr(importlib.import_module(module), name)(case), batch, case.options.backward)
