"""A criterion over the batch of all processes is one process's with the whole batch, in value and in every gradient."""

from __future__ import annotations

import pytest
import torch
from conftest import needs_extension
from helpers import CRITERIA, REFERENCE_CRITERIA, batch
from ranks_cases import BATCHES, SCHEDULES, WORLDS, Call, D, Shared, assert_as_one, clustered, towers

from flashpair.core.positives import PLACES, STEPS

pytestmark = needs_extension
every_world = pytest.mark.parametrize("world", WORLDS)
every_schedule = pytest.mark.parametrize("schedule", SCHEDULES)


def calls(name, batch, reductions):
    """A criterion's own reduction and those named, each with one schedule: the other one has its turn with another
    number of processes or another criterion, since every call is some dozen messages."""
    turn = len(batch.sizes) + list(CRITERIA).index(name)
    some = [{}, *({"reduction": word} for word in reductions)]
    return [
        Call(name, batch, SCHEDULES[(turn + k) % 2], options, ("mean", "sum")[(turn + k) // 2 % 2])
        for k, options in enumerate(some)
    ]


@every_world
@pytest.mark.parametrize("name", CRITERIA)
def test_every_criterion_in_every_reduction(team, world, name):
    """With three processes each of its reductions; with two or four, its own and without one."""
    assert_as_one(team, calls(name, clustered(world), CRITERIA[name]().averagings if world == 3 else ["none"]))


@every_world
@pytest.mark.parametrize("kind", [kind for kind in BATCHES if kind != "uneven"])
def test_every_criterion_on_odd_batches(team, world, kind):
    """With four processes, where two visit each other with half of their rows, every one; with two or three half of
    them. Each by turns in its own reduction, and without one."""
    b, turn = BATCHES[kind](world), list(BATCHES).index(kind)
    some = [name for k, name in enumerate(CRITERIA) if world == 4 or (turn + k + world) % 2]
    assert_as_one(team, [calls(name, b, ["none"])[(turn + k) % 2] for k, name in enumerate(some)])


@every_world
@every_schedule
def test_schedules_and_gradients_are_the_same_with_each_other(team, world, schedule):
    """What `calls` takes by turns, together: in forms that take different ways through walks and pieces."""
    names = ["MultiSimilarityLoss", "NPairsLoss", "TripletMarginLoss(triplets='hard')", "HistogramLoss", "ArcFaceLoss"]
    ways = [(options, by) for options in ({}, {"reduction": "none"}) for by in ("mean", "sum")]
    b = clustered(world)
    assert_as_one(team, [Call(name, b, schedule, options, by) for name in names for options, by in ways])


@every_world
@pytest.mark.parametrize("name", REFERENCE_CRITERIA)
def test_two_towers(team, world, name):
    assert_as_one(team, calls(name, towers(world), ["none", "mean_valid"] if world == 3 else ["none"]))


@pytest.mark.parametrize("world", [2])
def test_more_positives_than_a_loss_takes_at_a_time(team, world):
    few, many = 2 * STEPS + 5, 4 * PLACES + 5
    small = Shared(*batch(few, D, few, torch.float64), [few // 2, few - few // 2])
    large = Shared(*batch(2 * many, D, many, torch.float64), [many - 40, many + 40])
    assert_as_one(
        team, [call for name in ("AngularLoss", "AngularLoss(form='hinge')") for call in calls(name, small, [])]
    )
    triplets = ("TripletMarginLoss", "TripletMarginLoss(triplets='semihard')")
    assert_as_one(team, [call for name in triplets for call in calls(name, large, ["none"])])


@pytest.mark.parametrize("world", [3])
@pytest.mark.parametrize("refs", ["none on one process", "one in all", "none at all"])
def test_every_criterion_with_few_references(team, world, refs):
    sizes = {"none on one process": [0, *[9] * (world - 1)], "one in all": [0] * (world - 1) + [1]}
    b = towers(world, sizes.get(refs, [0] * world))
    assert_as_one(team, [call for name in REFERENCE_CRITERIA for call in calls(name, b, ["none"])])


@pytest.mark.parametrize("world", [4])
@pytest.mark.parametrize("need", [(True, False), (False, True)], ids=["anchors learn", "references learn"])
def test_one_tower_learns(team, world, need):
    b = towers(world)
    assert_as_one(team, [c._replace(need=need) for name in REFERENCE_CRITERIA for c in calls(name, b, ["none"])])
