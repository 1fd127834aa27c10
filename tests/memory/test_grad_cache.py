"""GradCache against the step it stands in for: the same micro-batches in one graph, and one loss.backward()."""

from __future__ import annotations

import pytest
import torch
from grad_cache_cases import (
    CRITERIA,
    IN,
    D,
    M,
    N,
    assert_same_outcome,
    batch,
    compare,
    learned_temperature,
    network,
    outcome,
    plain,
)
from helpers import assert_as_good_as, assert_same
from torch import nn

import flashpair
from flashpair import GradCache


@pytest.mark.parametrize("size", [1, 4, 16, 17, 100])
@pytest.mark.parametrize("criterion", CRITERIA)
def test_equals_the_plain_step(criterion, size):
    x, labels = batch()
    _, left, _ = compare(
        [network(dropout=0.3), CRITERIA[criterion]()],
        lambda encoder, criterion: plain(encoder, criterion, x, labels, size),
        lambda encoder, criterion: GradCache(encoder, criterion, micro_batch=size)(x, labels),
    )
    assert all(gradient.abs().max() > 0 for gradient in left.values())


@pytest.mark.parametrize("n", [0, 1])
def test_batches_without_pairs(n):
    x, labels = batch(n)
    compare(
        [network(), flashpair.MultiSimilarityLoss()],
        lambda *modules: plain(*modules, x, labels, 4),
        lambda *modules: GradCache(*modules, micro_batch=4)(x, labels),
    )


class OfNested(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, inputs):
        (left, right), scale = inputs["halves"], inputs["scale"]
        return self.inner(torch.cat([left, right], dim=1)) * scale


