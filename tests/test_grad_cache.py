"""GradCache against the step it stands in for: the same micro-batches in one graph, and one loss.backward()."""

from __future__ import annotations

import copy
import weakref

import pytest
import torch
from helpers import assert_as_good_as, assert_same
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import flashpair
from flashpair import GradCache

N, M, IN, D = 17, 11, 6, 5


def network(dropout=0.0, norm=(), dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(IN, 32), *norm, nn.Tanh(), nn.Dropout(dropout), nn.Linear(32, D)).to(dtype)


def batch(n=N, seed=1, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, IN, generator=generator, dtype=dtype), torch.randint(4, (n,), generator=generator)


def learned_temperature():
    criterion = flashpair.NTXentLoss(temperature=0.3)
    criterion.temperature = nn.Parameter(torch.tensor(0.3, dtype=torch.float64))
    return criterion


def arcface():
    torch.manual_seed(4)
    return flashpair.ArcFaceLoss(num_classes=4, embedding_size=D, margin=10, scale=4).double()


CRITERIA = {"ms": flashpair.MultiSimilarityLoss, "arcface": arcface, "temperature": learned_temperature}


def plain(encoder, criterion, inputs, labels, size, **references):
    """The step without GradCache."""
    loss = criterion(torch.cat([encoder(part) for part in inputs.split(size)]), labels, **references)
    loss.backward()
    return loss.detach()


def outcome(modules, step):
    """What a step leaves, from the same state: loss, gradients and buffers by name, and the generator's state."""
    modules = nn.ModuleList(copy.deepcopy(modules))
    torch.manual_seed(7)
    loss = step(*modules)
    left = {name: p.grad for name, p in modules.named_parameters()} | dict(modules.named_buffers())
    return loss, left, torch.get_rng_state()


def assert_same_outcome(found, truth):
    assert not found[0].requires_grad
    assert_same(found[0], truth[0])
    assert found[1].keys() == truth[1].keys()
    for name, value in truth[1].items():
        assert (found[1][name] is None) == (value is None), name
        if value is not None:
            assert value.isfinite().all(), name
            assert_same(found[1][name].double(), value.double())
    assert torch.equal(found[2], truth[2])


def compare(modules, step, cached):
    truth = outcome(modules, step)
    assert_same_outcome(outcome(modules, cached), truth)
    return truth


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


# What a step costs


class Held:
    def __init__(self, tensor):
        self.tensor = tensor


def peak_saved(step):
    """The most bytes that autograd has saved at a time, counted for every saving."""
    now = peak = 0

    def freed(count):
        nonlocal now
        now -= count

    def pack(tensor):
        nonlocal now, peak
        now += tensor.nbytes
        peak = max(peak, now)
        held = Held(tensor)
        weakref.finalize(held, freed, tensor.nbytes)
        return held

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda held: held.tensor):
        step()
    assert now == 0
    return peak


def test_activations_are_those_of_one_micro_batch():
    size, wide = 16, nn.Sequential(nn.Linear(IN, 512), nn.Tanh(), nn.Linear(512, 512), nn.Tanh(), nn.Linear(512, D))
    criterion = flashpair.MultiSimilarityLoss()
    x, labels = batch(320, dtype=torch.float32)
    one = peak_saved(lambda: wide(x[:size]).sum().backward())
    loss = peak_saved(lambda: criterion(torch.zeros(320, D, requires_grad=True), labels).backward())
    whole = peak_saved(lambda: plain(wide, criterion, x, labels, size))
    assert loss < one < whole / 15
    assert peak_saved(lambda: GradCache(wide, criterion, micro_batch=size)(x, labels)) == one


def test_no_micro_batch_is_kept_for_itself():
    """Small tensors that outlive activations would leave holes in the heap where these were."""
    returned = []

    class Watching(nn.Linear):
        def forward(self, x):
            assert sum(out() is not None for out in returned) <= 1
            out = super().forward(x)
            returned.append(weakref.ref(out))
            return out

    GradCache(Watching(IN, D), lambda x, labels: x.square().sum(), micro_batch=4)(torch.randn(11, IN), torch.arange(11))
    assert len(returned) == 6


class Operations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(str(function))
        return function(*args, **(kwargs or {}))


def test_reads_no_values():
    x, labels = batch()
    with Operations() as seen:
        GradCache(network(0.3, [nn.BatchNorm1d(32)]), lambda e, _: e.square().mean(), micro_batch=5)(x, labels)
    assert "aten.tanh.default" in seen.names
    assert not [name for name in seen.names if any(s in name for s in ("_local_scalar", "nonzero", "equal", "item"))]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_on_a_gpu():
    x, labels = (t.cuda() for t in batch())
    compare(
        [network(0.3, [nn.BatchNorm1d(32)]).cuda(), learned_temperature().cuda()],
        lambda *modules: plain(*modules, x, labels, 5),
        lambda *modules: GradCache(*modules, micro_batch=5)(x, labels),
    )


