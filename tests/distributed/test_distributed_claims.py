"""Losses of one's own over many processes are exact or refused, and the criterion is the same on all of them."""

from __future__ import annotations

import dataclasses
import fractions
import functools
import re
import types
import warnings

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import needs_extension
from ranks_cases import SCHEDULES, Call, D, assert_as_one, clustered, part, towers
from test_shard_classes import assert_as_one as assert_parts_as_one
from torch import nn
from torch.nn.functional import softplus
from torch.utils.checkpoint import checkpoint

import flashpair
from flashpair.chunked.class_weights import proxy_pairs
from flashpair.distributed import gather, shard_classes
from flashpair.losses.registry import CLASSES

pytestmark = needs_extension
every_schedule = pytest.mark.parametrize("schedule", SCHEDULES)


class Classes(flashpair.ClassCriterion):
    def __init__(self, **common):
        torch.manual_seed(3)
        super().__init__(CLASSES, D, **{"normalize": True, "reduction": "mean", "impl": "tiled", **common})


class HardRows(Classes):
    """Rows weighted by their hardness beside that of all rows, of which a part has a loss; margins by label."""

    def row_losses(self, pairs):
        own, neg = pairs.reduce(
            flashpair.Reduction("sum", "positives"), flashpair.Reduction("logsumexp", "negatives", scale=10.0)
        )
        losses = softplus(neg - 10 * own + 0.01 * pairs.labels + pairs.num_negatives() / CLASSES)
        mean = pairs.batch_sum(losses) / pairs.batch_sum(torch.ones_like(pairs.labels))
        losses = losses * losses / mean + pairs.batch_logsumexp(neg) * pairs.num_positives()
        valid = (losses > mean).detach()
        return flashpair.RowLosses(torch.where(valid, losses, 0.0), valid, valid.sum())


class OwnProxies(Classes):
    """Proxy anchor's positive half, by another class."""

    anchors = "proxies"

    def row_losses(self, pairs):
        pos, neg = pairs.reduce(
            flashpair.Reduction("logsumexp", "positives", scale=-8.0),
            flashpair.Reduction("logsumexp", "negatives", scale=8.0),
        )
        present = pairs.num_positives() > 0
        losses = softplus(pos + 1) / pairs.batch_sum(present).clamp_min(1) + softplus(neg + 1) / self.num_classes
        return flashpair.RowLosses(losses, torch.ones_like(present), present.shape[0], shares=True)


class ProxyPairs(OwnProxies):
    def pairs_of(self, x, labels, y, ref_labels, impl):
        return proxy_pairs(self.weight, x, labels, self.normalize, impl)


class SaysNothing(Classes):
    row_losses = OwnProxies.row_losses
    pairs_of = ProxyPairs.pairs_of


class OwnForward(flashpair.NTXentLoss):
    def forward(self, *arguments, **more):
        return 2 * super().forward(*arguments, **more)


class OwnPairs(flashpair.NTXentLoss):
    def pairs_of(self, x, labels, y, ref_labels, impl):
        return super().pairs_of(x * 2, labels, y, ref_labels, impl)


class Divided(flashpair.Criterion):
    """By a total, which would be summed once more; by a number that is no count of rows."""

    def __init__(self, by):
        super().__init__(normalize=True, reduction="mean", impl="auto")
        self.by = by

    def row_losses(self, pairs):
        (neg,) = pairs.reduce(flashpair.Reduction("logsumexp", "negatives"))
        valid = torch.ones_like(pairs.labels, dtype=torch.bool)
        rows = {"total": pairs.batch_sum(valid).clamp_min(1), "seventeen": 17, "own": valid.sum(), "rows": len(valid)}
        return flashpair.RowLosses(neg, valid, rows[self.by])