def test_inputs_nest():
    x, labels = batch()
    scale = torch.rand(N, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    compare(
        [network(), flashpair.MultiSimilarityLoss()],
        lambda encoder, criterion: plain(lambda part: encoder(part[:, :IN]) * part[:, IN:], criterion,
                                         torch.cat([x, scale], 1), labels, N),
        lambda encoder, criterion: GradCache(OfNested(encoder), criterion, micro_batch=5)(
            {"halves": [x[:, :2], x[:, 2:]], "scale": scale}, labels
        ),
    )  # fmt: skip


def test_inputs_get_their_gradient():
    x, labels = batch()
    encoder, criterion = network(), flashpair.MultiSimilarityLoss()
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    plain(encoder, criterion, a, labels, N)
    GradCache(encoder.requires_grad_(False), criterion, micro_batch=5)(b, labels)
    assert a.grad.abs().max() > 0
    assert_same(b.grad, a.grad)


# Two towers


def two(criterion, encoder, ref_encoder, x, y, labels, ref_labels, sizes):
    parts = torch.cat([encoder(part) for part in x.split(sizes[0])])
    refs = torch.cat([ref_encoder(part) for part in y.split(sizes[1])])
    loss = criterion(parts, labels, ref_emb=refs, ref_labels=ref_labels)
    loss.backward()
    return loss.detach()


TRUNK = nn.Linear(IN, IN).double()
TOWERS = {
    "own": lambda: (network(0.3), network(0.3, seed=2)),
    "shared trunk": lambda: (nn.Sequential(TRUNK, network(0.3)), nn.Sequential(TRUNK, network(0.3, seed=2))),
    "frozen queries": lambda: (network(0.3, [nn.BatchNorm1d(32)]).requires_grad_(False), network(0.3, seed=2)),
    "frozen references": lambda: (network(0.3), network(0.3, [nn.BatchNorm1d(32)], seed=2).requires_grad_(False)),
}


@pytest.mark.parametrize("towers", TOWERS)
def test_two_towers(towers):
    (x, labels), (y, ref_labels) = batch(), batch(M, seed=2)
    truth = compare(
        [*TOWERS[towers](), learned_temperature()],
        lambda a, b, criterion: two(criterion, a, b, x, y, labels, ref_labels, (5, 3)),
        lambda a, b, criterion: GradCache(a, criterion, micro_batch=5, ref_encoder=b, ref_micro_batch=3)(
            x, labels, ref_inputs=y, ref_labels=ref_labels
        ),
    )
    assert any(gradient is None for gradient in truth[1].values()) == ("frozen" in towers)


def test_one_encoder_for_both_towers():
    (x, labels), (y, ref_labels) = batch(), batch(M, seed=2)
    compare(
        [network(0.3, [nn.BatchNorm1d(32)]), learned_temperature()],
        lambda encoder, criterion: two(criterion, encoder, encoder, x, y, labels, ref_labels, (6, 6)),
        lambda encoder, criterion: GradCache(encoder, criterion, micro_batch=6)(
            x, labels, ref_inputs=y, ref_labels=ref_labels
        ),
    )


def test_a_tower_without_gradient_runs_once():
    (x, labels), (y, ref_labels) = batch(), batch(M, seed=2)
    calls, encoders = [], (network(), network().requires_grad_(False))
    for encoder in encoders:
        encoder.register_forward_hook(lambda module, *_: calls.append((module, torch.is_grad_enabled())))
    cache = GradCache(encoders[0], flashpair.NTXentLoss(), micro_batch=9, ref_encoder=encoders[1])
    cache(x, labels, ref_inputs=y, ref_labels=ref_labels)
    first, second = [(e, False) for e in encoders for _ in range(2)], [(encoders[0], True)] * 2
    assert calls == first + second


@pytest.mark.parametrize("kept", [False, True])
def test_references_that_are_embeddings(kept):
    x, labels = batch()
    bank, bank_labels = torch.randn(M, D, dtype=torch.float64), torch.arange(M) % 4
    refs = {"ref_emb": flashpair.References(bank, bank_labels)} if kept else {}
    refs = refs or {"ref_emb": bank.clone().requires_grad_(), "ref_labels": bank_labels}
    a = bank.clone().requires_grad_()
    compare(
        [network(), learned_temperature()],
        lambda *modules: plain(*modules, x, labels, N, ref_emb=a, ref_labels=bank_labels),
        lambda *modules: GradCache(*modules, micro_batch=5)(x, labels, **refs),
    )
    if not kept:
        assert_same(refs["ref_emb"].grad, a.grad)


# What surrounds a step


def test_calls_accumulate():
    parts = [batch(seed=1), batch(12, seed=2)]

    def step(encoder, criterion):
        losses = [criterion(encoder(x), labels) for x, labels in parts]
        (sum(losses) / 2).backward()
        return losses[1].detach()

    def cached(encoder, criterion):
        cache = GradCache(encoder, criterion, micro_batch=5, scale=lambda loss: loss / 2)
        return [cache(x, labels) for x, labels in parts][1]

    compare([network(), learned_temperature()], step, cached)


def test_loss_scaling():
    x, labels = batch(dtype=torch.float32)

    def step(encoder, criterion, scaler=None):
        optimizer = torch.optim.SGD([*encoder.parameters(), *criterion.parameters()], lr=1.0)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
        loss = GradCache(encoder, criterion, micro_batch=5, scale=scaler.scale)(x, labels)
        scaled = encoder[0].weight.grad.clone()
        scaler.unscale_(optimizer)
        assert torch.equal(encoder[0].weight.grad * 2**12, scaled)
        return loss

    modules = [network(dtype=torch.float32), flashpair.NTXentLoss()]
    unscaled = outcome(modules, lambda *modules: GradCache(*modules, micro_batch=5)(x, labels))
    found = outcome(modules, step)
    assert torch.equal(found[0], unscaled[0])
    for name, gradient in unscaled[1].items():  # by a power of two, so to the bit
        assert torch.equal(found[1][name], gradient), name


class Seen(torch.autograd.Function):
    """Whether autocast is on in forward and backward."""

    @staticmethod
    def forward(ctx, x, seen):
        ctx.seen = seen
        seen.append(torch.is_autocast_enabled("cpu"))
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        ctx.seen.append(torch.is_autocast_enabled("cpu"))
        return gradient, None


class Watched(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner, self.seen, self.out = inner, [], []

    def forward(self, x):
        self.out.append(Seen.apply(self.inner(x), self.seen))
        return self.out[-1]


def test_autocast():
    x, labels = batch()
    truth = outcome([network(), learned_temperature()], lambda *modules: plain(*modules, x, labels, N))
    x, watched = x.float(), Watched(network(dtype=torch.float32))

    def step(encoder, criterion):
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            loss = criterion(torch.cat([encoder(part) for part in x.split(5)]), labels)
        loss.backward()
        return loss.detach()

    def cached(encoder, criterion):
        with torch.autocast("cpu", torch.bfloat16):
            loss = GradCache(encoder, criterion, micro_batch=5)(x, labels)
            assert torch.is_autocast_enabled("cpu")
        assert [t.dtype for t in encoder.out] == [torch.bfloat16] * 8
        assert all(torch.equal(a, b) for a, b in zip(encoder.out[:4], encoder.out[4:], strict=True))
        assert encoder.seen == [True] * 4 + [True, False] * 4
        return loss

    modules = [watched, learned_temperature().float()]
    eager, found = outcome(modules, step), outcome(modules, cached)
    assert_as_good_as(found[0], eager[0], truth[0])
    for name, gradient in found[1].items():
        assert_as_good_as(gradient, eager[1][name], truth[1][name.replace("inner.", "")])


class Counts(nn.Module):
    """An output that depends on what earlier calls have left; the buffer is written to, or replaced."""

    def __init__(self, in_place):
        super().__init__()
        self.in_place = in_place
        self.linear = nn.Linear(IN, D).double()
        self.register_buffer("state", torch.ones((), dtype=torch.float64))

    def forward(self, x):
        out = self.linear(x) + self.state * x[:, :D] ** 2
        if self.in_place:
            self.state.add_(out.detach().mean())
        else:
            self.state = self.state + out.detach().mean()
        return out


BUFFERED = {
    "batch norm": lambda: network(norm=[nn.BatchNorm1d(32)]),
    "batch norm, mean": lambda: network(0.3, [nn.BatchNorm1d(32, momentum=None)]),
    "frozen batch norm": lambda: network(norm=[nn.BatchNorm1d(32).eval()]),
    "in place": lambda: Counts(True),
    "replaced": lambda: Counts(False),
}


@pytest.mark.parametrize("kind", BUFFERED)
def test_buffers_change_once(kind):
    x, labels = batch()
    _, left, _ = compare(
        [BUFFERED[kind](), flashpair.MultiSimilarityLoss()],
        lambda *modules: plain(*modules, x, labels, 6),
        lambda *modules: GradCache(*modules, micro_batch=6)(x, labels),
    )
    if kind == "batch norm":
        assert left["0.1.num_batches_tracked"] == 3


def test_an_older_graph_can_still_be_walked():
    x, labels = batch()
    encoder = network(norm=[nn.BatchNorm1d(32)])
    older = encoder(x)
    GradCache(encoder, flashpair.NTXentLoss(), micro_batch=5)(x, labels)
    before = encoder[0].weight.grad.clone()
    older.square().sum().backward()
    assert not torch.equal(encoder[0].weight.grad, before)


def test_a_backward_pass_that_draws_does_not_disturb_the_replay():
    class Draws(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            torch.rand(5)
            return gradient

    class Drawing(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = network(0.5)

        def forward(self, x):
            return Draws.apply(self.inner(x))

    x, labels = batch()
    found, truth = (
        outcome([Drawing(), learned_temperature()], step)
        for step in (
            lambda *modules: GradCache(*modules, micro_batch=5)(x, labels),
            lambda encoder, criterion: plain(encoder.inner, criterion, x, labels, 5),
        )
    )
    assert_same_outcome(found, truth)


def test_checkpointing_composes():
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = network(0.5)

        def forward(self, x):
            return torch.utils.checkpoint.checkpoint(self.inner, x, use_reentrant=False)

    x, labels = batch()
    compare(
        [Checkpointed(), learned_temperature()],
        lambda encoder, criterion: plain(encoder.inner, criterion, x, labels, 5),
        lambda *modules: GradCache(*modules, micro_batch=5)(x, labels),
    )


@pytest.mark.slow
def test_compiled_encoder():
    """Whose generated code draws its own numbers, with and without a graph: the replay's are the first pass's."""
    x, labels = batch(18, dtype=torch.float32)
    watched = Watched(torch.compile(network(0.5, dtype=torch.float32)))
    GradCache(watched, flashpair.NTXentLoss(0.3), micro_batch=6)(x, labels)
    first, second = watched.out[:3], watched.out[3:]
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(watched.inner(x), watched.inner(x))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_on_a_gpu():
    x, labels = (t.cuda() for t in batch())
    compare(
        [network(0.3, [nn.BatchNorm1d(32)]).cuda(), learned_temperature().cuda()],
        lambda *modules: plain(*modules, x, labels, 5),
        lambda *modules: GradCache(*modules, micro_batch=5)(x, labels),
    )
