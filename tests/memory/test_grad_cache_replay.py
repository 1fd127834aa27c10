"""GradCache's replay sees what the first pass saw, whatever the encoder does to it, or says that it did not."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from grad_cache_cases import IN, D, batch, compare, network, plain
from torch import nn

import flashpair
from flashpair import GradCache


class Changing(nn.Module):
    """Writes into its input, and adds to the dict that it came in."""

    def __init__(self):
        super().__init__()
        self.inner = network()

    def forward(self, inputs):
        x = inputs["x"].div_(4).sub_(0.1)
        inputs["again"] = inputs.get("again", 0) + 1
        assert inputs["again"] == 1
        return self.inner(x)


def test_inputs_that_the_encoder_changes():
    x, labels = batch()
    before = x.clone()
    compare(
        [Changing(), flashpair.NTXentLoss()],
        lambda encoder, criterion: plain(lambda part: encoder({"x": part.clone()}), criterion, x, labels, 5),
        lambda *modules: GradCache(*modules, micro_batch=5)({"x": x}, labels),
    )
    assert torch.equal(x, before)


class Masked(nn.Module):
    """Dropout by another generator than torch's own."""

    def __init__(self, kind, source):
        super().__init__()
        self.inner, self.kind = network(), kind
        setattr(self, "source" if kind != "hidden" else "_hidden", source if kind != "hidden" else [source])

    def forward(self, x):
        draw = {
            "python": lambda: [random.random() for _ in range(IN)],
            "numpy": lambda: np.random.rand(IN),  # noqa: NPY002 the global state is meant
            "torch's own": lambda: torch.rand(IN, generator=self.source),
            "numpy's own": lambda: self.source.random(IN),
            "numpy's old": lambda: self.source.rand(IN),
            "python's own": lambda: [self.source.random() for _ in range(IN)],
            "hidden": lambda: self._hidden[0].random(IN),
        }[self.kind]
        return self.inner(x * (torch.as_tensor(draw(), dtype=x.dtype) > 0.3))


SOURCES = {
    "python": lambda: random.seed(3),
    "numpy": lambda: np.random.seed(3),  # noqa: NPY002
    "torch's own": lambda: torch.Generator().manual_seed(3),
    "numpy's own": lambda: np.random.default_rng(3),
    "numpy's old": lambda: np.random.RandomState(3),
    "python's own": lambda: random.Random(3),
    "hidden": lambda: np.random.default_rng(3),
}


@pytest.mark.parametrize("kind", [kind for kind in SOURCES if kind != "hidden"])
def test_other_random_numbers(kind):
    x, labels = batch()
    gradients = []
    for step in (lambda e, c: plain(e, c, x, labels, 5), lambda e, c: GradCache(e, c, micro_batch=5)(x, labels)):
        encoder = Masked(kind, SOURCES[kind]())
        step(encoder, flashpair.NTXentLoss())
        gradients.append(encoder.inner[0].weight.grad)
    assert gradients[0].abs().max() > 0
    torch.testing.assert_close(*gradients)


def test_a_replay_that_differs_is_an_error():
    x, labels = batch()
    with pytest.raises(RuntimeError, match=r"^encoder must return the same in the replay as in the first pass"):
        GradCache(Masked("hidden", SOURCES["hidden"]()), flashpair.NTXentLoss(), micro_batch=5)(x, labels)


@pytest.mark.parametrize("rate", [0.05, 0.5])
def test_another_dropout_mask_is_seen_and_rounding_is_not(rate):
    class Shaken(nn.Linear):
        by, calls = 0.0, 0

        def forward(self, x):
            self.calls += 1
            return super().forward(x) * (1 + self.by * self.calls)

    x, labels = batch(dtype=torch.float32)
    encoder = Shaken(IN, D)
    encoder.by = 1e-6
    GradCache(encoder, flashpair.NTXentLoss(), micro_batch=5)(x, labels)
    assert encoder.weight.grad.abs().max() > 0

    class Drops(nn.Linear):
        def forward(self, x):
            own = torch.Generator().manual_seed(int(torch.is_grad_enabled()))
            return super().forward(x * (torch.rand(x.shape, generator=own) > rate))

    with pytest.raises(RuntimeError, match="in the replay"):
        GradCache(Drops(IN, D), flashpair.NTXentLoss(), micro_batch=5)(x, labels)


def test_a_generator_without_a_state_may_be_held():
    x, labels = batch()
    encoder = network()
    encoder.source = random.SystemRandom()
    GradCache(encoder, flashpair.NTXentLoss(), micro_batch=5)(x, labels)
    assert encoder[0].weight.grad.abs().max() > 0


class Averaging(nn.Module):
    """Keeps a running mean in a buffer that its first forward pass makes."""

    def __init__(self, declared):
        super().__init__()
        self.inner = network()
        if declared:
            self.register_buffer("mean", None)

    def forward(self, x):
        if getattr(self, "mean", None) is None:
            self.register_buffer("mean", torch.zeros_like(x[0]))
        self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
        return self.inner(x - self.mean)


@pytest.mark.parametrize("declared", [False, True])
def test_buffers_that_the_first_pass_makes(declared):
    x, labels = batch()
    compare(
        [Averaging(declared), flashpair.NTXentLoss()],
        lambda *modules: plain(*modules, x, labels, 5),
        lambda *modules: GradCache(*modules, micro_batch=5)(x, labels),
    )


def test_what_it_cannot_replay_is_said_before_any_work():
    x, labels = batch(dtype=torch.float32)
    lazy = nn.Sequential(nn.LazyLinear(D), nn.Dropout(0.5))
    cache = GradCache(lazy, flashpair.NTXentLoss(), micro_batch=5)
    with pytest.raises(ValueError, match=r"^encoder must have no lazy parameters"):
        cache(x, labels)
    lazy(x)
    cache(x, labels)
    for off in (torch.no_grad, torch.inference_mode):
        with off(), pytest.raises(RuntimeError, match=r"with gradients enabled"):
            cache(x, labels)
