"""What a user does with a criterion: differentiate it, twice too, learn its parameters, save it, write one."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from conftest import needs_extension
from helpers import CRITERIA, assert_as_good_as, assert_same, batch, gradients, made
from loss_cases import IMPLS
from torch import nn

import flashpair

DIFFERENTIATED = [name for name, make in CRITERIA.items() if make().differentiates]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", DIFFERENTIATED)
def test_gradcheck_of_every_row(name, impl):
    x, labels = batch(11, 4, 3, torch.float64)
    criterion = CRITERIA[name](impl=impl, reduction="none")
    assert torch.autograd.gradcheck(lambda t: criterion(t, labels), (x.requires_grad_(),))


@needs_extension
@pytest.mark.parametrize("name", DIFFERENTIATED)
def test_second_derivatives(name):
    x, labels = batch(9, 3, 3, torch.float64)
    criterion = CRITERIA[name](impl="tiled")
    assert torch.autograd.gradgradcheck(lambda t: criterion(t, labels), (x.requires_grad_(),))


@needs_extension
def test_second_derivatives_of_strided_embeddings():
    x, labels = batch(9, 3, 3, torch.float64)
    wide = x.T.contiguous().requires_grad_()
    criterion = flashpair.MultiSimilarityLoss(impl="tiled")
    assert torch.autograd.gradgradcheck(lambda t: criterion(t.T, labels), (wide,))


def _circle(x, labels, over):
    """Circle loss (20, 0.4) of each anchor, or of all unordered pairs, with the pairs' paces constant to autograd."""
    unit = nn.functional.normalize(x)
    s, zero = unit @ unit.T, x.new_zeros(())
    same = labels[:, None] == labels
    sides = same.triu(1) if over == "batch" else same & ~torch.eye(len(x)).bool(), ~same
    sides = (sides[0], sides[1].triu(1)) if over == "batch" else sides
    pos = -20 * (1.4 - s).relu().detach() * (s - 0.6)
    neg = 20 * (s + 0.4).relu().detach() * (s - 0.4)
    if over == "batch":
        return torch.logaddexp(zero, pos[sides[0]].logsumexp(0) + neg[sides[1]].logsumexp(0))
    rows = [t.masked_fill(~side, -torch.inf).logsumexp(1) for t, side in zip((pos, neg), sides, strict=True)]
    return torch.logaddexp(zero, rows[0] + rows[1]).mean()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("over", ["anchors", "batch"])
def test_circle_holds_its_paces_constant(over, impl):
    x, labels = batch(12, 4, 3, torch.float64)
    criterion = flashpair.CircleLoss(0.4, 20.0, over, impl=impl)
    found, truth = [], []
    for loss, results in ((lambda t: criterion(t, labels), found), (lambda t: _circle(t, labels, over), truth)):
        a = x.clone().requires_grad_()
        value = loss(a)
        (first,) = torch.autograd.grad(value, a, create_graph=True)
        results += [value, first, *gradients((first,), [a])]
    for f, t in zip(found, truth, strict=True):
        assert_same(f.detach(), t.detach())
    assert {name for name in CRITERIA if name not in DIFFERENTIATED} == {"CircleLoss", "CircleLoss(over='batch')"}


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", CRITERIA)
def test_rows_come_in_the_callers_order(name, impl):
    x, labels = batch(40, 6, 4, torch.float64)
    if name in ("NPairsLoss", "NPairsLoss('ovo')"):
        pytest.skip("which two samples of a class are its pair depends on their order")
    criterion = CRITERIA[name](impl=impl, reduction="none")
    order = torch.randperm(40, generator=torch.Generator().manual_seed(2))
    rows = criterion(x, labels)
    assert_same(criterion(x[order], labels[order]), rows if name == "ProxyAnchorLoss" else rows[order])


LEARNABLE = [
    (flashpair.MultiSimilarityLoss, {"alpha": 2.0, "beta": 20.0, "base": 0.4}),
    (flashpair.LiftedStructureStarLoss, {"alpha": 2.0, "beta": 20.0}),
    (flashpair.LiftedStructureLoss, {"margin": 1.0}),
    (flashpair.GeneralizedLiftedStructureLoss, {"margin": 0.5}),
    (flashpair.NPairsLoss, {"l2_weight": 0.1}),
]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("kind", "values"), LEARNABLE, ids=lambda v: getattr(v, "__name__", ""))
def test_hyperparameters_learn(kind, values, impl):
    x, labels = batch(12, 4, 3, torch.float64)
    start = [torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in values.values()]

    def loss(*tensors):
        return kind(**dict(zip(values, tensors, strict=True)), impl=impl)(x, labels)

    assert torch.autograd.gradcheck(loss, start)
    criterion = kind(
        **{name: nn.Parameter(t.detach().clone()) for name, t in zip(values, start, strict=True)}, impl=impl
    )
    assert set(criterion.state_dict()) == set(values)
    before = criterion(x, labels)
    optimiser = torch.optim.SGD(criterion.parameters(), lr=1e-3)
    before.backward()
    optimiser.step()
    assert criterion(x, labels) < before


