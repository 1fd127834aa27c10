"""Bits of the interpreted Triton kernels: accuracy by dtype, both passes alike, ties, NaN, the same bits each time."""

from __future__ import annotations

import interpreted_kernels
import pytest
import torch
from helpers import (
    CRITERIA,
    assert_as_good_as,
    batch,
)
from interpreted_kernels import both, interpreted_alone

from flashpair import Bound, MultiSimilarityLoss, Reduction, row_reduce
from flashpair.engine.dispatch import interpreted
from flashpair.tools.check import value_and_gradient

pytest.importorskip("triton")
pytestmark = interpreted_alone

if interpreted():
    from flashpair.backends.triton import launch

schedule = interpreted_kernels.schedule
tiles = interpreted_kernels.tiles


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["MultiSimilarityLoss", "GeneralizedLiftedStructureLoss(distance='euclidean')"])
def test_as_accurate_as_dense_code_of_the_same_precision(name, dtype, schedule, tiles):
    """float16 stays float16 up to the products; the truth is of the rows that the kernels get, rounded once."""
    x, labels = batch(150, 24, 4, dtype)
    if dtype == torch.float16:
        x = torch.nn.functional.normalize(x.float()).half()
    options = {"normalize": dtype != torch.float16}
    truth = value_and_gradient(CRITERIA[name](impl="reference", **options), x.double(), labels)
    eager = value_and_gradient(CRITERIA[name](impl="reference", **options), x, labels)
    found = value_and_gradient(CRITERIA[name](impl="fused", **options), x, labels)
    assert found[0].dtype == torch.float32 and found[1].dtype == dtype
    for f, e, t in zip(found, eager, truth, strict=True):
        assert_as_good_as(f, e, t)


def _tf32(t):
    """As the tensor cores read float32: the last 13 bits are not there."""
    return (t.view(torch.int32) & -0x2000).view(torch.float32)


def _split_product(x, round_leading, cut):
    leading = round_leading(x)
    rest = cut(x - leading)
    a, b = leading.double(), rest.double()
    return a @ a.T + (a @ b.T + b @ a.T)


def test_three_tf32_products_are_float32_and_three_bfloat16_ones_are_not():
    """Why float32 is split in tf32: of two the cheaper one loses 7 bits."""
    x = torch.nn.functional.normalize(torch.randn(400, 128, generator=torch.Generator().manual_seed(0)))

    def leading_bits(t):  # kernels/similarity.py's, in torch
        return ((t.view(torch.int32) + 0x1000) & -0x2000).view(torch.float32)

    def bfloat16(t):
        return t.bfloat16().float()

    truth = x.double() @ x.double().T
    single = ((x @ x.T).double() - truth).abs().max()
    assert torch.equal(_tf32(leading_bits(x)), leading_bits(x))
    assert (_split_product(x, leading_bits, _tf32) - truth).abs().max() <= 2 * single
    assert (_split_product(x, bfloat16, bfloat16) - truth).abs().max() > 10 * single


def test_float32_is_multiplied_as_torch_is_told_to():
    assert launch.precision(torch.float32) == "split"
    assert launch.precision(torch.float64) == launch.precision(torch.bfloat16) == "ieee"
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        assert launch.precision(torch.float32) == "tf32"
    finally:
        torch.set_float32_matmul_precision(before)
    assert launch.precision(torch.float32) == "split"
    try:
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        assert launch.precision(torch.float32) == "tf32"
    finally:
        torch.backends.cuda.matmul.fp32_precision = "ieee"


@both
def test_backward_sees_the_bits_that_forward_saw(schedule, tiles):
    """A window at exactly a similarity: its own pair stays outside in both passes, and a hair under it, inside.

    Of whole sixteenths, whose products are exact: the interpreter's are numpy's, whose bits hang on a block's shape and
    on the processor. tests/backends/triton/test_gpu.py has real ones.
    """
    x, labels = batch(90, 40, 4, torch.float32)
    x = (16 * x).round() / 16
    highest = Reduction("max", "negatives", detach=True)
    for shift, nothing in ((0.0, True), (-1e-3, False)):
        a = x.clone().requires_grad_()
        r = Reduction("sum", "negatives", scale=2.0, lower=Bound(highest, shift))
        rows = row_reduce(a, labels, highest, r, impl="fused")[1]
        (grad,) = torch.autograd.grad(rows.sum(), a)
        assert (rows == 0).all() == nothing
        assert (grad == 0).all() == nothing


@both
@pytest.mark.parametrize("op", ["min", "max"])
def test_equal_extremes_send_their_gradient_to_the_lowest_index(op, schedule, tiles):
    x = torch.tensor([[1.0, 0.0], [0.5, 0.5], [0.5, 0.5], [0.5, 0.5]], dtype=torch.float64)
    labels = torch.tensor([5, 9, 1, 3])
    (row,) = row_reduce(x.requires_grad_(), labels, Reduction(op, "negatives"), impl="fused")
    (grad,) = torch.autograd.grad(row[0], x)
    assert torch.equal(grad[1], torch.tensor([1.0, 0.0], dtype=torch.float64))
    assert not grad[2:].any()


@both
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_shows_everywhere(bad, schedule, tiles):
    x, labels = batch(70, 5, 4, torch.float64)
    x[3, 1] = bad
    for make in (MultiSimilarityLoss, CRITERIA["LiftedStructureLoss"]):
        loss, grad = value_and_gradient(make(impl="fused"), x, labels)
        assert loss.isnan() and grad.isnan().all()


@both
def test_same_bits_every_time(schedule, tiles):
    x, labels = batch(90, 7, 4, torch.float32)
    first = value_and_gradient(MultiSimilarityLoss(impl="fused"), x, labels)
    for _ in range(3):
        again = value_and_gradient(MultiSimilarityLoss(impl="fused"), x, labels)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
