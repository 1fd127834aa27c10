"""What a user does with a criterion: reduce, learn its parameters, compile, autocast, differentiate twice, save."""

from __future__ import annotations

import copy
import inspect
import io
from collections import Counter

import pytest
import torch
from conftest import needs_extension
from helpers import CRITERIA, PAIR_CRITERIA, assert_as_good_as, assert_same, batch, gradients, made
from torch import nn

import flashpair
from flashpair import functional
from flashpair.core.call import compile_call, encode
from flashpair.engine import dispatch
from flashpair.engine.pairs import Pairs
from flashpair.tools.check import value_and_gradient

IMPLS = ["reference", pytest.param("tiled", marks=needs_extension)]
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


WANTS_MAX_POSITIVES = [
    name for name in CRITERIA if name.startswith(("TripletMarginLoss", "AngularLoss")) and "'hard'" not in name
]
INDUCTOR = ("MultiSimilarityLoss", "ContrastiveLoss", "CosFaceLoss")  # code is generated of these three, for time


@needs_extension
@pytest.mark.parametrize("name", CRITERIA)
def test_compiles_into_one_graph(name):
    x, labels = batch(90, 8, 3, torch.float32)
    criterion = made(name, 8, impl="tiled")
    if name in WANTS_MAX_POSITIVES:
        criterion.max_positives = 2
    truth = value_and_gradient(criterion, x, labels)
    compiled = torch.compile(criterion, fullgraph=True, backend="inductor" if name in INDUCTOR else "aot_eager")
    for f, t in zip(value_and_gradient(compiled, x, labels), truth, strict=True):
        torch.testing.assert_close(f, t)


@needs_extension
@pytest.mark.parametrize("refs", [False, True])
@pytest.mark.parametrize("variant", ["mc", "ovo"])
def test_one_pair_a_class_is_that_many_rows_on_the_cpu_and_still_compiles(variant, refs, monkeypatch):
    monkeypatch.setattr(dispatch, "WHOLE_PAIRS", -1)
    x, labels = batch(90, 8, 3, torch.float64)
    labels[:5] = 100 + torch.arange(5)  # single, without a reference
    given = dict(zip(("ref_emb", "ref_labels"), batch(70, 8, 3, torch.float64, seed=1), strict=True)) if refs else {}
    criterion, sizes, take = flashpair.NPairsLoss(variant, impl="tiled"), [], Pairs.take_pairs

    def seen(self, chosen):
        sizes.append(chosen.anchors.shape[0])
        return take(self, chosen)

    monkeypatch.setattr(Pairs, "take_pairs", seen)
    counts = Counter(labels.tolist())
    pairs = len(counts & Counter(given["ref_labels"].tolist())) if refs else sum(k > 1 for k in counts.values())
    found = []
    for form in (criterion, torch.compile(criterion, fullgraph=True, backend="aot_eager")):
        a = x.clone().requires_grad_()
        loss = form(a, labels, **given)
        found.append((loss.detach(), *torch.autograd.grad(loss, a)))
    assert 10 < pairs < 35
    assert sizes[0] == pairs
    for eager, compiled in zip(*found, strict=True):
        assert_same(compiled, eager)


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
@pytest.mark.parametrize("name", WANTS_MAX_POSITIVES)
def test_without_max_positives_a_whole_graph_is_refused_and_a_broken_one_is_right(name):
    x, labels = batch(90, 8, 3, torch.float32)
    criterion = CRITERIA[name](impl="tiled")
    with pytest.raises(
        torch._dynamo.exc.Unsupported, match="max_positives must be given where the call is to be one compiled graph"
    ):
        torch.compile(criterion, fullgraph=True, backend="aot_eager")(x, labels)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(criterion, backend="aot_eager")(x, labels), criterion(x, labels))


@needs_extension
@pytest.mark.parametrize("refs", [False, True])
@pytest.mark.parametrize("name", WANTS_MAX_POSITIVES)
def test_positives_of_several_blocks(name, refs, monkeypatch):
    """Rows of one class have more positives, and steps, than losses take at a time."""
    monkeypatch.setattr("flashpair.engine.pairs.PLACES", 3)
    monkeypatch.setattr("flashpair.engine.pairs.STEPS", 2)
    criterion, reference = (made(name, 8, impl=impl) for impl in ("tiled", "reference"))
    n = 10
    (x, labels), (y, ref_labels) = (batch(2 * n + 5 * k, 8, n, torch.float64, seed=k) for k in (0, 1))
    labels[-4:] = 9
    if refs and not criterion.takes_references:
        pytest.skip("defined within a batch")
    given = {"ref_emb": y, "ref_labels": ref_labels} if refs else {}
    wanted = [x.requires_grad_(), y.requires_grad_()][: 1 + refs]
    truth = reference(x, labels, **given)
    (truth, *slopes) = truth, *torch.autograd.grad(truth, wanted)
    assert all(slope.norm() > 0 for slope in slopes)
    compiled = torch.compile(criterion, fullgraph=True, backend="aot_eager")
    for most, call in ((None, criterion), (n + 7, criterion), (n + 7, compiled)):
        criterion.max_positives = most
        loss = call(x, labels, **given)
        for retain in (False,) if call is compiled else (True, False):
            found = torch.autograd.grad(loss, wanted, retain_graph=retain)
            for f, right in zip((loss, *found), (truth, *slopes), strict=True):
                assert_same(f, right)