@pytest.mark.parametrize("name", CRITERIA)
def test_saved_copied_printed(name):
    criterion = made(name, 4)
    x, labels = batch(20, 4, 4, torch.float32)
    truth = criterion(x, labels)
    buffer = io.BytesIO()
    torch.save(criterion, buffer)
    buffer.seek(0)
    for other in (torch.load(buffer, weights_only=False), copy.deepcopy(criterion)):
        assert torch.equal(other(x, labels), truth)
    again = eval(repr(criterion), vars(flashpair))
    assert repr(again) == repr(criterion)
    kept = {"beta"} if name.startswith("MarginLoss") else {"weight"} if hasattr(criterion, "weight") else set()
    assert set(criterion.state_dict()) == kept
    again.load_state_dict(criterion.state_dict())
    assert torch.equal(again(x, labels), truth)


def test_a_boundary_a_class_is_not_printed_but_saved():
    criterion = flashpair.MarginLoss(beta=torch.tensor([0.9, 1.3]), num_classes=2)
    assert " beta=" not in repr(criterion) and "num_classes=2" in repr(criterion)
    again = eval(repr(criterion), vars(flashpair))
    again.load_state_dict(criterion.state_dict())
    assert again.beta.tolist() == pytest.approx([0.9, 1.3])


def test_learnable_values_show_in_repr_and_travel_in_state_dict():
    criterion = flashpair.MultiSimilarityLoss(alpha=nn.Parameter(torch.tensor(3.0)))
    assert "alpha=3.0" in repr(criterion)
    other = flashpair.MultiSimilarityLoss(alpha=nn.Parameter(torch.tensor(1.0)))
    other.load_state_dict(criterion.state_dict())
    assert other.alpha.item() == 3.0


@needs_extension
@pytest.mark.parametrize(("normalize", "gamma"), [(True, 0.1), (True, 0.01), (False, 0.1)])
def test_soft_triple_of_any_height_is_as_good_as_dense_code(normalize, gamma, monkeypatch):
    """s / gamma up to 10, which has exponentials in float32; up to 100, or of vectors of any length, which has none."""
    monkeypatch.setattr("flashpair.losses.soft_triple.CHUNK_BYTES", 4 * 40 * 3 * 5)  # five of twelve classes
    x, labels = batch(40, 16, 4, torch.float64)
    x[3] *= 40
    found = {}
    for impl, dtype in (("reference", torch.float64), ("reference", torch.float32), ("auto", torch.float32)):
        torch.manual_seed(2)
        loss = flashpair.SoftTripleLoss(12, 16, 3, gamma=gamma, normalize=normalize, impl=impl).to(dtype)
        a = x.to(dtype).requires_grad_()
        value = loss(a, labels)
        found[impl, dtype] = value.detach(), *torch.autograd.grad(value, (a, loss.weight))
    truth, eager, ours = found.values()
    for f, e, t in zip(ours, eager, truth, strict=True):
        assert_as_good_as(f, e, t)


@pytest.mark.parametrize("size", [1e3, 1e6])
def test_soft_triple_of_large_logits_with_ties(size):
    """The largest term is e^0 at any magnitude, and equal classes share it."""
    x, labels = batch(20, 8, 4, torch.float64)
    found = {}
    for impl, dtype in (("reference", torch.float64), ("reference", torch.float32), ("auto", torch.float32)):
        torch.manual_seed(0)
        loss = flashpair.SoftTripleLoss(9, 8, 2, normalize=False, reduction="sum", impl=impl).to(dtype)
        with torch.no_grad():
            loss.weight[1:3] = loss.weight[0]
        a = (x.float() * size).to(dtype).requires_grad_()
        value = loss(a, labels)
        found[impl, dtype] = value.detach(), *torch.autograd.grad(value, (a, loss.weight))
    truth, eager, ours = found.values()
    for f, e, t in zip(ours, eager, truth, strict=True):
        assert_as_good_as(f, e, t)


@needs_extension
def test_second_derivatives_through_several_blocks(monkeypatch):
    monkeypatch.setattr("flashpair.core.pairs.PLACES", 1)
    x, labels = batch(12, 3, 6, torch.float64)
    assert torch.autograd.gradgradcheck(
        lambda x: flashpair.TripletMarginLoss(2.0, smooth=True, reduction="sum", impl="tiled")(x, labels),
        x.requires_grad_(),
    )


@pytest.mark.parametrize("impl", IMPLS)
def test_a_loss_of_ones_own(impl):
    """As docs/your-own-loss.md writes one: two reductions, a row formula."""

    class LogRatioLoss(flashpair.Criterion):
        def __init__(self, temperature=0.1, **common):
            super().__init__(**{"normalize": True, "reduction": "mean", "impl": "auto", **common})
            self.temperature = temperature

        def row_losses(self, pairs):
            pos, every = pairs.reduce(
                flashpair.Reduction("logsumexp", "positives", scale=1 / self.temperature),
                flashpair.Reduction("logsumexp", "all", scale=1 / self.temperature),
            )
            valid = pairs.num_positives() > 0
            return flashpair.RowLosses(torch.where(valid, every - pos, 0.0), valid, valid.shape[0])

    x, labels = batch(30, 5, 3, torch.float64)
    x.requires_grad_()
    loss = LogRatioLoss(impl=impl)(x, labels)
    unit = torch.nn.functional.normalize(x)
    s = (unit @ unit.T / 0.1).masked_fill(torch.eye(30, dtype=torch.bool), -torch.inf)
    same = labels[:, None] == labels
    truth = (s.logsumexp(1) - s.masked_fill(~same, -torch.inf).logsumexp(1)).mean()
    assert_same(loss.detach(), truth.detach())
    assert_same(gradients((loss,), [x])[0], gradients((truth,), [x])[0])
