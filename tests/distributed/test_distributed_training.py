"""The shared batch in training: what learns besides embeddings, what does not, other precisions, DDP itself."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from conftest import needs_extension
from helpers import CRITERIA, assert_as_good_as, assert_same, batch, made
from ranks_cases import SCHEDULES, WORLDS, Call, D, assert_as_one, clustered, part, towers
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import flashpair
from flashpair.distributed import gather
from flashpair.losses.registry import OfClasses

pytestmark = needs_extension
every_world = pytest.mark.parametrize("world", WORLDS)
every_schedule = pytest.mark.parametrize("schedule", SCHEDULES)


def bounded(t):
    return (1 - torch.exp(-0.7 * nn.functional.softplus(t))) / 0.7


flashpair.register_transform("bounded_of_ranks", bounded)


class Own(flashpair.Criterion):
    """A loss of a user's: a transform and a learned number of his own, and a mean over rows that asks all of them."""

    def __init__(self, **common):
        super().__init__(**{"normalize": True, "reduction": "mean_valid", "impl": "auto", **common})
        self.scale = nn.Parameter(torch.tensor(4.0))

    def row_losses(self, pairs):
        pos, neg = pairs.reduce(
            flashpair.Reduction("sum", "positives", "bounded_of_ranks", scale=-self.scale, offset=0.5),
            flashpair.Reduction("sum", "negatives", "bounded_of_ranks", scale=self.scale, offset=-0.5),
        )
        num_pos, num_neg = pairs.num_positives(), pairs.num_negatives()
        losses = pos / num_pos.clamp_min(1) + neg / num_neg.clamp_min(1)
        losses = losses * (1 + pairs.batch_sum(losses) / pairs.batch_sum(torch.ones_like(losses)))
        return flashpair.RowLosses(losses, num_pos + num_neg > 0, losses.shape[0])


@every_world
@pytest.mark.parametrize("reduction", ["mean_valid", "none"])
def test_a_loss_of_ones_own(team, world, reduction):
    batches = clustered(world), towers(world)
    assert_as_one(team, [Call(Own, b, s, {"reduction": reduction}) for b in batches for s in SCHEDULES])


@every_world
@pytest.mark.parametrize("variant", ["mc", "ovo", "all_pairs", "softlabel"])
@pytest.mark.parametrize("kind", ["mean_sq", "tf_contrib", "mean_norm"])
def test_the_penalty_of_n_pairs(team, world, variant, kind):
    options = {"variant": variant, "l2_weight": nn.Parameter(torch.tensor(0.3)), "l2_kind": kind}
    batches, rounds = (clustered(world), towers(world)), ("mean", "none")
    assert_as_one(
        team,
        [
            Call(flashpair.NPairsLoss, b, s, {**options, "reduction": r})
            for b in batches
            for s in SCHEDULES
            for r in rounds
        ],
    )


@every_world
def test_labels_of_few_bits_and_numbers_that_learn(team, world):
    numbers = {name: nn.Parameter(torch.tensor(value)) for name, value in (("alpha", 2.0), ("beta", 50.0))}
    small = clustered(world)._replace(labels=clustered(world).labels.int())
    learned = {"temperature": nn.Parameter(torch.tensor(0.2))}
    cases = [
        (flashpair.NTXentLoss, learned), (flashpair.SupConLoss, learned), (flashpair.MultiSimilarityLoss, numbers),
        (flashpair.MultiSimilarityLoss, {**numbers, "epsilon": None}),
    ]  # fmt: skip
    for reduction in ("mean", "none"):
        more = {"reduction": reduction}
        assert_as_one(team, [Call(make, small, s, {**o, **more}) for make, o in cases for s in SCHEDULES])


def _tempered(b, schedule, reduction, width):
    """The temperature is a plain tensor with a graph; embeddings are every other column of a wider tensor."""
    rank = dist.get_rank() if schedule else None
    x, labels = (b.x, b.labels) if rank is None else (part(b.x, b.sizes, rank), part(b.labels, b.sizes, rank))
    wide = x.repeat_interleave(2, 1).requires_grad_()
    log = torch.tensor(-1.5, dtype=torch.float64, requires_grad=True)
    criterion = flashpair.NTXentLoss(log.exp(), reduction=reduction, impl="auto" if schedule else "reference")
    loss = (gather(criterion, schedule=schedule, gradients="sum") if schedule else criterion)(wide[:, ::2], labels)
    return [loss.detach(), *torch.autograd.grad(loss.sum() * 1.7, [wide, log])]


