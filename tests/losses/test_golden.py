"""Every case of the oracle that the library has, in value and gradient, edge batches included."""

from __future__ import annotations

import golden
import pytest
import torch

from flashpair.engine import dispatch
from flashpair.engine.dispatch import unsupported_reasons

ORACLE = golden.load()
CASES = [case for case in ORACLE["cases"] if case["loss"] in golden.BUILDERS]


def _name(case):
    words = [f"{k}={v}" for k, v in case["params"].items()]
    return "-".join([case["loss"], case["batch"], *words])


@pytest.mark.parametrize("impl", ["reference", "tiled", "tiled by rows", "fused", "onchip"])
@pytest.mark.parametrize("case", CASES, ids=_name)
def test_value_and_gradient(case, impl, monkeypatch):
    if impl == "tiled by rows":
        monkeypatch.setattr(dispatch, "WHOLE_PAIRS", -1)
        impl = "tiled"
    if reasons := unsupported_reasons(impl, torch.device("cpu")):
        pytest.skip("; ".join(reasons))
    if impl == "fused" and case["loss"] == "histogram" and case["params"]["R"] > 50:
        pytest.skip("of 404 launches in the interpreter, as the histogram of fewer nodes has them")
    whole = golden.criterion_for(case, ORACLE)
    criterion = getattr(whole, "inner", whole)
    if impl == "onchip" and criterion.row_formula() is None:
        pytest.skip("onchip has no formula of this loss")
    if case["loss"] == "soft_triple" and impl not in ("reference", "tiled"):
        pytest.skip("SoftTripleLoss has no kernel of its own")
    criterion.impl = impl
    x, labels = golden.batch(case, ORACLE)
    x.requires_grad_()
    loss = whole(x, labels)
    loss.backward()
    assert abs(loss.item() - case["value"]) <= 1e-10
    assert (x.grad - golden.gradient(case)).abs().max().item() <= 1e-10
    for parameter, attribute in (("w", "weight"), ("beta", "beta")):
        if parameter in case["grad_raw"]:
            truth = torch.tensor(case["grad_raw"][parameter], dtype=torch.float64)
            found = getattr(criterion, attribute).grad
            assert (found.reshape(truth.shape) - truth).abs().max().item() <= 1e-9


def test_every_case_is_covered():
    assert len(CASES) == len(ORACLE["cases"]) > 250
    assert sum("w" in case["grad_raw"] or "beta" in case["grad_raw"] for case in CASES) > 20


def test_a_loss_that_is_not_there_is_a_key_error():
    with pytest.raises(KeyError):
        golden.criterion_for({"loss": "none", "params": {}, "normalize": True}, ORACLE)