class ByFrequency(flashpair.Criterion):
    """Rows weighted by how common their class is among all references, of every process."""

    def __init__(self, **common):
        super().__init__(**{"normalize": True, "reduction": "mean", "impl": "auto", **common})

    def row_losses(self, pairs):
        (neg,) = pairs.reduce(flashpair.Reduction("logsumexp", "negatives"))
        same = (pairs.labels[:, None] == pairs.ref_labels[None, :]).sum(1)
        losses = neg * (1 + same) / pairs.ref_labels.shape[0]
        return flashpair.RowLosses(losses, torch.ones_like(same, dtype=torch.bool), losses.shape[0])


class OldWords(flashpair.NPairsLoss):
    """One pair of each class, in the words that these methods had before."""

    def __init__(self, **common):
        super().__init__(**{"normalize": True, **common})

    def row_losses(self, pairs):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            drawn = pairs.draw()
            chosen = pairs.select(drawn.anchors, drawn.positives, drawn.place, drawn.taken)
            target = chosen.paired()
        (neg,) = chosen.reduce(flashpair.Reduction("logsumexp", "negatives"))
        taken = drawn.place < drawn.taken
        rows = neg.new_zeros(pairs.labels.shape[0])
        losses = rows.index_add(0, drawn.anchors, torch.where(taken, softplus(neg - target), 0.0))
        valid = rows.detach().index_add(0, drawn.anchors, taken.to(rows.dtype)) > 0
        return flashpair.RowLosses(losses, valid, drawn.taken)


class LooksAtReferences(ByFrequency):
    def row_losses(self, pairs):
        rows = super().row_losses(pairs)
        return rows._replace(losses=rows.losses + pairs.y.norm())


@pytest.mark.parametrize("references", [False, True])
def test_labels_of_references_are_those_of_all_processes(team, references):
    b = towers(2) if references else clustered(2)
    assert_as_one(team, [Call(ByFrequency, b, s, {"reduction": r}) for s in SCHEDULES for r in ("mean", "none", "sum")])


def test_old_words_for_one_pair_of_each_class(team):
    b = clustered(2)
    assert_as_one(team, [Call(OldWords, b, s, {"reduction": r}) for s in SCHEDULES for r in ("mean", "none")])


def looks_at_references():
    x = torch.randn(4, D)
    with pytest.raises(
        AttributeError, match=r"pairs\.y is not available for references in chunks, which are never all"
    ):
        gather(LooksAtReferences())(x, torch.arange(4), ref_emb=x, ref_labels=torch.arange(4))
    return True


def test_rows_of_references_are_refused(team):
    assert team.run(2, looks_at_references) == [True, True]


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("make", [HardRows, OwnProxies])
def test_a_class_loss_of_ones_own(team, world, make):
    b = clustered(world)
    assert_as_one(team, [Call(make, b, s, {"reduction": r}) for s in SCHEDULES for r in ("mean", "none", "sum")])
    assert_parts_as_one(team, [Call(make, b, s, {"reduction": r}) for s in SCHEDULES for r in ("mean", "sum")])


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (SaysNothing, "SaysNothing overrides pairs_of without declaring what its rows are"),
        (ProxyPairs, "ProxyPairs overrides pairs_of without declaring what its rows are"),
        (OwnForward, "OwnForward overrides forward, which sees one process only"),
        (OwnPairs, "OwnPairs overrides pairs_of, which sees one process only"),
    ],
)
def test_what_row_losses_does_not_say_is_refused(make, words):
    with pytest.raises(TypeError, match=words):
        gather(make())


def test_a_penalty_of_ones_own_must_say_of_what():
    class Penalized(Classes):
        def penalty_of(self, x, labels, y, ref_labels, drawn=None):
            return None

    with pytest.raises(TypeError, match="Penalized overrides penalty_of without declaring what it is a mean over"):
        shard_classes(Penalized())


def _call(make, arguments, schedule, b=None):
    """The loss of a criterion made of this process's arguments, or its error."""
    b = clustered(dist.get_world_size()) if b is None else b
    rank = dist.get_rank()
    torch.manual_seed(0)
    try:
        criterion = make(*arguments[min(rank, len(arguments) - 1)])
        shared = gather(criterion.double(), schedule=schedule)
        return shared(part(b.x, b.sizes, rank), part(b.labels, b.sizes, rank)).item()
    except Exception as error:
        return f"{type(error).__name__}: {error}"