# Refusals

X, LABELS = batch()
NET, LOSS = network(), flashpair.NTXentLoss()
MADE = [
    (dict(encoder=LOSS.forward), TypeError, "^encoder must be a torch.nn.Module, got method"),
    (dict(ref_encoder=3), TypeError, "^ref_encoder must be a torch.nn.Module, got int 3"),
    (dict(criterion=None), TypeError, "^criterion must be callable, got NoneType"),
    (dict(scale=2.0), TypeError, "^scale must be callable, got float 2.0"),
    (dict(micro_batch=0), ValueError, "^micro_batch must be at least 1, got 0"),
    (dict(micro_batch=2.0), TypeError, "^micro_batch must be an int"),
    (dict(ref_micro_batch=0), ValueError, "^ref_micro_batch must be at least 1, got 0"),
]
CALLED = [
    (dict(inputs=[]), ValueError, r"^inputs must be a tensor .* got \[\]"),
    (dict(inputs={"ids": [X, 3]}), TypeError, r"^inputs must be .* got int at \['ids'\]\[1\]"),
    (dict(inputs=X[0, 0]), ValueError, r"^inputs must be .* got float64 \(\)"),
    (
        dict(inputs=(X, X[1:])),
        ValueError,
        r"^inputs must be .* got float64 \(16, 6\) on cpu at \[1\] beside .*\(17, 6\)",
    ),
    (dict(inputs=X.clone().requires_grad_() * 2), ValueError, "^inputs must be leaf tensors or require no gradient"),
    (dict(labels=LABELS[1:]), ValueError, r"^labels must be a tensor of shape \(17,\) like inputs, got int64 \(16,\)"),
    (dict(labels=None), ValueError, r"^labels must be a tensor of shape \(17,\)"),
    (dict(labels=LABELS.double()), TypeError, "^labels must be an integer tensor"),
    (dict(ref_inputs=X), ValueError, r"^ref_labels must be a tensor of shape \(17,\) like ref_inputs, got NoneType"),
    (dict(ref_inputs=X, ref_labels=LABELS[:3]), ValueError, r"^ref_labels must be a tensor of shape \(17,\)"),
    (dict(ref_inputs="text", ref_labels=LABELS), TypeError, "^ref_inputs must be a tensor .* got str"),
    (dict(ref_inputs=X, ref_labels=LABELS, ref_emb=X), ValueError, "^ref_emb must be None with ref_inputs"),
    (dict(ref_labels=LABELS), ValueError, "^ref_emb must be given with ref_labels"),
    (dict(sync=1), TypeError, "^sync must be a bool"),
]
RETURNED = [
    (dict(encoder=nn.Flatten(0)), ValueError, r"^what encoder returns must have shape \(n, D\)"),
    (dict(encoder=nn.Unflatten(1, (2, 3))), ValueError, r"^what encoder returns must have shape \(n, D\)"),
    (dict(criterion=flashpair.NTXentLoss(reduction="none")), ValueError, r"^criterion must return a loss .* \(17,\)"),
    (dict(criterion=lambda *_: 1.0), ValueError, r"^criterion must return a loss of shape \(\), got float 1.0"),
]


@pytest.mark.parametrize("arguments, error, words", MADE)
def test_refuses_to_be_made(arguments, error, words):
    with pytest.raises(error, match=words):
        GradCache(**{"encoder": NET, "criterion": LOSS, "micro_batch": 4, **arguments})


@pytest.mark.parametrize("arguments, error, words", CALLED)
def test_refuses_a_call(arguments, error, words):
    with pytest.raises(error, match=words):
        GradCache(NET, LOSS, micro_batch=4)(**{"inputs": X, "labels": LABELS, **arguments})


@pytest.mark.parametrize("arguments, error, words", RETURNED)
def test_refuses_what_is_returned(arguments, error, words):
    with pytest.raises(error, match=words):
        GradCache(**{"encoder": NET, "criterion": LOSS, "micro_batch": 4, **arguments})(X, LABELS)


def test_an_encoder_that_loses_rows():
    class Halves(nn.Module):
        def forward(self, x):
            return x[::2]

    with pytest.raises(ValueError, match=r"^ref_encoder must return a row for each of 4 inputs, got float64 \(2, 6\)"):
        GradCache(nn.Identity(), LOSS, micro_batch=4, ref_encoder=Halves())(X, LABELS, ref_inputs=X, ref_labels=LABELS)


@pytest.mark.parametrize("other", [lambda x: x[:, :1], torch.Tensor.float], ids=["width", "dtype"])
def test_an_encoder_that_changes(other):
    class Changes(nn.Module):
        def forward(self, x):
            return x if len(x) == 4 else other(x)

    with pytest.raises(ValueError, match=r"^encoder must return one width and dtype for all inputs, got float.* after"):
        GradCache(Changes(), LOSS, micro_batch=4)(X, LABELS)
