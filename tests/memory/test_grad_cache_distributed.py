"""GradCache with DistributedDataParallel and fully_shard: two gloo processes on the CPU against one."""

from __future__ import annotations

import contextlib
import datetime
import traceback

import pytest
import torch
import torch.distributed as dist
from grad_cache_cases import IN, D, batch, learned_temperature, network
from helpers import assert_same
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import flashpair
from flashpair import GradCache

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not dist.is_gloo_available(), reason="no gloo")]
SIZES = (18, 10)  # of the ranks' batches: with micro-batches of 4, five and three of them
RANKS = range(2)


def data(step=0):
    return [batch(n, seed=10 * step + rank) for rank, n in enumerate(SIZES)]


def criterion():
    return flashpair.NTXentLoss(0.3)


def encoder():
    return network(norm=[nn.BatchNorm1d(32)])


def whole(make, batches, size, references=None):
    """One process: the mean of the ranks' losses, each of its own batch; micro-batches of `size`.

    The gradients that DDP averages, and each rank's buffers.
    """
    total, buffers = None, []
    for rank, (x, labels) in enumerate(batches):
        net = make()
        refs = {} if references is None else {"ref_emb": net(references[rank][0]), "ref_labels": references[rank][1]}
        loss = criterion()(torch.cat([net(part) for part in x.split(size)]), labels, **refs)
        loss.backward()
        gradients = [p.grad / len(batches) for p in net.parameters()]
        total = gradients if total is None else [a + b for a, b in zip(total, gradients, strict=True)]
        buffers.append(list(net.buffers()))
    return total, buffers


def assert_gradients(net, truth):
    for parameter, gradient in zip(net.parameters(), truth, strict=True):
        found = parameter.grad.full_tensor() if hasattr(parameter.grad, "full_tensor") else parameter.grad
        assert gradient.abs().max() > 0
        assert_same(found, gradient)


def counting(net):
    """DDP that counts its all-reduces."""
    ddp, counts = DistributedDataParallel(net), []

    def hook(state, bucket):
        counts.append(bucket.index())
        return default_hooks.allreduce_hook(state, bucket)

    ddp.register_comm_hook(None, hook)
    return ddp, counts


def ddp_equals_one_process(rank):
    x, labels = data()[rank]
    ddp, reduced = counting(encoder())
    GradCache(ddp, criterion(), micro_batch=4)(x, labels)
    truth, buffers = whole(encoder, data(), 4)
    assert_gradients(ddp, truth)
    for found, value in zip(ddp.buffers(), buffers[rank], strict=True):
        assert_same(found.double(), value.double())
    assert reduced == [0]


def ddp_broadcasts_buffers_at_the_next_step(rank):
    """Those of rank 0, as it does in a step without GradCache."""
    x, labels = data()[rank]
    ddp = DistributedDataParallel(encoder())
    cache = GradCache(ddp, criterion(), micro_batch=4)
    cache(x, labels)
    cache(x, labels)
    net = encoder()  # as rank 0 leaves it after a step
    for part in (*data()[0][0].split(4), *x.split(4)):
        net(part)
    for found, value in zip(ddp.buffers(), net.buffers(), strict=True):
        assert_same(found.double(), value.double())


class Queue(nn.Module):
    """An output that depends on a buffer, which ranks have not in common."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(IN, D).double()
        self.register_buffer("state", torch.ones((), dtype=torch.float64))

    def forward(self, x):
        out = self.linear(x) + self.state * x[:, :D] ** 2
        self.state.add_(out.detach().mean())
        return out


def ddp_replays_with_the_buffers_that_were_broadcast(rank):
    x, labels = data()[rank]
    torch.manual_seed(3)
    ddp = DistributedDataParallel(Queue())
    ddp.module.state.fill_(1.0 + rank)
    seen = []
    ddp.module.register_forward_hook(lambda module, inputs, out: seen.append(out.detach()))
    GradCache(ddp, criterion(), micro_batch=4)(x, labels)
    first, second = seen[: len(seen) // 2], seen[len(seen) // 2 :]
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def ddp_accumulates(rank):
    """Two calls, the first of which does not reduce: by `sync`, and by DDP's own no_sync."""
    truth = [sum(g) for g in zip(*(whole(encoder, data(step), 4)[0] for step in range(2)), strict=True)]
    for own in (False, True):
        ddp, reduced = counting(encoder())
        cache = GradCache(ddp, criterion(), micro_batch=4)
        with ddp.no_sync() if own else contextlib.nullcontext():
            cache(*data(0)[rank], sync=own)
        assert reduced == []
        cache(*data(1)[rank])
        assert reduced == [0]
        assert_gradients(ddp, truth)


def ddp_of_a_shared_tower_reduces_once(rank):
    (x, labels), (y, ref_labels) = data()[rank], data(1)[rank]
    ddp, reduced = counting(network())
    cache = GradCache(ddp, criterion(), micro_batch=4)
    cache(x, labels, ref_inputs=y, ref_labels=ref_labels)
    assert reduced == [0]
    assert_gradients(ddp, whole(network, data(), 4, data(1))[0])


