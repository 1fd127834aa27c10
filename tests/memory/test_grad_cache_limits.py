"""What a step of GradCache costs, and what it refuses."""

from __future__ import annotations

import weakref

import pytest
import torch
from grad_cache_cases import IN, D, batch, network, plain
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import flashpair
from flashpair import GradCache

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
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


def test_reads_one_value():
    """Whether a replay differed, at the end."""
    x, labels = batch()
    with Operations() as seen:
        GradCache(network(0.3, [nn.BatchNorm1d(32)]), lambda e, _: e.square().mean(), micro_batch=5)(x, labels)
    assert "aten.tanh.default" in seen.names
    read = [name for name in seen.names if any(s in name for s in ("_local_scalar", "nonzero", "equal", "item"))]
    assert read == ["aten._local_scalar_dense.default"]


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
    (dict(inputs={"ids": [X, 3]}), TypeError, r"^inputs must be .* got int 3 at \['ids'\]\[1\]"),
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
