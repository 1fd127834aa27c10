"""What cannot be one batch is refused on every process; a process that dies, or has a NaN, gives nobody a number."""

from __future__ import annotations

import os
import time

import pytest
import torch
import torch.distributed as dist
from conftest import needs_extension
from helpers import CRITERIA, PAIR_CRITERIA, REFERENCE_CRITERIA, made
from ranks_cases import SCHEDULES, WORLDS, D, clustered, part, towers
from ranks_harness import DIED, Failure, Team

import flashpair
from flashpair.distributed import gather

pytestmark = needs_extension
every_world = pytest.mark.parametrize("world", WORLDS)
every_schedule = pytest.mark.parametrize("schedule", SCHEDULES)


def _odd(what, x, labels, more):
    """The arguments of a process that differs from the others in one thing."""
    if what == "width":
        return x[:, :-1], labels, more and {**more, "ref_emb": more["ref_emb"][:, :-1]}
    if what == "dtype":
        return x.float(), labels, more
    if what == "references' dtype":
        return x, labels, {**more, "ref_emb": more["ref_emb"].float()}
    if what == "references":
        return x, labels, {}
    if what == "labels":
        return x, labels.double(), more
    if what == "classes":
        return x, labels + 1000, more
    if what == "embeddings":
        return x.long(), labels, more
    raise ValueError(what)


def _refused(what, b, schedule, names):
    """The error of a call in which the last process is odd, and a call of all alike after it."""
    rank = dist.get_rank()
    x, labels, more = part(b.x, b.sizes, rank), part(b.labels, b.sizes, rank), {}
    if b.y is not None:
        more = {"ref_emb": part(b.y, b.ref_sizes, rank), "ref_labels": part(b.ref_labels, b.ref_sizes, rank)}
    found = []
    for name in names:
        shared = gather(made(name, D).double(), schedule=schedule)
        arguments = _odd(what, x, labels, more) if rank == dist.get_world_size() - 1 else (x, labels, more)
        try:
            shared(*arguments[:2], **arguments[2])
            found.append(None)
        except Exception as error:
            found.append((type(error).__name__, str(error)))
        shared(x, labels, **more)
    return found


@every_world
@every_schedule
@pytest.mark.parametrize(
    ("what", "names", "words"),
    [
        ("width", ["NTXentLoss"], "embeddings must have the same width on every process, got 6, "),
        ("dtype", ["NTXentLoss", "ArcFaceLoss"], "embeddings must have the same dtype on every process, got torch.flo"),
        ("references' dtype", ["NTXentLoss"], "ref_emb must have the same dtype on every process, got torch.float64"),
        ("references", ["NTXentLoss"], "ref_emb must be given on every process or on none"),
    ],
)
def test_what_is_not_one_batch_is_refused_on_every_process(team, world, schedule, what, names, words):
    b = towers(world) if what.startswith("ref") else clustered(world)
    for found in team.run(world, _refused, what, b, schedule, names):
        for error in found:
            assert error is not None, "a number of what is no batch"
            assert error[0] == "ValueError" and error[1].startswith(words), error


@every_world
@pytest.mark.parametrize(
    ("what", "name", "kind", "words"),
    [
        ("labels", "NTXentLoss", "TypeError", "labels must be an integer tensor"),
        ("embeddings", "NTXentLoss", "TypeError", "embeddings must be a float16"),
        ("classes", "ProxyAnchorLoss", "ValueError", "labels must be in [0, 200)"),
        ("width", "ArcFaceLoss", "ValueError", "embeddings must have embedding_size = 6 columns"),
    ],
)
def test_what_one_process_refuses_all_refuse(team, world, what, name, kind, words):
    *others, (own,) = team.run(world, _refused, what, clustered(world), "all_gather", [name])
    assert own is not None and own[0] == kind and own[1].startswith(words), own
    for (error,) in others:
        assert error == ("ValueError", f"the arguments on process {world - 1} are invalid; the error there says why")


def _named(b, impl):
    rank = dist.get_rank()
    try:
        gather(flashpair.NTXentLoss(impl=impl))(part(b.x, b.sizes, rank), part(b.labels, b.sizes, rank))
    except RuntimeError as error:
        return str(error)
    return None


@pytest.mark.parametrize("impl", ["reference", "onchip", "screened"])
def test_an_implementation_that_takes_no_pieces_is_refused_by_name(team, impl):
    for words in team.run(2, _named, clustered(2), impl):
        assert words is not None and f"impl={impl!r} cannot run" in words