@every_world
@every_schedule
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_temperature_with_a_graph_and_a_strided_view(team, world, schedule, reduction):
    b = clustered(world)
    found = team.run(world, _tempered, b, schedule, reduction, None)
    loss, dx, dlog = _tempered(b, None, reduction, None)
    assert_same(torch.cat([f[1] for f in found]), dx)
    for k, f in enumerate(found):
        assert_same(f[0], part(loss, b.sizes, k) if loss.dim() else loss)
        assert_same(f[2], dlog)


def _step(name, b, schedule, dtype, mixed=False, frozen=(), grad=True):
    """Loss and gradient of x (None where there is none) on this process, or on one that has all (schedule None)."""
    rank = dist.get_rank() if schedule else None
    x, labels = (b.x, b.labels) if rank is None else (part(b.x, b.sizes, rank), part(b.labels, b.sizes, rank))
    x = x.to(dtype).requires_grad_(rank not in frozen)
    criterion = made(name, x.shape[1], impl="auto" if schedule else "reference")
    criterion = criterion.double() if dtype == torch.float64 else criterion
    call = gather(criterion, schedule=schedule, gradients="sum") if schedule else criterion
    with torch.autocast("cpu", torch.bfloat16, enabled=mixed), torch.set_grad_enabled(grad):
        loss = call(x, labels)
    learned = list(criterion.parameters())
    if not loss.requires_grad:
        return loss, None, None, rank in frozen
    wanted = [x, *learned] if x.requires_grad else learned
    found = torch.autograd.grad(loss, wanted, torch.tensor(1.7, dtype=loss.dtype))
    return loss.detach(), found[0] if x.requires_grad else None, found[int(x.requires_grad) :], rank in frozen


def _every_step(names, b, schedules, *more):
    return [_step(name, b, schedule, *more) for name in names for schedule in schedules]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("world", [3])
def test_few_bits_are_as_good_as_eager(team, world, dtype):
    x, labels = batch(200, 16, 4, dtype)
    b = clustered(world)._replace(x=x, labels=labels, sizes=(70, 101, 29))
    every = team.run(world, _every_step, list(CRITERIA), b, SCHEDULES, dtype)
    for k, (name, _) in enumerate((name, schedule) for name in CRITERIA for schedule in SCHEDULES):
        found = [mine[k] for mine in every]
        eager, true = _step(name, b, None, dtype), _step(name, b._replace(x=x.double()), None, torch.float64)
        assert_as_good_as(found[0][0], eager[0], true[0])
        assert_as_good_as(torch.cat([f[1] for f in found]), eager[1], true[1])
        for f in found:
            for mine, other, exact in zip(f[2], eager[2], true[2], strict=True):
                assert_as_good_as(mine, other, exact)


@every_world
def test_the_same_bits_again_under_autocast_and_without_a_graph(team, world):
    names, b = ["MultiSimilarityLoss", "NTXentLoss", "ArcFaceLoss", "AngularLoss"], clustered(world)
    first = team.run(world, _every_step, names, b, SCHEDULES, torch.float32)
    for again in (
        team.run(world, _every_step, names, b, SCHEDULES, torch.float32),
        team.run(world, _every_step, names, b, SCHEDULES, torch.float32, True),
    ):
        for mine, other in zip(first, again, strict=True):
            for (loss, dx, learned, _), (loss2, dx2, learned2, _) in zip(mine, other, strict=True):
                assert torch.equal(loss, loss2) and torch.equal(dx, dx2)
                assert all(torch.equal(p, q) for p, q in zip(learned, learned2, strict=True))
    quiet = team.run(world, _every_step, names, b, SCHEDULES, torch.float32, False, (), False)
    for mine, other in zip(first, quiet, strict=True):
        for (loss, *_), (loss2, dx2, *_) in zip(mine, other, strict=True):
            assert torch.equal(loss, loss2) and dx2 is None


