"""A criterion over the batch of all processes is one process's with the whole batch, in value and in every gradient."""

from __future__ import annotations

import pytest
from conftest import needs_extension
from helpers import CRITERIA, REFERENCE_CRITERIA
from ranks_cases import BATCHES, SCHEDULES, WORLDS, Call, assert_as_one, clustered, towers

pytestmark = needs_extension
every_world = pytest.mark.parametrize("world", WORLDS)


def calls(name, batch, reductions=None):
    """Of a criterion's own reduction, which goes with none of the others' rounding, and of those named."""
    some = [{}, *({"reduction": word} for word in reductions or ())]
    return [
        Call(name, batch, schedule, options, ("mean", "sum")[(k + j) % 2])
        for j, schedule in enumerate(SCHEDULES)
        for k, options in enumerate(some)
    ]


@every_world
@pytest.mark.parametrize("name", CRITERIA)
def test_every_criterion_in_every_reduction(team, world, name):
    assert_as_one(team, calls(name, clustered(world), CRITERIA[name]().averagings))


@every_world
@pytest.mark.parametrize("kind", [kind for kind in BATCHES if kind != "uneven"])
def test_every_criterion_on_odd_batches(team, world, kind):
    b = BATCHES[kind](world)
    assert_as_one(team, [call for name in CRITERIA for call in calls(name, b, ["none"])])


@every_world
@pytest.mark.parametrize("name", REFERENCE_CRITERIA)
def test_two_towers(team, world, name):
    assert_as_one(team, calls(name, towers(world), ["none", "sum", "mean_valid"]))


@every_world
@pytest.mark.parametrize("refs", ["none on one process", "one in all", "none at all"])
def test_every_criterion_with_few_references(team, world, refs):
    sizes = {"none on one process": [0, *[9] * (world - 1)], "one in all": [0] * (world - 1) + [1]}
    b = towers(world, sizes.get(refs, [0] * world))
    assert_as_one(team, [call for name in REFERENCE_CRITERIA for call in calls(name, b, ["none"])])


@every_world
@pytest.mark.parametrize("need", [(True, False), (False, True)], ids=["anchors learn", "references learn"])
def test_one_tower_learns(team, world, need):
    b = towers(world)
    assert_as_one(team, [c._replace(need=need) for name in REFERENCE_CRITERIA for c in calls(name, b, ["none"])])