def sharded():
    net, mesh = network(), init_device_mesh("cpu", (len(RANKS),))
    for layer in (net[0], net[-1], net):
        fully_shard(layer, mesh=mesh)
    return net


def equal_batches(step=0):
    return [batch(18, seed=10 * step + rank) for rank in RANKS]


def fsdp_equals_one_process(rank):
    net = sharded()
    GradCache(net, criterion(), micro_batch=5)(*equal_batches()[rank])
    assert_gradients(net, whole(network, equal_batches(), 5)[0])


def fsdp_accumulates(rank):
    truth = [sum(g) for g in zip(*(whole(network, equal_batches(step), 5)[0] for step in range(2)), strict=True)]
    net = sharded()
    cache = GradCache(net, criterion(), micro_batch=5)
    cache(*equal_batches(0)[rank], sync=False)
    assert all(p.grad is None for p in net.parameters())  # nothing has been reduced into the shards
    cache(*equal_batches(1)[rank])
    assert_gradients(net, truth)


def fsdp_reduces_once(rank):
    from torch.distributed.fsdp._fully_shard import _fsdp_param_group as groups

    reduce, counts = groups.foreach_reduce, []

    def counted(*args, **kwargs):
        counts.append(1)
        return reduce(*args, **kwargs)

    net = sharded()
    groups.foreach_reduce = counted
    try:
        GradCache(net, criterion(), micro_batch=5)(*equal_batches()[rank])
    finally:
        groups.foreach_reduce = reduce
    assert len(counts) == 2  # of the two groups of parameters, once each


def fsdp_trains(rank):
    """Steps of an optimizer, and a plain step after them: what GradCache sets for a step, it sets back."""
    net, single = sharded(), network()
    optimizers = [torch.optim.SGD(n.parameters(), lr=0.5) for n in (net, single)]
    cache = GradCache(net, criterion(), micro_batch=5)
    for step in range(3):
        truth = []
        for n, optimizer in zip((net, single), optimizers, strict=True):
            optimizer.zero_grad()
            mine = [equal_batches(step)[rank]] if n is net else equal_batches(step)
            if n is net and step < 2:
                truth.append(cache(*mine[0]))
            else:
                losses = torch.stack([criterion()(n(x), labels) for x, labels in mine])
                losses.mean().backward()
                truth.append(losses[rank if n is single else 0].detach())
            optimizer.step()
        assert_same(*truth)


def the_loss_of_all_ranks(rank):
    """gather() within GradCache: gradients are those of one process with the batches of all ranks."""
    from flashpair.distributed import gather

    queries, references = equal_batches(0), equal_batches(1)
    for shard in (DistributedDataParallel, None):
        net, loss = (sharded() if shard is None else shard(network())), learned_temperature()
        refs = {"ref_inputs": references[rank][0], "ref_labels": references[rank][1]}
        found = GradCache(net, gather(loss), micro_batch=5)(*queries[rank], **refs)

        (x, labels), (y, ref_labels) = (map(torch.cat, zip(*parts, strict=True)) for parts in (queries, references))
        single, single_loss = network(), learned_temperature()
        truth = single_loss(single(x), labels, ref_emb=single(y), ref_labels=ref_labels)
        truth.backward()
        assert_same(found, truth.detach())
        assert_gradients(net, [p.grad for p in single.parameters()])
        assert_gradients(loss, [single_loss.temperature.grad])


SCENARIOS = [
    the_loss_of_all_ranks,
    ddp_equals_one_process,
    ddp_broadcasts_buffers_at_the_next_step,
    ddp_replays_with_the_buffers_that_were_broadcast,
    ddp_accumulates,
    ddp_of_a_shared_tower_reduces_once,
    fsdp_equals_one_process,
    fsdp_accumulates,
    fsdp_reduces_once,
    fsdp_trains,
]


def process(rank, file):
    """One rank: why scenarios fail, by their names, into `file` and the rank's number."""
    torch.set_num_threads(1)
    timeout = datetime.timedelta(seconds=60)  # of a rank whose other has failed
    dist.init_process_group("gloo", f"file://{file}", timeout=timeout, rank=rank, world_size=len(RANKS))
    found = {}
    for scenario in SCENARIOS:
        try:
            scenario(rank)
        except Exception:
            found[scenario.__name__] = traceback.format_exc()
        dist.barrier()
    torch.save(found, f"{file}.{rank}")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def failures(tmp_path_factory):
    file = tmp_path_factory.mktemp("gloo") / "init"
    torch.multiprocessing.spawn(process, (str(file),), nprocs=len(RANKS))
    return [torch.load(f"{file}.{rank}") for rank in RANKS]


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
def test_two_processes(scenario, failures):
    why = [
        f"rank {rank}: {found[scenario.__name__]}" for rank, found in enumerate(failures) if scenario.__name__ in found
    ]
    assert not why, "\n".join(why)
