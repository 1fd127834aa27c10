"""pair_weights against the oracle's dL/dS, and against what it promises: dX = (W + W^T) X."""

from __future__ import annotations

import golden
import pytest
import torch
from helpers import CRITERIA, assert_same, batch

import flashpair

ORACLE = golden.load()
CASES = [c for c in ORACLE["cases"] if c["loss"] in golden.BUILDERS and ("dL_dS" in c or "dL_dD" in c)]


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c['loss']}-{c['batch']}-{c['params']}")
def test_equal_to_the_oracle(case):
    x, labels = golden.batch(case, ORACLE)
    found = flashpair.pair_weights(golden.criterion_for(case, ORACLE), x, labels)
    truth = torch.tensor(case["dL_dS" if "dL_dS" in case else "dL_dD"], dtype=torch.float64)
    if case["loss"].startswith("lifted_song"):  # the oracle puts a positive pair's weight once, on i < j
        found, truth = found + found.T, truth + truth.T
    assert (found - truth).abs().max() <= 1e-10


def test_there_are_cases():
    assert len(CASES) > 40


@pytest.mark.parametrize("name", [n for n in CRITERIA if "euclidean" not in n and n != "LiftedStructureLoss"])
@pytest.mark.parametrize("references", [False, True], ids=["square", "references"])
def test_gradients_are_weights_times_embeddings(name, references):
    x, labels = batch(20, 4, 4, torch.float64)
    y, ref_labels = batch(30, 4, 3, torch.float64, seed=1)
    criterion = CRITERIA[name](normalize=False)
    more = {"ref_emb": y.requires_grad_(), "ref_labels": ref_labels} if references else {}
    w = flashpair.pair_weights(criterion, x, labels, **more)
    criterion(x.requires_grad_(), labels, **more).backward()
    assert w.shape == (20, 30 if references else 20)
    if references:
        assert_same(x.grad, w @ y.detach())
        assert_same(y.grad, w.T @ x.detach())
    else:
        assert_same(x.grad, (w + w.T) @ x.detach())


def test_signs_and_pairs_that_take_no_part():
    x, labels = batch(40, 6, 4, torch.float64)
    w = flashpair.pair_weights(flashpair.MultiSimilarityLoss(), x, labels)
    same = labels[:, None] == labels
    assert (w[same] <= 0).all() and (w[~same] >= 0).all()
    assert not w.diagonal().any()
    assert (w == 0).any() and (w != 0).any()


def test_weights_are_refused_where_the_loss_is():
    x, labels = batch(8, 4, 2, torch.float64)
    with pytest.raises(ValueError, match="ref_emb must be None"):
        flashpair.pair_weights(flashpair.LiftedStructureLoss(), x, labels, ref_emb=x, ref_labels=labels)
