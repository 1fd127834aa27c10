"""Where the library's number is wrong, the fused criterion has flashpair's, and says so when a batch meets the case."""

from __future__ import annotations

import copy
import pickle
import warnings

import compat_cases
import pytest
import torch
from compat_cases import (
    BATCHES,
    CASES,
    IMPLS,
    ROUNDED,
    D,
    assert_same_numbers,
    made,
    ours,
    theirs,
    value_and_gradients,
)  # fmt: skip
from helpers import relative
from pytorch_metric_learning import losses, miners, reducers

import flashpair
from flashpair.compat import divergence
from flashpair.compat.pml import Divergence, fuse

quiet = compat_cases.quiet

AXES = torch.eye(6, D).repeat(2, 1)
HALVES = torch.cat([torch.ones(2, 4), torch.randn(6, 4, generator=torch.Generator().manual_seed(0))])
SHARP = BATCHES["clustered"]
TWICE = (SHARP[0][:30].repeat(2, 1), torch.arange(60) % 15)
ONE = (SHARP[0][:1], torch.zeros(1, dtype=torch.int64), SHARP[0][1:3], torch.arange(2))
ALIGNED = torch.eye(D)


def aligned():
    loss = losses.ArcFaceLoss(D, D)
    with torch.no_grad():
        loss.W.copy_(ALIGNED)
    return loss


def arcface():
    criterion = flashpair.ArcFaceLoss(D, D)
    with torch.no_grad():
        criterion.weight.copy_(ALIGNED)
    return criterion