@every_world
def test_one_process_is_frozen(team, world):
    """Its embeddings want no gradient, but those of the others hang on them as before."""
    names, b = list(CRITERIA), clustered(world)
    every = team.run(world, _every_step, names, b, SCHEDULES, torch.float64, False, (1,))
    for k, (name, _) in enumerate((name, schedule) for name in names for schedule in SCHEDULES):
        loss, dx, learned, _ = _step(name, b, None, torch.float64)
        for rank, mine in enumerate(every):
            assert_same(mine[k][0], loss)
            if rank == 1:
                assert mine[k][1] is None
            else:
                assert_same(mine[k][1], part(dx, b.sizes, rank))
            for p, q in zip(mine[k][2] or (), learned, strict=bool(learned and mine[k][2])):
                assert_same(p, q)
            assert not learned or mine[k][2], "parameters learn from frozen samples, too"


def _in_a_group(members, b, schedule):
    group = dist.new_group(members)
    if dist.get_rank() not in members:
        return None
    rank = dist.get_rank(group)
    x = part(b.x, b.sizes, rank).clone().requires_grad_()
    shared = gather(flashpair.MultiSimilarityLoss(), schedule=schedule, group=group)
    loss = shared(x, part(b.labels, b.sizes, rank))
    return loss.detach(), torch.autograd.grad(loss, x)[0]


@every_schedule
@pytest.mark.parametrize("members", [[1, 2, 3], [0, 1, 3]])
def test_some_of_the_processes(team, schedule, members):
    b = clustered(len(members))
    found = team.run(4, _in_a_group, members, b, schedule)
    x = b.x.clone().requires_grad_()
    loss = flashpair.MultiSimilarityLoss(impl="reference")(x, b.labels)
    loss.backward()
    mine = [found[rank] for rank in members]
    assert all(torch.equal(f[0], mine[0][0]) for f in mine)
    assert_same(mine[0][0], loss.detach())
    assert_same(torch.cat([f[1] for f in mine]), len(members) * x.grad)


def _criterion(name, **common):
    if name == "a temperature that learns":
        return flashpair.NTXentLoss(nn.Parameter(torch.tensor(0.2)), **common).double()
    made = CRITERIA[name](**common)
    return (made.of_width(D) if isinstance(made, OfClasses) else made).double()


def _train(name, b, schedule, rate=0.3, steps=3):
    """A small network under DDP, and in one process without it; the criterion's parameters are in neither."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(D, 16), nn.Tanh(), nn.Linear(16, D)).double()
    criterion = _criterion(name, impl="auto" if schedule else "reference")
    model, loss_of, rank = network, criterion, None
    if schedule:
        model, loss_of, rank = DistributedDataParallel(network), gather(criterion, schedule=schedule), dist.get_rank()
    optimizer = torch.optim.SGD([*network.parameters(), *criterion.parameters()], lr=rate)
    for k in range(steps):
        x, labels = b.x.roll(7 * k, 0), b.labels.roll(7 * k)
        if rank is not None:
            x, labels = part(x, b.sizes, rank), part(labels, b.sizes, rank)
        optimizer.zero_grad()
        loss_of(model(x), labels).backward()
        optimizer.step()
    return [p.detach() for p in (*network.parameters(), *criterion.parameters())]


@every_world
@every_schedule
@pytest.mark.parametrize(
    "name", ["MultiSimilarityLoss", "a temperature that learns", "MarginLoss", "ArcFaceLoss", "ProxyAnchorLoss"]
)
def test_under_ddp_the_network_is_one_process_s(team, world, schedule, name):
    b = clustered(world)
    before, after = _train(name, b, None, steps=0), _train(name, b, None)
    assert all((p - q).abs().max() > 1e-5 for p, q in zip(before, after, strict=True)), "everything learns"
    for found in team.run(world, _train, name, b, schedule):
        for mine, one in zip(found, after, strict=True):
            assert (mine - one).abs().max() <= 1e-9 * one.abs().max()


def test_alone_it_is_the_criterion_itself():
    b = clustered(2)
    for schedule in SCHEDULES:
        criterion = flashpair.MultiSimilarityLoss()
        assert torch.equal(gather(criterion, schedule=schedule)(b.x, b.labels), criterion(b.x, b.labels))