def test_words_and_things_that_are_no_criterion():
    loss = flashpair.NTXentLoss()
    with pytest.raises(ValueError, match="schedule must be one of all_gather, ring, got 'star'"):
        gather(loss, schedule="star")
    with pytest.raises(ValueError, match="gradients must be one of mean, sum, got 'max'"):
        gather(loss, gradients="max")
    with pytest.raises(TypeError, match=r"must be a flashpair\.Criterion, got MSELoss"):
        gather(torch.nn.MSELoss())

    class Regularized(flashpair.NTXentLoss):
        def regularizer(self, x, labels, y, ref_labels):
            return x.square().sum()

    with pytest.raises(TypeError, match="Regularized overrides regularizer, which sees one process only"):
        gather(Regularized())


def _poisoned(b, value):
    """The batch whose last process has `value` among its references, or among its embeddings."""
    side, sizes = ("x", b.sizes) if b.y is None else ("y", b.ref_sizes)
    bad = getattr(b, side).clone()
    bad[sum(sizes[:-1]), 0] = value
    return b._replace(**{side: bad})


def _losses(names, b, schedule, options):
    rank, found, more = dist.get_rank(), [], {}
    x, labels = part(b.x, b.sizes, rank), part(b.labels, b.sizes, rank)
    if b.y is not None:
        more = {"ref_emb": part(b.y, b.ref_sizes, rank), "ref_labels": part(b.ref_labels, b.ref_sizes, rank)}
    for name in names:
        leaf = x.clone().requires_grad_()
        loss = gather(made(name, D, **options).double(), schedule=schedule)(leaf, labels, **more)
        loss.sum().backward()
        found.append(loss.detach())
    return found


@pytest.mark.parametrize(
    ("world", "schedule", "value"), [(2, "ring", torch.inf), (3, "all_gather", torch.nan), (4, "ring", torch.nan)]
)
def test_what_is_not_finite_on_one_process_is_nan_on_all(team, world, schedule, value):
    b = _poisoned(clustered(world), value)
    for found in team.run(world, _losses, list(CRITERIA), b, schedule, {}):
        finite = [name for name, loss in zip(CRITERIA, found, strict=True) if not loss.isnan()]
        assert not finite, finite


@pytest.mark.parametrize(("world", "schedule"), [(2, "all_gather"), (3, "ring"), (4, "all_gather")])
@pytest.mark.parametrize("names", [PAIR_CRITERIA, REFERENCE_CRITERIA], ids=["batch", "references"])
def test_what_is_not_finite_reaches_the_rows_that_it_reaches_in_one_process(team, world, schedule, names):
    b = _poisoned(clustered(world) if names is PAIR_CRITERIA else towers(world), torch.nan)
    every, wrong = team.run(world, _losses, list(names), b, schedule, {"reduction": "none"}), []
    more = {} if b.y is None else {"ref_emb": b.y, "ref_labels": b.ref_labels}
    for k, name in enumerate(names):
        one = made(name, D, reduction="none", impl="reference").double()(b.x, b.labels, **more)
        mine = torch.cat([found[k] for found in every])
        wrong += (
            [] if torch.equal(mine.isnan(), one.isnan()) else [f"{name}: {mine.isnan().sum()} of {one.isnan().sum()}"]
        )
    assert not wrong, wrong


class Dying(flashpair.NTXentLoss):
    """One process ends between its passes."""

    def __init__(self, rank):
        super().__init__()
        self.rank = rank

    def row_losses(self, pairs):
        pairs.reduce(flashpair.Reduction("logsumexp", "negatives"))
        if dist.get_rank() == self.rank:
            os._exit(1)
        return super().row_losses(pairs)


def _die(b, schedule, who, when):
    rank = dist.get_rank()
    criterion = flashpair.NTXentLoss() if when == "before" else Dying(who)
    shared = gather(criterion, schedule=schedule)
    dist.barrier()  # or others, who are still joining the group, would fail at that
    if rank == who and when == "before":
        time.sleep(1)
        os._exit(1)
    began = time.monotonic()
    try:
        loss = shared(part(b.x, b.sizes, rank), part(b.labels, b.sizes, rank))
        return loss.item()
    except Exception as error:
        return type(error).__name__, str(error), time.monotonic() - began


@pytest.fixture
def mortals():
    """Processes of a group that waits twenty seconds."""
    made = Team(seconds=20)
    yield made
    made.close()


@every_schedule
@pytest.mark.parametrize("when", ["before", "between two passes"])
@pytest.mark.parametrize("who", [0, 2])
def test_who_survives_a_process_has_an_error_and_no_number(mortals, schedule, when, who):
    mortals.ask(3, _die, clustered(3), schedule, who, when)
    found = mortals.answers(3, patience=90)
    assert found[who] is DIED
    for rank in {0, 1, 2} - {who}:
        assert not isinstance(found[rank], (float, Failure)), found[rank]
        kind, words, seconds = found[rank]
        assert kind in ("RuntimeError", "DistBackendError", "DistNetworkError"), (kind, words)
        assert seconds < 30, "a little over the group's own limit"
