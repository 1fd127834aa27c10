"""Criteria under torch.compile, and the registered ops that it sees."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from conftest import needs_extension
from helpers import CRITERIA, assert_same, batch, made
from loss_cases import WANTS_MAX_POSITIVES
from torch import nn

import flashpair
from flashpair.core.call import compile_call, encode
from flashpair.engine import dispatch
from flashpair.engine.pairs import Pairs
from flashpair.tools.check import value_and_gradient

INDUCTOR = ("MultiSimilarityLoss", "ContrastiveLoss", "CosFaceLoss")  # code is generated of these three, for time


@needs_extension
@pytest.mark.parametrize("name", CRITERIA)
def test_compiles_into_one_graph(name):
    x, labels = batch(90, 8, 3, torch.float32)
    criterion = made(name, 8, impl="tiled")
    if name in WANTS_MAX_POSITIVES:
        criterion.max_positives = 2
    truth = value_and_gradient(criterion, x, labels)
    compiled = torch.compile(criterion, fullgraph=True, backend="inductor" if name in INDUCTOR else "aot_eager")
    for f, t in zip(value_and_gradient(compiled, x, labels), truth, strict=True):
        torch.testing.assert_close(f, t)


@needs_extension
@pytest.mark.parametrize("refs", [False, True])
@pytest.mark.parametrize("variant", ["mc", "ovo"])
def test_one_pair_a_class_is_that_many_rows_on_the_cpu_and_still_compiles(variant, refs, monkeypatch):
    monkeypatch.setattr(dispatch, "WHOLE_PAIRS", -1)
    x, labels = batch(90, 8, 3, torch.float64)
    labels[:5] = 100 + torch.arange(5)  # single, without a reference
    given = dict(zip(("ref_emb", "ref_labels"), batch(70, 8, 3, torch.float64, seed=1), strict=True)) if refs else {}
    criterion, sizes, take = flashpair.NPairsLoss(variant, impl="tiled"), [], Pairs.take_pairs

    def seen(self, chosen):
        sizes.append(chosen.anchors.shape[0])
        return take(self, chosen)

    monkeypatch.setattr(Pairs, "take_pairs", seen)
    counts = Counter(labels.tolist())
    pairs = len(counts & Counter(given["ref_labels"].tolist())) if refs else sum(k > 1 for k in counts.values())
    found = []
    for form in (criterion, torch.compile(criterion, fullgraph=True, backend="aot_eager")):
        a = x.clone().requires_grad_()
        loss = form(a, labels, **given)
        found.append((loss.detach(), *torch.autograd.grad(loss, a)))
    assert 10 < pairs < 35
    assert sizes[0] == pairs
    for eager, compiled in zip(*found, strict=True):
        assert_same(compiled, eager)


@needs_extension
@pytest.mark.parametrize("name", WANTS_MAX_POSITIVES)
def test_without_max_positives_a_whole_graph_is_refused_and_a_broken_one_is_right(name):
    x, labels = batch(90, 8, 3, torch.float32)
    criterion = CRITERIA[name](impl="tiled")
    with pytest.raises(
        torch._dynamo.exc.Unsupported, match="max_positives must be given where the call is to be one compiled graph"
    ):
        torch.compile(criterion, fullgraph=True, backend="aot_eager")(x, labels)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(criterion, backend="aot_eager")(x, labels), criterion(x, labels))


@needs_extension
@pytest.mark.parametrize("refs", [False, True])
@pytest.mark.parametrize("name", WANTS_MAX_POSITIVES)
def test_positives_of_several_blocks(name, refs, monkeypatch):
    """Rows of one class have more positives, and steps, than losses take at a time."""
    monkeypatch.setattr("flashpair.core.pairs.PLACES", 3)
    monkeypatch.setattr("flashpair.core.pairs.STEPS", 2)
    criterion, reference = (made(name, 8, impl=impl) for impl in ("tiled", "reference"))
    n = 10
    (x, labels), (y, ref_labels) = (batch(2 * n + 5 * k, 8, n, torch.float64, seed=k) for k in (0, 1))
    labels[-4:] = 9
    if refs and not criterion.takes_references:
        pytest.skip("defined within a batch")
    given = {"ref_emb": y, "ref_labels": ref_labels} if refs else {}
    wanted = [x.requires_grad_(), y.requires_grad_()][: 1 + refs]
    truth = reference(x, labels, **given)
    (truth, *slopes) = truth, *torch.autograd.grad(truth, wanted)
    assert all(slope.norm() > 0 for slope in slopes)
    compiled = torch.compile(criterion, fullgraph=True, backend="aot_eager")
    for most, call in ((None, criterion), (n + 7, criterion), (n + 7, compiled)):
        criterion.max_positives = most
        loss = call(x, labels, **given)
        for retain in (False,) if call is compiled else (True, False):
            found = torch.autograd.grad(loss, wanted, retain_graph=retain)
            for f, right in zip((loss, *found), (truth, *slopes), strict=True):
                assert_same(f, right)


@needs_extension
def test_compiles_with_references_learnable_values_and_changing_sizes():
    criterion = flashpair.MultiSimilarityLoss(alpha=nn.Parameter(torch.tensor(2.0)), impl="tiled")
    compiled = torch.compile(criterion, fullgraph=True, dynamic=True)
    for n, m in ((40, 80), (60, 300), (33, 700)):
        x, labels = batch(n, 8, 3, torch.float32)
        y, ref_labels = batch(m, 8, 3, torch.float32, seed=1)
        results = []
        for form in (criterion, compiled):
            a, b = x.clone().requires_grad_(), y.clone().requires_grad_()
            criterion.alpha.grad = None
            loss = form(a, labels, ref_emb=b, ref_labels=ref_labels)
            loss.backward()
            results.append((loss.detach(), a.grad, b.grad, criterion.alpha.grad))
        for f, t in zip(*results, strict=True):
            torch.testing.assert_close(f, t)


def _op_arguments():
    """Embeddings, and what follows them in a call of the registered op up to `keep`."""

    x, labels = batch(30, 4, 3, torch.float64)
    pairs = flashpair.make_pairs(x, labels, impl="tiled")
    call = compile_call((flashpair.Reduction("logsumexp", "negatives"),), "dot", "tiled")
    p = pairs.label_order
    return pairs.x, (None, p.lo, p.hi, None, p.ref_order, None, [], *map(_listed, encode(call)))


@needs_extension
def test_the_registered_ops_are_well_formed():
    x, rest = _op_arguments()
    torch.library.opcheck(torch.ops.flashpair.row_reduce, (x, *rest, True))
    values, *kept = torch.ops.flashpair.row_reduce(x, *rest, True)
    need = [True, False, False, False, False]
    torch.library.opcheck(
        torch.ops.flashpair.row_reduce_backward, (x, *rest, values, *kept, [torch.ones(30).double()], need)
    )


@needs_extension
def test_the_registered_op_takes_strided_embeddings():
    x, rest = _op_arguments()
    strided = x.T.contiguous().T
    assert not strided.is_contiguous()
    truth = torch.ops.flashpair.row_reduce(x, *rest, False)[0]
    assert torch.equal(torch.ops.flashpair.row_reduce(strided, *rest, False)[0], truth)


def _listed(value):
    return list(value) if isinstance(value, tuple) else value


@needs_extension
def test_calls_without_the_dispatcher_equal_the_registered_op(monkeypatch):
    x, labels = batch(90, 8, 3, torch.float32)
    truth = value_and_gradient(flashpair.MultiSimilarityLoss(impl="tiled"), x, labels)
    monkeypatch.setattr("flashpair.engine.row_reduce_op.plain", lambda x: False)
    found = value_and_gradient(flashpair.MultiSimilarityLoss(impl="tiled"), x, labels)
    assert all(torch.equal(f, t) for f, t in zip(found, truth, strict=True))
