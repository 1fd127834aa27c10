"""The variants. A variant is a function of the case that returns a criterion, called as flashpair's are.

Your own variant is named `module:function` on the command line. It is checked, limited and timed like the others.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..studies.family_cases import FAMILY
from .baselines import NotThere, make_baseline
from .cases import Batch, Case
from .gemm_bound import bound_products, make_gemm_bound
from .options import GEMM_BOUNDS

Step = Callable[[], Any]


def criterion(case: Case, impl: str) -> torch.nn.Module:
    o = case.options
    return FAMILY[o.loss].build(impl, o.num_classes, case.d, o.seed).to(o.device)


def _fused(case: Case) -> Callable[..., Tensor]:
    return criterion(case, "auto")


def _reference(case: Case) -> Callable[..., Tensor]:
    return criterion(case, "reference")


def _compiled(case: Case, mode: str = "default") -> Callable[..., Tensor]:
    return torch.compile(criterion(case, "reference"), dynamic=False, mode=mode)


def _flex(case: Case) -> Callable[..., Tensor]:
    """FlexAttention's log-sum-exps, for a loss that needs nothing else. Its block masks are made once, untimed."""
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
    "pytorch-metric-learning": make_baseline,
    "flex-attention": _flex,
    "inf-cl": _inf_cl,
    "flashpair-onchip": partial(criterion, impl="onchip"),
    "flashpair-fused": partial(criterion, impl="fused"),
    "flashpair-tiled": partial(criterion, impl="tiled"),
    "flashpair-screened": partial(criterion, impl="screened"),
    "compiled-max-autotune": partial(_compiled, mode="max-autotune"),  # with CUDA graphs
}


class TrainingStep:
    """Forward and, if `backward`, backward.

    It leaves a new gradient in ``batch.x.grad``, and in the class weights if there are any.
    """

    def __init__(self, call: Callable[..., Tensor], batch: Batch, backward: bool = True) -> None:
        self.call, self.batch, self.backward = call, batch, backward
        self.refs = {} if batch.y is None else {"ref_emb": batch.y, "ref_labels": batch.ref_labels}
        self.weight: Tensor | None = getattr(call, "weight", None)

    def forget(self) -> None:
        self.batch.x.grad = None
        if self.weight is not None:
            self.weight.grad = None

    def __call__(self) -> Tensor:
        self.forget()
        loss = self.call(self.batch.x, self.batch.labels, **self.refs)
        if self.backward:
            loss.backward()
        return loss.detach()

    def weight_gradient(self) -> Tensor | None:
        """The gradient of class weights in flashpair's layout (C, D), a row a class or centre; None without weights."""
        if self.weight is None or self.weight.grad is None:
            return None
        return getattr(self.call, "as_ours", lambda g: g.flatten(0, -2))(self.weight.grad)

    def gradient_bytes(self) -> int:
        found = (self.batch.x.grad, None if self.weight is None else self.weight.grad)
        return sum(g.nbytes for g in found if g is not None)


training_step = TrainingStep


def make_step(variant: str, case: Case, batch: Batch) -> Step:
    """Raises NotThere."""
    if variant in GEMM_BOUNDS:
        return make_gemm_bound(case, batch, bound_products(case, variant))
    if variant in REGISTRY:
        return training_step(REGISTRY[variant](case), batch, case.options.backward)
    module, _, name = variant.partition(":")
    return training_step(getattr(importlib.import_module(module), name)(case), batch, case.options.backward)