@needs_extension
def test_second_derivatives_through_several_blocks(monkeypatch):
    monkeypatch.setattr("flashpair.engine.pairs.PLACES", 1)
    x, labels = batch(12, 3, 6, torch.float64)
    assert torch.autograd.gradgradcheck(
        lambda x: flashpair.TripletMarginLoss(2.0, smooth=True, reduction="sum", impl="tiled")(x, labels),
        x.requires_grad_(),
    )


@needs_extension
def test_compiles_with_references_learnable_values_and_changing_sizes():
    criterion = flashpair.MultiSimilarityLoss(alpha=nn.Parameter(torch.tensor(2.0)), impl="tiled")
    compiled = torch.compile(criterion, fullgraph=True, dynamic=True)
    for n, m in ((40, 80), (60, 300), (33, 700)):
        x, labels = batch(n, 8, 3, torch.float32)
        y, ref_labels = batch(m, 8, 3, torch.float32, seed=1)
        results = []
        for form in (criterion, compiled):
            a, b = x.clone().requires_grad_(), y.clone().requires_grad_()
            criterion.alpha.grad = None
            loss = form(a, labels, ref_emb=b, ref_labels=ref_labels)
            loss.backward()
            results.append((loss.detach(), a.grad, b.grad, criterion.alpha.grad))
        for f, t in zip(*results, strict=True):
            torch.testing.assert_close(f, t)


def _op_arguments():
    """Embeddings, and what follows them in a call of the registered op up to `keep`."""
    x, labels = batch(30, 4, 3, torch.float64)
    pairs = flashpair.make_pairs(x, labels, impl="tiled")
    call = compile_call((flashpair.Reduction("logsumexp", "negatives"),), "dot", "tiled")
    p = pairs.label_order
    return pairs.x, (None, p.lo, p.hi, None, p.ref_order, None, [], *map(_listed, encode(call)))


@needs_extension
def test_the_registered_ops_are_well_formed():
    x, rest = _op_arguments()
    torch.library.opcheck(torch.ops.flashpair.row_reduce, (x, *rest, True))
    values, *kept = torch.ops.flashpair.row_reduce(x, *rest, True)
    need = [True, False, False, False, False]
    torch.library.opcheck(
        torch.ops.flashpair.row_reduce_backward, (x, *rest, values, *kept, [torch.ones(30).double()], need)
    )


@needs_extension
def test_the_registered_op_takes_strided_embeddings():
    x, rest = _op_arguments()
    strided = x.T.contiguous().T
    assert not strided.is_contiguous()
    truth = torch.ops.flashpair.row_reduce(x, *rest, False)[0]
    assert torch.equal(torch.ops.flashpair.row_reduce(strided, *rest, False)[0], truth)


def _listed(value):
    return list(value) if isinstance(value, tuple) else value


@needs_extension
def test_calls_without_the_dispatcher_equal_the_registered_op(monkeypatch):
    x, labels = batch(90, 8, 3, torch.float32)
    truth = value_and_gradient(flashpair.MultiSimilarityLoss(impl="tiled"), x, labels)
    monkeypatch.setattr("flashpair.engine.row_reduce_op.plain", lambda x: False)
    found = value_and_gradient(flashpair.MultiSimilarityLoss(impl="tiled"), x, labels)
    assert all(torch.equal(f, t) for f, t in zip(found, truth, strict=True))


@pytest.mark.parametrize("impl", IMPLS)
def test_autocast_changes_nothing(impl):
    x, labels = batch(40, 8, 4, torch.float32)
    for make in CRITERIA.values():
        truth = value_and_gradient(make(impl=impl), x, labels)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = make(impl=impl)(x.requires_grad_(), labels)
        assert loss.dtype == torch.float32
        assert torch.equal(loss, truth[0])
        assert torch.equal(torch.autograd.grad(loss, x)[0], truth[1])
        x = x.detach()


