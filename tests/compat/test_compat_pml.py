"""flashpair.compat.pml: a fused pytorch-metric-learning loss gives its numbers."""

from __future__ import annotations

import subprocess
import sys

import compat_cases
import pytest
import torch
from compat_cases import (
    BATCHES,
    CASES,
    IMPLS,
    NO_REFERENCES,
    REFS,
    ROUNDED,
    WRONG,
    C,
    D,
    assert_same_numbers,
    beta,
    made,
    ours,
    theirs,
)  # fmt: skip
from helpers import relative
from pytorch_metric_learning import losses, reducers
from torch.nn.functional import normalize

from flashpair.compat.pml import fuse

quiet = compat_cases.quiet


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    "name, data", [(n, d) for n in CASES for d in BATCHES if d not in WRONG.get(n, ()) and (n, d) not in ROUNDED]
)
def test_same_value_and_gradients(name, data, impl):
    loss, miner = made(name)
    criterion = fuse(loss, miner, impl=impl).double()
    x, labels = BATCHES[data]
    if name == "angular":  # whose negatives the library takes as they are
        loss, once = (lambda *a, of=loss: of(normalize(a[0]), *a[1:])), loss
        loss.parameters = once.parameters
    assert_same_numbers(ours(criterion, x, labels), theirs(loss, miner, x, labels))


@pytest.mark.parametrize("name, data", [(name, data) for name, each in WRONG.items() for data in each])
def test_what_is_left_out_above_is_wrong(name, data):
    """The library's number is not finite, or there is none, or it is another."""
    loss, miner = made(name)
    found = ours(fuse(loss, miner, impl="reference").double(), *BATCHES[data])
    assert all(t.isfinite().all() for t in found)
    try:
        truth = theirs(loss, miner, *BATCHES[data])
    except (IndexError, RuntimeError):
        return
    if all(t.isfinite().all() for t in truth):
        assert max(map(relative, found, truth)) > 1e-3


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("classes", [8, 12], ids=["all have positives", "some have none"])
@pytest.mark.parametrize("name", [name for name in CASES if not name.startswith(NO_REFERENCES)])
def test_same_against_references(name, classes, impl):
    if name.startswith("generalized"):
        classes = 8  # the library's number of an anchor without positives is wrong
    loss, miner = made(name)
    x, labels = BATCHES["clustered"]
    found, truth = (
        call(*args, x, labels % classes, REFS)
        for call, args in ((ours, (fuse(loss, miner, impl=impl).double(),)), (theirs, (loss, miner)))
    )
    assert found[0] > 0 or "none active" in name
    assert_same_numbers(found, truth)


@pytest.mark.parametrize("name", ["lifted structure", "angular", "arcface", "proxy nca", "proxy anchor", "soft triple"])
def test_references_are_refused_where_the_library_has_none(name):
    criterion = fuse(*made(name)).double()
    with pytest.raises(ValueError, match="ref_emb must be None"):
        criterion(*BATCHES["clustered"], ref_emb=REFS[0], ref_labels=REFS[1])


@pytest.mark.parametrize(
    "name, pml, elements",
    [
        ("cosface", lambda r: losses.CosFaceLoss(C, D, reducer=r), "loss"),
        ("supcon", lambda r: losses.SupConLoss(reducer=r), "loss"),
        ("circle", lambda r: losses.CircleLoss(reducer=r), "loss"),
        ("multi-similarity", lambda r: losses.MultiSimilarityLoss(reducer=r), "loss"),
    ],
)
def test_elements_of_a_reducer_that_does_nothing(name, pml, elements):
    loss = pml(reducers.DoNothingReducer())
    found = fuse(loss, impl="reference")(*BATCHES["singletons"])
    assert_same_numbers([found], [loss(*BATCHES["singletons"])[elements]["losses"].flatten()])


WEIGHTS = {
    "cosface": ("W", lambda w: w.T),
    "normalized softmax": ("W", lambda w: w.T),
    "proxy nca": ("proxies", lambda w: w),
    "proxy anchor": ("proxies", lambda w: w),
    "soft triple": ("fc", lambda w: torch.stack([w[:, 3 * c : 3 * c + 3].T for c in range(C)])),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_are_copied(name):
    """A Parameter of the same values, type and wish for a gradient, which the loss's does not share."""
    attribute, layout = WEIGHTS[name]
    loss, _ = made(name)
    old = getattr(loss, attribute).requires_grad_(name != "cosface")
    criterion = fuse(loss)
    assert list(dict(criterion.named_parameters())) == ["weight"]
    new = criterion.weight
    assert torch.equal(new, layout(old)) and new.is_contiguous()
    assert (new.dtype, new.requires_grad) == (torch.float64, name != "cosface")
    before = new.detach().clone()
    with torch.no_grad():
        old.add_(1.0)
    assert torch.equal(new, before)


def test_beta_is_copied():
    learned, fixed = fuse(losses.MarginLoss(beta=0.9, learn_beta=True)), fuse(losses.MarginLoss(beta=0.9))
    assert isinstance(learned.beta, torch.nn.Parameter) and not list(fixed.parameters())
    assert learned.beta.item() == fixed.beta.item() == 0.9
    assert fuse(beta(losses.MarginLoss(num_classes=4, learn_beta=True))).beta.shape == (4,)


def test_only_fuse_needs_the_library(monkeypatch):
    script = """
import sys, flashpair, flashpair.compat.pml as pml
assert not [m for m in sys.modules if m.startswith(("pytorch_metric_learning", "triton"))]
sys.modules["pytorch_metric_learning"] = None
try:
    pml.fuse(object())
except ImportError as error:
    assert "pip install 'flashpair[compat]'" in str(error)
else:
    raise AssertionError
"""
    subprocess.run([sys.executable, "-c", script], check=True)


def test_another_version(monkeypatch):
    import pytorch_metric_learning

    monkeypatch.setattr(pytorch_metric_learning, "__version__", "3.0.1")
    with pytest.raises(ImportError, match=r"supports pytorch-metric-learning 2\.9, got 3\.0\.1"):
        fuse(losses.NTXentLoss())