# The library's loss, flashpair's own criterion, and a batch of which they differ.
DIVERGENT = {
    "one pair": (losses.MultiSimilarityLoss, lambda: flashpair.MultiSimilarityLoss(epsilon=None), ONE),
    "same references": (losses.NTXentLoss, flashpair.NTXentLoss, (*SHARP, *SHARP)),
    "same references, two towers": (losses.NTXentLoss, flashpair.NTXentLoss, (*SHARP, -SHARP[0], SHARP[1])),
    "euclidean duplicates": (losses.ContrastiveLoss, flashpair.ContrastiveLoss, TWICE),
    "lifted structure without a side": (
        losses.GeneralizedLiftedStructureLoss,
        lambda: flashpair.GeneralizedLiftedStructureLoss(1.0, "euclidean"),
        BATCHES["singletons"],
    ),
    "nt-xent clip": (lambda: losses.NTXentLoss(1e-3), lambda: flashpair.NTXentLoss(1e-3), SHARP),
    "supcon without negatives": (
        losses.SupConLoss, lambda: flashpair.SupConLoss(reduction="nonzero"), BATCHES["one class"],
    ),
    "nca underflow": (lambda: losses.NCALoss(1000), lambda: flashpair.NCALoss(1000.0), SHARP),
    "tuplet duplicates": (losses.TupletMarginLoss, flashpair.TupletMarginLoss, (AXES, torch.arange(12) % 6)),
    "angular negatives": (losses.AngularLoss, flashpair.AngularLoss, SHARP),
    "arcface aligned": (aligned, arcface, (ALIGNED, torch.arange(D))),
    "snr without variance": (
        losses.SignalToNoiseRatioContrastiveLoss, flashpair.SNRContrastiveLoss, (HALVES, torch.arange(8) // 2),
    ),
    "histogram pairs": (losses.HistogramLoss, flashpair.HistogramLoss, BATCHES["singletons"]),
    "histogram end": (losses.HistogramLoss, flashpair.HistogramLoss, (AXES, torch.arange(12) % 6)),
}  # fmt: skip


def test_every_divergence_is_shown():
    assert {name.partition(",")[0] for name in DIVERGENT} == divergence.REASONS.keys()


def said(call):
    """The Divergence warnings of a call, and what it returns."""
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always")
        found = call()
    return [w for w in given if issubclass(w.category, Divergence)], found


@pytest.fixture(autouse=True)
def afresh(monkeypatch):
    monkeypatch.setattr(divergence, "_said", set())


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("reason", DIVERGENT)
def test_divergence(reason, impl):
    """Warned of once a process, by the call; flashpair's own number, which is finite and not the library's."""
    theirs_, own, (x, labels, *refs) = DIVERGENT[reason]
    loss = theirs_()
    given, criterion = said(lambda: fuse(loss, impl=impl))
    assert not given
    names = dict(zip(("ref_emb", "ref_labels"), refs, strict=False))
    given, _ = said(lambda: criterion(x, labels, **names))
    name = type(loss).__name__
    assert [str(w.message) for w in given] == [f"{name}: {divergence.REASONS[reason.partition(',')[0]]}"]
    assert given[0].filename == __file__
    again = fuse(theirs_(), impl=impl)
    assert not said(lambda: (criterion(x, labels, **names), again(x, labels, **names)))[0]
    own = own()
    own.impl = impl
    found, truth = ours(criterion, x, labels, tuple(refs)), ours(own, x, labels, tuple(refs))
    assert_same_numbers(found, truth)
    if reason == "histogram end":
        with pytest.raises((IndexError, RuntimeError)):
            loss(x, labels)
        return
    refs = tuple(refs)
    if reason == "same references":
        value, gradient, *_ = value_and_gradients(lambda x: loss(x, labels, ref_emb=x, ref_labels=labels), x, [])
    else:
        value, gradient, *_ = theirs(loss, None, x, labels, refs)
    if gradient.isfinite().all() and value.isfinite():
        assert max(relative(value, truth[0]), relative(gradient, truth[1])) > 1e-3


@pytest.mark.parametrize("name", CASES)
def test_said_if_and_only_if_the_numbers_differ(name, monkeypatch):
    """Over ordinary batches, lone classes, a single class, all different ones, and duplicates."""
    loss, miner = made(name)
    criterion = fuse(loss, miner, impl="reference").double()
    for data, (x, labels) in BATCHES.items():
        if (name, data) in ROUNDED:
            continue
        monkeypatch.setattr(divergence, "_said", set())
        given, _ = said(lambda x=x, labels=labels: criterion(x, labels))
        try:
            truth = theirs(loss, miner, x, labels)
        except (IndexError, RuntimeError):
            assert given, data
            continue
        found = ours(criterion, x, labels)
        same = all(t.isfinite().all() for t in truth) and all(
            (f - t).abs().max() <= 1e-6 * t.abs().max() + 1e-13 for f, t in zip(found[:2], truth, strict=False)
        )
        assert bool(given) == (not same), (data, [str(w.message) for w in given])


def test_one_mined_pair_is_said():
    """A miner that leaves one positive and one negative pair: the library gives 0."""
    x = torch.tensor([[1.0, 0.0], [0.9, 0.435], [0.0, 1.0], [-1.0, 0.1]])
    labels = torch.tensor([0, 0, 1, 2])
    loss, miner = losses.MultiSimilarityLoss(), miners.MultiSimilarityMiner(0.5)
    assert [t.shape[0] for t in miner(x, labels)] == [1, 1, 1, 1]
    for reducer in (None, reducers.SumReducer(), reducers.AvgNonZeroReducer()):
        divergence._said.clear()
        loss = losses.MultiSimilarityLoss(reducer=reducer)
        criterion = fuse(loss, miner)
        given, value = said(lambda criterion=criterion: criterion(x, labels))
        assert value > 0 and loss(x, labels, miner(x, labels)) == 0
        assert [str(w.message) for w in given] == [f"MultiSimilarityLoss: {divergence.REASONS['one pair']}"]
        divergence._said.clear()
        assert not said(lambda criterion=criterion: criterion(*BATCHES["clustered"]))[0]


@pytest.mark.parametrize("reason", DIVERGENT)
def test_a_copied_criterion_says_it_too(reason):
    theirs_, _, (x, labels, *refs) = DIVERGENT[reason]
    names = dict(zip(("ref_emb", "ref_labels"), refs, strict=False))
    criterion = pickle.loads(pickle.dumps(fuse(theirs_(), impl="reference")))
    assert len(said(lambda: copy.deepcopy(criterion)(x, labels, **names))[0]) == 1


def test_a_compiled_criterion_says_nothing_and_is_one_graph():
    criterion = fuse(losses.NTXentLoss(1e-3))
    x, labels = SHARP
    compiled = torch.compile(criterion, fullgraph=True, backend="eager")
    given, found = said(lambda: compiled(x, labels))
    assert not given and relative(found, criterion(x, labels)) < 1e-12


def test_what_is_normalised_before_is_not_said():
    x, labels = BATCHES["clustered"]
    criterion = fuse(losses.AngularLoss())
    assert not said(lambda: criterion(torch.nn.functional.normalize(x), labels))[0]
    assert not said(lambda: criterion(torch.nn.functional.normalize(x).float(), labels))[0]
    assert said(lambda: criterion(x * 1.001, labels))[0]


class Answer:
    """What a GPU will have computed once it gets there."""

    def __init__(self):
        self.there = False

    def query(self):
        return self.there

    def synchronize(self):
        self.there = True


@pytest.mark.parametrize("calls", [1, 40])
def test_an_answer_that_is_not_there_is_read_by_a_later_call(calls):
    """Of too many that wait, the first is waited for."""
    criterion = fuse(losses.AngularLoss())
    (watch,) = criterion._forward_hooks.values()
    x, labels = BATCHES["clustered"]
    unit = torch.nn.functional.normalize(x)
    call = divergence._call(criterion, x, labels, loss=x.sum(), dtype=None, numbers={})
    events = [Answer() for _ in range(calls)]
    for event in events:
        watch.waiting.append((event, torch.tensor(True), call, "angular negatives", False))
    given, _ = said(lambda: criterion(unit, labels))
    assert len(given) == (calls > divergence.WAITING)
    events[0].there = True
    given += said(lambda: criterion(unit, labels))[0]
    assert [str(w.message) for w in given] == [f"AngularLoss: {divergence.REASONS['angular negatives']}"]
    assert len(watch.waiting) <= divergence.WAITING * len(watch.reasons)
