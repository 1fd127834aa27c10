"""What the tests of GradCache are about: an encoder, criteria, batches, and the plain step that it stands in for."""

from __future__ import annotations

import copy

import torch
from helpers import assert_same
from torch import nn

import flashpair

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
