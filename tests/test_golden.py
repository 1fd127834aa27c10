"""Every case of the oracle that the library has, in value and gradient, edge batches included."""

from __future__ import annotations

import golden
import pytest
import torch

from flashpair import dispatch
from flashpair.dispatch import obstacles

ORACLE = golden.load()
CASES = [case for case in ORACLE["cases"] if case["loss"] in golden.BUILDERS]
FIRST_FAMILIES = 54  # cases of N-pair, lifted structure and Multi-Similarity


def _name(case):
    words = [f"{k}={v}" for k, v in case["params"].items()]
    return "-".join([case["loss"], case["batch"], *words])


@pytest.mark.parametrize("impl", ["reference", "tiled", "tiled by rows", "fused", "onchip"])
@pytest.mark.parametrize("case", CASES, ids=_name)
def test_value_and_gradient(case, impl, monkeypatch):
    if impl == "tiled by rows":
        monkeypatch.setattr(dispatch, "WHOLE_PAIRS", -1)
        impl = "tiled"
    if reasons := obstacles(impl, torch.device("cpu")):
        pytest.skip("; ".join(reasons))
    criterion = golden.criterion_for(case, ORACLE)
    if impl == "onchip" and criterion.row_formula() is None:
        pytest.skip("onchip has no formula of this loss")
    criterion.impl = impl
    x, labels = golden.batch(case, ORACLE)
    x.requires_grad_()
    loss = criterion(x, labels)
    loss.backward()
    assert abs(loss.item() - case["value"]) <= 1e-10
    assert (x.grad - golden.gradient(case)).abs().max().item() <= 1e-10


def test_all_three_families_are_covered():
    assert len(CASES) == FIRST_FAMILIES


def test_a_loss_that_is_not_there_is_a_key_error():
    with pytest.raises(KeyError):
        golden.criterion_for({"loss": "fastap", "params": {}}, ORACLE)
