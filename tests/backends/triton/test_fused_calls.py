"""Calls of `fused` as autograd, torch.compile and users make them: some gradients, strided inputs, registered ops."""

from __future__ import annotations

import interpreted_kernels
import pytest
import torch
from helpers import (
    assert_same,
    batch,
)
from interpreted_kernels import both, interpreted_alone

import flashpair
from flashpair import MultiSimilarityLoss
from flashpair.core.call import compile_call, encode
from flashpair.engine.dispatch import interpreted
from flashpair.tools.check import value_and_gradient

pytest.importorskip("triton")
pytestmark = interpreted_alone

if interpreted():
    pass

schedule = interpreted_kernels.schedule
tiles = interpreted_kernels.tiles


@pytest.mark.parametrize("want", [(True, False), (False, True)], ids=str)
@both
def test_only_the_gradients_that_are_asked_for(want, schedule, tiles):
    x, labels = batch(40, 6, 4, torch.float64)
    y, ref_labels = batch(50, 6, 4, torch.float64, seed=1)
    grads = []
    for impl in ("fused", "reference"):
        a, b = x.clone().requires_grad_(want[0]), y.clone().requires_grad_(want[1])
        MultiSimilarityLoss(impl=impl)(a, labels, ref_emb=b, ref_labels=ref_labels).backward()
        assert (a.grad is not None, b.grad is not None) == want
        grads.append(a.grad if want[0] else b.grad)
    assert_same(*grads)


def test_fullgraph_compile_and_the_registered_ops(tiles):
    x, labels = batch(40, 6, 4, torch.float64)
    criterion = MultiSimilarityLoss(impl="fused")
    compiled = torch.compile(criterion, fullgraph=True, backend="aot_eager")
    found = value_and_gradient(compiled, x, labels)
    for f, t in zip(found, value_and_gradient(criterion, x, labels), strict=True):
        assert_same(f, t)


@both
def test_opcheck(schedule, tiles):
    plan = flashpair.core.label_order.make_label_order(torch.arange(40) // 4)
    x = torch.randn(40, 6, dtype=torch.float64)
    call = compile_call(flashpair.losses.mining._mined(2.0, 50.0, 0.1), "dot", "fused")
    arguments = (x, None, plan.lo, plan.hi, None, plan.ref_order, None, [], *encode(call), True)
    torch.library.opcheck(torch.ops.flashpair.row_reduce, arguments, test_utils=("test_schema", "test_faketensor"))
    values, *kept = torch.ops.flashpair.row_reduce(*arguments)
    grads = [None, values[1].clone(), None, values[3].clone()]
    more = (*arguments[:-1], values, *kept, grads, [True, False, False, False, False])
    torch.library.opcheck(torch.ops.flashpair.row_reduce_backward, more, test_utils=("test_schema", "test_faketensor"))


def test_inputs_are_not_written_and_may_be_strided(tiles):
    wide, labels = batch(71, 20, 4, torch.float64)
    before = wide.clone()
    for view in (wide[:, ::2], wide[1:], wide.T.contiguous().T, wide[:, 3:17]):
        own = labels[-view.shape[0] :]
        found = value_and_gradient(MultiSimilarityLoss(impl="fused"), view, own)
        truth = value_and_gradient(MultiSimilarityLoss(impl="reference"), view.clone(), own)
        for f, t in zip(found, truth, strict=True):
            assert_same(f, t)
    assert torch.equal(wide, before)


def test_without_the_interpreter_cpu_tensors_are_refused(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET")
    x, labels = batch(8, 4, 2, torch.float32)
    with pytest.raises(RuntimeError, match=r"fused needs a CUDA device \(or TRITON_INTERPRET=1"):
        MultiSimilarityLoss(impl="fused")(x, labels)