@every_schedule
def test_what_a_loss_divides_by_is_its_own_rows(team, schedule):
    for by in ("total", "seventeen"):  # as many as the first process has rows: all are told, it among them
        for found in team.run(2, _call, Divided, [(by,)], schedule):
            assert "ValueError: the denominator" in str(found), found
    b = clustered(2)
    one = Divided("rows")(b.x, b.labels).item()
    for by in ("own", "rows"):
        assert team.run(2, _call, Divided, [(by,)], schedule) == pytest.approx([one] * 2, rel=1e-12)


def _weighted(seed):
    torch.manual_seed(seed)
    return flashpair.ArcFaceLoss(CLASSES, D)


def _scaled(value, learns=True):
    return flashpair.NTXentLoss(nn.Parameter(torch.tensor(value), requires_grad=learns))


@dataclasses.dataclass
class Settings:
    margin: float


HELD = {
    "numpy's number": np.float32,
    "array": lambda value: np.array([value, 1.0]),
    "long array": lambda value: np.full(100, value),
    "dataclass": Settings,
    "namespace": lambda value: types.SimpleNamespace(margin=value),
    "fraction": fractions.Fraction,
    "partial": lambda value: functools.partial(torch.clamp, min=value),
    "long tensor in a list": lambda value: [torch.full((100,), value)],
}


def _holding(kind, value):
    criterion = flashpair.NTXentLoss()
    criterion.held = HELD[kind](value)
    return criterion


def _any(name, *arguments):
    return getattr(flashpair, name)(*arguments)


@every_schedule
@pytest.mark.parametrize(
    ("make", "arguments", "words"),
    [
        (_any, [("NTXentLoss", 0.5), ("NTXentLoss", 0.1)], "temperature is 0.5, 0.1"),
        (_any, [("NTXentLoss",), ("SupConLoss",)], "criterion is NTXentLoss, SupConLoss"),
        (_weighted, [(0,), (1,)], "the same values on every process, and weight differs"),
        (_scaled, [(0.5,), (0.25,)], "the same values on every process, and temperature differs"),
        (_scaled, [(0.5,), (0.5, False)], r"temperature is float64 \(\), learned, float64 \(\)"),
        (_any, [("ArcFaceLoss", 200, D), ("ArcFaceLoss", 201, D)], "num_classes is 200, 201"),
        *((_holding, [(kind, 0.5), (kind, 0.25)], "held is .*") for kind in HELD),
    ],
)
def test_criteria_that_differ_are_refused_on_every_process(team, schedule, make, arguments, words):
    for found in team.run(2, _call, make, arguments, schedule):
        assert isinstance(found, str) and re.search(words, found), found


@pytest.mark.parametrize("kind", HELD)
def test_criteria_that_hold_the_same_are_the_same(team, kind):
    first, second = team.run(2, _call, _holding, [(kind, 0.5), (kind, 0.5)], "all_gather")
    assert not isinstance(first, str), first
    assert torch.equal(torch.as_tensor(first), torch.as_tensor(second))


def _refusing(impls):
    return _call(lambda impl: flashpair.NTXentLoss(impl=impl), [(i,) for i in impls], "ring")


def test_an_implementation_that_one_refuses_all_refuse(team):
    first, second = team.run(2, _refusing, ["tiled", "reference"])
    assert first == "ValueError: the arguments on process 1 are invalid; the error there says why"
    assert "impl='reference' cannot run" in second


def _sharded(counts, margins):
    rank, b = dist.get_rank(), clustered(dist.get_world_size())
    criterion = flashpair.CosFaceLoss(counts[rank], D, margins[rank]).double()
    try:
        return shard_classes(criterion)(part(b.x, b.sizes, rank), part(b.labels, b.sizes, rank)).item()
    except ValueError as error:
        return str(error)