@needs_extension
def test_autocast_changes_no_second_derivative_primitive_or_weight():
    x, labels = batch(40, 8, 4, torch.float32)
    criterion = flashpair.MultiSimilarityLoss(impl="tiled")
    reduction = flashpair.Reduction("logsumexp", "negatives")

    def everything(y):
        (first,) = torch.autograd.grad(criterion(y, labels), y, create_graph=True)
        rows = [flashpair.row_reduce(x, labels, reduction, impl=impl)[0] for impl in ("tiled", "reference")]
        return [first, *rows, flashpair.pair_weights(criterion, x, labels)]

    y = x.clone().requires_grad_()
    truth = everything(y)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = everything(y)
    for results in (truth, found):  # outside of autocast, as PyTorch wants a backward to be
        results.append(torch.autograd.grad(results[0].square().sum(), y)[0])
    for f, t in zip(found, truth, strict=True):
        assert f.dtype == torch.float32
        torch.testing.assert_close(f, t, rtol=1e-4, atol=1e-6)  # bfloat16 would be off by 1e-2


@needs_extension
def test_mixed_precision_training_step():
    """bfloat16 activations from autocast against a float32 bank: computed in float32, gradients in bfloat16."""
    layer = nn.Linear(8, 8)
    x, labels = batch(40, 8, 4, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        embeddings = layer(x)
        loss = flashpair.MultiSimilarityLoss()(embeddings, labels, ref_emb=x, ref_labels=labels)
    assert embeddings.dtype == torch.bfloat16
    loss.backward()
    assert layer.weight.grad.isfinite().all() and layer.weight.grad.any()


FUNCTIONS = {
    functional.multi_similarity_loss: flashpair.MultiSimilarityLoss,
    functional.n_pairs_loss: flashpair.NPairsLoss,
    functional.lifted_structure_loss: flashpair.LiftedStructureLoss,
    functional.generalized_lifted_structure_loss: flashpair.GeneralizedLiftedStructureLoss,
    functional.lifted_structure_star_loss: flashpair.LiftedStructureStarLoss,
    functional.contrastive_loss: flashpair.ContrastiveLoss,
    functional.snr_contrastive_loss: flashpair.SNRContrastiveLoss,
    functional.triplet_margin_loss: flashpair.TripletMarginLoss,
    functional.binomial_deviance_loss: flashpair.BinomialDevianceLoss,
    functional.bin_lifted_loss: flashpair.BinLiftedLoss,
    functional.mined_pair_loss: flashpair.MinedPairLoss,
    functional.nca_loss: flashpair.NCALoss,
    functional.ntxent_loss: flashpair.NTXentLoss,
    functional.supcon_loss: flashpair.SupConLoss,
    functional.circle_loss: flashpair.CircleLoss,
    functional.tuplet_margin_loss: flashpair.TupletMarginLoss,
    functional.intra_pair_variance_loss: flashpair.IntraPairVarianceLoss,
    functional.margin_loss: flashpair.MarginLoss,
    functional.angular_loss: flashpair.AngularLoss,
    functional.histogram_loss: flashpair.HistogramLoss,
    functional.fastap_loss: flashpair.FastAPLoss,
}


def test_every_loss_of_pairs_has_a_function():
    assert set(FUNCTIONS.values()) == {type(CRITERIA[name]()) for name in PAIR_CRITERIA}


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
def test_functional_forms_have_the_criterions_arguments_and_result(function):
    kind = FUNCTIONS[function]
    of_class = inspect.signature(kind).parameters
    of_function = inspect.signature(function).parameters
    for name, parameter in of_class.items():
        assert of_function[name].default == parameter.default and of_function[name].kind == parameter.kind
    assert list(of_function)[:2] == ["embeddings", "labels"]
    refs = {"ref_emb", "ref_labels"} if kind.takes_references else set()
    assert set(of_function) == {"embeddings", "labels", *refs, *of_class}
    assert getattr(functional, function.__name__) is function and kind.__name__ in function.__doc__
    x, labels = batch(20, 4, 4, torch.float64)
    assert torch.equal(function(x, labels, reduction="sum"), kind(reduction="sum")(x, labels))
    if refs:
        y, ref_labels = batch(30, 4, 3, torch.float64, seed=1)
        found = function(x, labels, ref_emb=y, ref_labels=ref_labels)
        assert torch.equal(found, kind()(x, labels, ref_emb=y, ref_labels=ref_labels))


def test_functional_forms_take_arguments_by_place_and_refuse_others():
    x, labels = batch(20, 4, 4, torch.float64)
    found = functional.contrastive_loss(x, labels, 0.9, 0.2, "cosine")
    assert torch.equal(found, flashpair.ContrastiveLoss(0.9, 0.2, "cosine")(x, labels))
    with pytest.raises(TypeError, match="margins"):
        functional.contrastive_loss(x, labels, margins=1.0)
    with pytest.raises(TypeError, match="ref_emb"):
        functional.angular_loss(x, labels, ref_emb=x)


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
