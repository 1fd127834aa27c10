"""Soft histograms: against a dense one, at exact nodes, past both ends, over several tiles, of few and many nodes."""

from __future__ import annotations

import pytest
import torch
from conftest import needs_extension
from helpers import assert_as_good_as, assert_same, batch, gradients

from flashpair import Reduction, row_reduce
from flashpair.core.reduction import histogram
from flashpair.engine.dispatch import interpreted

pytestmark = needs_extension


def _dense(z, mask, nodes, first, step):
    """(nodes, N): each pair shared linearly by the two nodes that it lies between."""
    at = first + step * torch.arange(nodes, dtype=z.dtype)
    share = (1 - (z[None] - at[:, None, None]).abs() / abs(step)).clamp_min(0)
    return (share * mask).sum(2)


def _sides(labels, ref_labels):
    same = labels[:, None] == (labels if ref_labels is None else ref_labels)
    pair = ~torch.eye(len(labels)).bool() if ref_labels is None else torch.ones_like(same)
    return {"positives": same & pair, "negatives": ~same, "all": pair}


def _compare(x, labels, nodes, first, step, y=None, ref_labels=None, impl="tiled", side="negatives"):
    inputs = [t.clone().requires_grad_() for t in (x, y) if t is not None]
    more = {} if y is None else {"ref_emb": inputs[1], "ref_labels": ref_labels}
    rows = torch.stack(row_reduce(inputs[0], labels, *histogram(side, nodes, first, step), impl=impl, **more))
    found = [rows.detach(), *gradients((rows,), inputs)]
    inputs = [t.clone().requires_grad_() for t in (x, y) if t is not None]
    z = inputs[0] @ inputs[-1].T
    rows = _dense(z, _sides(labels, ref_labels)[side], nodes, first, step)
    for f, t in zip(found, [rows.detach(), *gradients((rows,), inputs)], strict=True):
        assert_same(f, t)
    return found[0]


@pytest.mark.parametrize("references", [False, True], ids=["square", "references"])
@pytest.mark.parametrize("nodes", [2, 3, 4, 256, 257])
def test_few_and_many_nodes(nodes, references):
    """Runs of 4 to 256 nodes are looked up in a table; others are so many sums."""
    x, labels = batch(90, 5, 4, torch.float64)
    y, ref_labels = batch(70, 5, 3, torch.float64, seed=1)
    x, y = torch.nn.functional.normalize(x), torch.nn.functional.normalize(y)
    found = _compare(x, labels, nodes, -1.0, 2 / (nodes - 1), *((y, ref_labels) if references else ()))
    assert_same(found.sum(0), _sides(labels, ref_labels if references else None)["negatives"].sum(1).double())


@pytest.mark.parametrize("side", ["positives", "negatives", "all"])
@pytest.mark.parametrize("n", [300, 600])
def test_over_several_tiles(n, side):
    x, labels = batch(n, 6, 4, torch.float64)
    x = torch.nn.functional.normalize(x)
    _compare(x, labels, 11, 1.0, -0.2, side=side)
    y, ref_labels = batch(700, 6, 8, torch.float64, seed=1)
    _compare(x, labels, 11, -1.0, 0.2, torch.nn.functional.normalize(y), ref_labels, side=side)


@pytest.mark.parametrize("nodes", [3, 5, 9])
def test_pairs_outside_of_the_nodes_count_for_none(nodes):
    x, labels = batch(60, 5, 4, torch.float64)  # products from about -10 to 20
    found = _compare(x, labels, nodes, -0.5, 1 / (nodes - 1))
    z = x @ x.T
    reach = 1 / (nodes - 1)
    far = (z <= -0.5 - reach) | (z >= 0.5 + reach)
    assert far.any() and found.sum() < (~far).sum()


@pytest.mark.parametrize("nodes", [3, 5, 33])
def test_exactly_on_nodes(nodes):
    """A pair on a node counts for it alone, and the slopes to both sides there are those of the dense kernel."""
    step = 2.0 ** -(nodes.bit_length() - 2)
    z = -1 + step * torch.arange(nodes, dtype=torch.float64)
    y = z[:, None].clone().requires_grad_()
    x, labels, ref_labels = torch.ones(1, 1, dtype=torch.float64), torch.tensor([0]), torch.arange(1, nodes + 1)
    rows = row_reduce(
        x, labels, *histogram("negatives", nodes, -1.0, step), ref_emb=y, ref_labels=ref_labels, impl="tiled"
    )
    assert torch.equal(torch.stack(rows), torch.ones(nodes, 1, dtype=torch.float64))
    (found,) = torch.autograd.grad(sum((k + 1) ** 2 * row.sum() for k, row in enumerate(rows)), y)
    truth = row_reduce(
        x, labels, *histogram("negatives", nodes, -1.0, step), ref_emb=y, ref_labels=ref_labels, impl="reference"
    )
    (expected,) = torch.autograd.grad(sum((k + 1) ** 2 * row.sum() for k, row in enumerate(truth)), y)
    assert_same(found, expected)


def test_beside_other_reductions_of_the_same_call():
    x, labels = batch(90, 5, 4, torch.float64)
    x = torch.nn.functional.normalize(x)
    made = histogram("positives", 6, -1.0, 0.4), histogram("negatives", 6, -1.0, 0.4)
    others = [Reduction("logsumexp", "all"), Reduction("max", "negatives")]
    together = row_reduce(x, labels, *made[0], others[0], *made[1], others[1], impl="tiled")
    truth = row_reduce(x, labels, *made[0], others[0], *made[1], others[1], impl="reference")
    for f, t in zip(together, truth, strict=True):
        assert_same(f, t)


def test_second_derivatives():
    x, labels = batch(7, 3, 2, torch.float64)
    x = torch.nn.functional.normalize(x).requires_grad_()

    def bins(t):
        return torch.stack(row_reduce(t, labels, *histogram("all", 5, -1.0, 0.5), impl="tiled")).square()

    assert torch.autograd.gradcheck(bins, x)
    assert torch.autograd.gradgradcheck(bins, x)


def test_float32_is_as_good_as_dense_code():
    x, labels = batch(300, 24, 4, torch.float32)
    x, results = torch.nn.functional.normalize(x), []
    for impl, dtype in (("tiled", torch.float32), ("reference", torch.float32), ("reference", torch.float64)):
        a = x.to(dtype).requires_grad_()
        rows = torch.stack(row_reduce(a, labels, *histogram("negatives", 21, -1.0, 0.1), impl=impl))
        results.append([rows.detach(), *gradients((rows,), [a])])
    for found, eager, truth in zip(*results, strict=True):
        assert_as_good_as(found, eager, truth)


@pytest.mark.skipif(not interpreted(), reason="there is a GPU: test_gpu.py runs the kernels")
@pytest.mark.parametrize("nodes", [3, 5])
def test_interpreted_kernels(nodes):
    x, labels = batch(20, 5, 4, torch.float64)
    _compare(torch.nn.functional.normalize(x), labels, nodes, -1.0, 2 / (nodes - 1), impl="fused")


def test_what_a_histogram_cannot_be():
    for nodes, step in ((1, 0.5), (4, 0.0)):
        with pytest.raises(ValueError, match="at least 2 nodes and a step other than 0"):
            histogram("all", nodes, -1.0, step)