def test_shared_classes_are_of_one_criterion(team):
    for found in team.run(2, _sharded, [200, 202], [0.3, 0.3]):
        assert "num_classes is 200, 202" in found
    for found in team.run(2, _sharded, [200, 200], [0.3, 0.2]):
        assert "margin is 0.3, 0.2" in found


def _checkpointed(b, schedule, reduction, reentrant):
    """How often the loss is called, and the gradient beside the one without a checkpoint."""
    rank, calls = dist.get_rank(), []
    x, labels = part(b.x, b.sizes, rank).clone().requires_grad_(), part(b.labels, b.sizes, rank)
    shared = gather(flashpair.NTXentLoss(reduction=reduction), schedule=schedule)

    def step(x, labels):
        calls.append(1)
        return shared(x.tanh(), labels)

    loss = step(x, labels)
    (plain,) = torch.autograd.grad(loss.sum(), x)
    calls.clear()
    again = checkpoint(step, x, labels, use_reentrant=reentrant)
    in_forward = len(calls)
    again.sum().backward()
    return torch.equal(loss, again), torch.equal(plain, x.grad), in_forward


@every_schedule
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("sizes", [(17, 24), (41, 0)])
def test_under_a_checkpoint(team, schedule, reentrant, reduction, sizes):
    b = clustered(2)._replace(sizes=sizes)
    assert team.run(2, _checkpointed, b, schedule, reduction, reentrant) == [(True, True, 1)] * 2


def _one_computes_again(b, schedule):
    """One process under a reentrant checkpoint, which the other meets with its next step."""
    rank = dist.get_rank()
    x, labels = part(b.x, b.sizes, rank).clone().requires_grad_(), part(b.labels, b.sizes, rank)
    shared = gather(flashpair.NTXentLoss(), schedule=schedule)
    loss = checkpoint(shared, x, labels, use_reentrant=True) if rank == 0 else shared(x, labels)
    try:
        loss.backward() if rank == 0 else shared(x, labels)
    except ValueError as error:
        return str(error)
    return None


@every_schedule
def test_a_checkpoint_on_one_process_alone_is_refused(team, schedule):
    for found in team.run(2, _one_computes_again, clustered(2), schedule):
        assert found is not None and "recomputed in backward" in found and "on process 0 only" in found


def _local(b, schedule, towers):
    rank = dist.get_rank()
    x = part(b.x, b.sizes, rank).clone().requires_grad_()
    n = x.shape[0]
    labels = torch.arange(n, dtype=torch.int16) // (1 if towers else 2)
    more = {"ref_emb": part(b.x, b.sizes, rank) + 0.1, "ref_labels": torch.arange(n)} if towers else {}
    loss = gather(flashpair.NTXentLoss(), schedule=schedule, labels="local")(x, labels, **more)
    loss.backward()
    return loss.detach(), x.grad


@every_schedule
@pytest.mark.parametrize("towers", [False, True])
@pytest.mark.parametrize("world", [2, 3])
def test_labels_of_each_process_alone(team, schedule, towers, world):
    b = clustered(world)
    x = b.x.clone().requires_grad_()
    labels = torch.cat([torch.arange(n) // (1 if towers else 2) + 100 * r for r, n in enumerate(b.sizes)])
    one = flashpair.NTXentLoss()(x, labels, **({"ref_emb": b.x + 0.1, "ref_labels": labels} if towers else {}))
    one.backward()
    found = team.run(world, _local, b, schedule, towers)
    for loss, _ in found:
        assert loss.item() == pytest.approx(one.item(), rel=1e-12)
    assert torch.allclose(torch.cat([g for _, g in found]), world * x.grad, rtol=1e-10, atol=1e-13)


def test_local_labels_are_no_classes():
    with pytest.raises(ValueError, match="labels must be 'global' for ArcFaceLoss, where they are class indices"):
        gather(flashpair.ArcFaceLoss(3, 4), labels="local")
    with pytest.raises(ValueError, match="labels must be one of global, local, got 'mine'"):
        gather(flashpair.NTXentLoss(), labels="mine")
