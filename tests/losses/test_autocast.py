"""Autocast changes no loss, gradient or weight: the loss is computed in float32."""

from __future__ import annotations

import pytest
import torch
from conftest import needs_extension
from helpers import CRITERIA, batch
from loss_cases import IMPLS
from torch import nn

import flashpair
from flashpair.tools.check import value_and_gradient


@pytest.mark.parametrize("impl", IMPLS)
def test_autocast_changes_nothing(impl):
    x, labels = batch(40, 8, 4, torch.float32)
    for make in CRITERIA.values():
        truth = value_and_gradient(make(impl=impl), x, labels)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = make(impl=impl)(x.requires_grad_(), labels)
        assert loss.dtype == torch.float32
        assert torch.equal(loss, truth[0])
        assert torch.equal(torch.autograd.grad(loss, x)[0], truth[1])
        x = x.detach()


@needs_extension
def test_autocast_changes_no_second_derivative_primitive_or_weight():
    x, labels = batch(40, 8, 4, torch.float32)
    criterion = flashpair.MultiSimilarityLoss(impl="tiled")
    reduction = flashpair.Reduction("logsumexp", "negatives")

    def everything(y):
        (first,) = torch.autograd.grad(criterion(y, labels), y, create_graph=True)
        rows = [flashpair.row_reduce(x, labels, reduction, impl=impl)[0] for impl in ("tiled", "reference")]
        return [first, *rows, flashpair.pair_weights(criterion, x, labels)]

    y = x.clone().requires_grad_()
    truth = everything(y)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = everything(y)
    for results in (truth, found):  # outside of autocast, as PyTorch wants a backward to be
        results.append(torch.autograd.grad(results[0].square().sum(), y)[0])
    for f, t in zip(found, truth, strict=True):
        assert f.dtype == torch.float32
        torch.testing.assert_close(f, t, rtol=1e-4, atol=1e-6)  # bfloat16 would be off by 1e-2


@needs_extension
def test_mixed_precision_training_step():
    """bfloat16 activations from autocast against a float32 bank: computed in float32, gradients in bfloat16."""
    layer = nn.Linear(8, 8)
    x, labels = batch(40, 8, 4, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        embeddings = layer(x)
        loss = flashpair.MultiSimilarityLoss()(embeddings, labels, ref_emb=x, ref_labels=labels)
    assert embeddings.dtype == torch.bfloat16
    loss.backward()
    assert layer.weight.grad.isfinite().all() and layer.weight.grad.any()
