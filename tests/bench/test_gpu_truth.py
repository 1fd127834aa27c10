"""The truth stage of bench/gpu_proof forgives one pair on an edge, and nothing else."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
from bench.gpu_proof.truth import held
from flashpair import ContrastiveLoss
from flashpair.tools.check import batch, value_and_gradients


@pytest.fixture
def problem():
    """Unit rows, labels, the distance of the negative pair (0, 1), which is the margin."""
    x, labels = batch(60, 16, 3, torch.float32)
    labels[:2] = torch.tensor([98, 99])
    x = torch.nn.functional.normalize(x.double()).float()
    margin = (x[0].double() - x[1].double()).norm().item()
    return x, labels, margin


def _made(margin):
    return ContrastiveLoss(impl="reference", neg_margin=margin, normalize=False)


def _found(x, labels, margin):
    return {k: v.float() for k, v in value_and_gradients(_made(margin), x.double(), labels).items()}


@pytest.mark.parametrize("at", [1e-9, -1e-9])
def test_one_pair_on_the_edge_is_forgiven(problem, at):
    x, labels, margin = problem
    right = held(_found(x, labels, margin + at), _made(margin + at), x, labels, "float32")
    assert right["right"] and "forgiven" not in right
    flipped = held(_found(x, labels, margin - at), _made(margin + at), x, labels, "float32")
    assert flipped["right"] and flipped["forgiven"] == (0, 1)


def test_a_second_wrong_pair_is_not(problem):
    x, labels, margin = problem
    found = _found(x, labels, margin - 1e-9)
    found["gradient"][2] += (found["gradient"][0] - _found(x, labels, margin + 1e-9)["gradient"][0]).norm() * x[3]
    wrong = held(found, _made(margin + 1e-9), x, labels, "float32")
    assert not wrong["right"] and "forgiven" not in wrong


def test_a_pair_that_is_on_no_edge_is_not(problem):
    x, labels, margin = problem
    away = 1e-4
    wrong = held(_found(x, labels, margin - away), _made(margin + away), x, labels, "float32")
    assert not wrong["right"] and "forgiven" not in wrong


def test_a_value_that_is_wrong_beside_the_pair_is_not(problem):
    x, labels, margin = problem
    found = _found(x, labels, margin - 1e-9)
    found["value"] = found["value"] * 1.001
    assert not held(found, _made(margin + 1e-9), x, labels, "float32")["right"]
