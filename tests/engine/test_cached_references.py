"""References that are kept: the same numbers, prepared once, and anew when their tensors change."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch
from conftest import needs_extension
from helpers import CRITERIA, batch

import flashpair
from flashpair import MultiSimilarityLoss, Reduction, References, row_reduce
from flashpair.backends.cpu import screened
from flashpair.engine import cached_references, dispatch, sorted_rows

IMPLS = ["reference", *(pytest.param(name, marks=needs_extension) for name in ("tiled", "screened", "auto"))]


@pytest.fixture(autouse=True)
def by_rows(monkeypatch):
    monkeypatch.setattr(dispatch, "WHOLE_PAIRS", -1)


def _step(x, labels, impl, **refs):
    a = x.clone().requires_grad_()
    loss = MultiSimilarityLoss(impl=impl)(a, labels, **refs)
    loss.backward()
    return loss.detach(), a.grad


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    "dtypes", [(torch.float32, torch.float32), (torch.float64, torch.float32), (torch.bfloat16,) * 2]
)
def test_the_same_bits_as_their_tensors(impl, dtypes):
    x, labels = batch(300, 16, 4, dtypes[0])
    y, ref_labels = batch(500, 16, 4, dtypes[1], seed=1)
    bank = References(y, ref_labels.int())
    truth = _step(x, labels, impl, ref_emb=y, ref_labels=ref_labels)
    for _ in range(2):
        found = _step(x, labels, impl, ref_emb=bank)
        assert all(torch.equal(f, t) for f, t in zip(found, truth, strict=True))


@needs_extension
def test_what_is_of_references_alone_is_done_once(monkeypatch):
    x, labels = batch(300, 16, 4, torch.float32)
    bank, seen = References(*batch(500, 16, 4, torch.float32, seed=1)), []
    sort = sorted_rows.sorted_rows
    monkeypatch.setattr(
        cached_references, "sorted_rows", lambda y, *more, **o: seen.append(len(y)) or sort(y, *more, **o)
    )
    module = screened.extension.require()
    monkeypatch.setattr(screened.extension, "require", lambda: Spy(module, seen))
    for _ in range(3):
        _step(x, labels, "screened", ref_emb=bank)
    assert seen == [500, "rounded"]
    row_reduce(x, labels, Reduction("max", "negatives"), ref_emb=bank, distance="euclidean", impl="screened")
    assert seen == [500, "rounded", 500, "rounded"], "not normalised, and halves of squares beside"


class Spy:
    """A module whose round_rows says that it was called."""

    def __init__(self, module, seen):
        self.module, self.seen = module, seen

    def __getattr__(self, name):
        if name == "round_rows":
            self.seen.append("rounded")
        return getattr(self.module, name)


@pytest.mark.parametrize("integer", [torch.int64, torch.int32])
@pytest.mark.parametrize("pairs", [-1, 1024**2], ids=["by rows", "whole"])
@pytest.mark.parametrize("impl", IMPLS)
def test_tensors_that_change_are_seen(impl, pairs, integer, monkeypatch):
    monkeypatch.setattr(dispatch, "WHOLE_PAIRS", pairs)
    x, labels = batch(60, 8, 4, torch.float32)
    y, ref_labels = batch(90, 8, 4, torch.float32, seed=1)
    ref_labels = ref_labels.to(integer)
    bank = References(y, ref_labels)
    before = _step(x, labels, impl, ref_emb=bank)
    y[:30] = x[30:]
    ref_labels[:30] = labels[30:]
    truth = _step(x, labels, impl, ref_emb=y, ref_labels=ref_labels)
    found = _step(x, labels, impl, ref_emb=bank)
    assert all(torch.equal(f, t) for f, t in zip(found, truth, strict=True))
    assert not torch.equal(found[0], before[0])


@pytest.mark.parametrize("name", [name for name in CRITERIA if CRITERIA[name]().takes_references])
def test_every_criterion_takes_them(name):
    x, labels = batch(60, 8, 4, torch.float64)
    y, ref_labels = batch(90, 8, 4, torch.float64, seed=1)
    criterion = CRITERIA[name]()
    assert len(References(y, ref_labels)) == 90
    found = criterion(x, labels, ref_emb=References(y, ref_labels))
    assert torch.equal(found, criterion(x, labels, ref_emb=y, ref_labels=ref_labels))


@needs_extension
def test_other_labels_with_their_embeddings_are_not_theirs():
    x, labels = batch(60, 8, 4, torch.float32)
    y, ref_labels = batch(90, 8, 4, torch.float32, seed=1)
    bank, other = References(y, ref_labels), ref_labels.flip(0)
    truth = _step(x, labels, "screened", ref_emb=y, ref_labels=other)
    found = _step(x, labels, "screened", ref_emb=bank.embeddings, ref_labels=other)
    assert all(torch.equal(f, t) for f, t in zip(found, truth, strict=True))


@needs_extension
def test_evaluated_in_inference_mode_then_trained_copied_and_pickled():
    x, labels = batch(60, 8, 4, torch.float32)
    y, ref_labels = batch(90, 8, 4, torch.float32, seed=1)
    truth = _step(x, labels, "screened", ref_emb=y, ref_labels=ref_labels)
    with torch.inference_mode():
        made = References(y.clone(), ref_labels.clone())
        MultiSimilarityLoss(impl="screened")(x, labels, ref_emb=made)
    for bank in (made, copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        found = _step(x, labels, "screened", ref_emb=bank)
        assert all(torch.equal(f, t) for f, t in zip(found, truth, strict=True))


def test_nothing_keeps_them_but_their_owner():
    bank = References(*batch(90, 8, 4, torch.float32, seed=1))
    row_reduce(*batch(60, 8, 4, torch.float32), Reduction("max", "negatives"), ref_emb=bank)
    gone = weakref.ref(bank.embeddings)
    gc.disable()
    try:
        del bank
        assert gone() is None
    finally:
        gc.enable()


def test_what_they_cannot_be():
    x, labels = batch(12, 8, 4, torch.float32)
    with pytest.raises(ValueError, match="ref_labels must be None if ref_emb is a References"):
        MultiSimilarityLoss()(x, labels, ref_emb=References(x, labels), ref_labels=labels)
    with pytest.raises(ValueError, match=r"ref_labels must have shape \(M,\) = \(12,\)"):
        References(x, labels[:5])
    with pytest.raises(ValueError, match="ref_emb must have the width of embeddings"):
        MultiSimilarityLoss()(x, labels, ref_emb=References(x[:, :4].clone(), labels))
    with pytest.raises(ValueError, match="defined within a batch"):
        flashpair.LiftedStructureLoss()(x, labels, ref_emb=References(x, labels))


@needs_extension
def test_under_torch_compile():
    x, labels = batch(60, 8, 4, torch.float32)
    bank = References(*batch(90, 8, 4, torch.float32, seed=1))
    criterion = MultiSimilarityLoss()
    found = torch.compile(lambda a: criterion(a, labels, ref_emb=bank))(x)
    assert torch.allclose(found, criterion(x, labels, ref_emb=bank), rtol=1e-5)
