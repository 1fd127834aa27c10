"""Losses whose class weights processes share out: one process's with all of them, in value and in every gradient."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
import torch.distributed as dist
from conftest import needs_extension
from helpers import CRITERIA, assert_same
from ranks_cases import (
    LEAST,
    SCHEDULES,
    WORLDS,
    Call,
    Found,
    assert_same_number,
    clustered,
    gradients_of,
    part,
    rows_of,
    truth,
    upstream,
)
from torch import Tensor, nn

import flashpair
from flashpair.chunked import class_weights
from flashpair.distributed import shard_classes
from flashpair.losses.registry import CLASSES, OfClasses

pytestmark = needs_extension
OF_CLASSES = [name for name, make in CRITERIA.items() if isinstance(make(), OfClasses)]


def learned_scale(**common):
    """CosFace whose scale learns, beside the weights: a number that every process has."""
    torch.manual_seed(2)
    criterion = flashpair.CosFaceLoss(CLASSES, 6, **common)
    criterion.scale = nn.Parameter(torch.tensor(7.0))
    return criterion


def steps(calls: Sequence[Call]) -> list[tuple[Found, tuple[int, int], Tensor]]:
    """The job: what each call gives this process, which classes are its own, and the weights of all."""
    rank, found = dist.get_rank(), []
    for call in calls:
        b, criterion = call.batch, call.criterion()
        loss_of = shard_classes(criterion, schedule=call.schedule, gradients=call.gradients)
        x = part(b.x, b.sizes, rank).clone().requires_grad_()
        loss = loss_of(x, part(b.labels, b.sizes, rank))
        seed = upstream(rows_of(call, criterion), loss.shape, rank)
        mine = gradients_of(call, loss, seed, x, None, criterion)
        found.append((mine, (loss_of.first, loss_of.last), loss_of.whole_weight()))
    return found


def assert_as_one(team, calls: Sequence[Call]) -> None:
    world = len(calls[0].batch.sizes)
    every = team.run(world, steps, calls)
    for k, call in enumerate(calls):
        one, parts = truth(call), [mine[k] for mine in every]
        found, ends = [f for f, _, _ in parts], [e for _, e, _ in parts]
        assert [first for first, _ in ends] + [CLASSES] == [0] + [last for _, last in ends]
        loss = torch.cat([f.loss for f in found]) if one.loss.dim() else found[0].loss
        assert all(one.loss.dim() or torch.equal(f.loss, loss) for f in found)
        assert_same(loss, one.loss, LEAST)
        assert_same(torch.cat([f.x for f in found]), (world if call.gradients == "mean" else 1) * one.x, LEAST)
        names = [name for name, _ in call.criterion().named_parameters()]
        for place, name in enumerate(names):
            whole = one.learned[place]
            if name == "weight":
                assert_same(torch.cat([f.learned[place] for f in found]), whole, LEAST)
            for f in found if name != "weight" else ():
                assert_same_number(f.learned[place], whole)
        assert all(torch.equal(weights, call.criterion().weight) for _, _, weights in parts)


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("name", OF_CLASSES)
def test_every_loss_of_class_weights(team, world, name):
    b = clustered(world)
    some = [{}, *({"reduction": word} for word in ("none", "sum", "mean_valid"))]
    calls = [Call(name, b, SCHEDULES[k % 2], options, ("mean", "sum")[k // 2]) for k, options in enumerate(some)]
    assert_as_one(team, calls)


@pytest.mark.parametrize("world", [3])
def test_a_number_that_learns_beside_the_weights(team, world):
    assert_as_one(team, [Call(learned_scale, clustered(world), s, {}) for s in SCHEDULES])


@pytest.mark.parametrize("world", [3])
def test_a_process_without_rows_and_one_class(team, world):
    b = clustered(world)._replace(sizes=(0, 30, 11))
    one = b._replace(labels=torch.full_like(b.labels, 150))
    assert_as_one(team, [Call(name, batch, SCHEDULES[0], {}) for batch in (b, one) for name in OF_CLASSES])


@pytest.mark.parametrize("world", [2])
def test_many_classes_come_in_chunks(team, world):
    """Each process's part by chunks, as one process takes many classes."""
    b = clustered(world)
    for name in ("ArcFaceLoss", "ProxyNCALoss"):
        call = Call(name, b, SCHEDULES[0], {})
        one = truth(call)
        for rank, (loss, dx) in enumerate(team.run(world, chunked, [call])):
            assert_same(loss, one.loss, LEAST)
            assert_same(dx, world * part(one.x, b.sizes, rank), LEAST)


def chunked(calls: Sequence[Call]) -> tuple[Tensor, Tensor]:
    before, class_weights.CHUNK_BYTES = class_weights.CHUNK_BYTES, 7 * 6 * 8
    try:
        ((found, _, _),) = steps(calls)
    finally:
        class_weights.CHUNK_BYTES = before
    return found.loss, found.x


def test_alone_it_is_the_criterion():
    b = clustered(2)
    criterion = Call("ArcFaceLoss", b, "ring", {}).criterion()
    alone = shard_classes(Call("ArcFaceLoss", b, "ring", {}).criterion())
    assert (alone.first, alone.last) == (0, CLASSES)
    assert torch.equal(alone(b.x, b.labels), criterion(b.x, b.labels))
    assert torch.equal(alone.whole_weight(), criterion.weight)


def test_what_cannot_be():
    with pytest.raises(TypeError, match="a loss against class weights, got NTXentLoss"):
        shard_classes(flashpair.NTXentLoss())
    with pytest.raises(ValueError, match="la and gamma of SoftTripleLoss must be numbers"):
        shard_classes(flashpair.SoftTripleLoss(10, 4, la=torch.tensor(20.0)))
