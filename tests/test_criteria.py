"""What a user does with a criterion: reduce, learn its parameters, compile, autocast, differentiate twice, save."""

from __future__ import annotations

import copy
import inspect
import io

import pytest
import torch
from conftest import needs_extension
from helpers import CRITERIA, PAIR_CRITERIA, assert_same, batch, gradients, made
from torch import nn

import flashpair
from flashpair import functional
from flashpair.check import value_and_gradient

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


# What "mean" divides by in a batch of 10 classes of 4 and a single sample, where it is not N = 41: classes with a pair,
# ordered positive pairs, triplets.
MEANS = {
    "NPairsLoss": 10, "NPairsLoss('ovo')": 10, "NPairsLoss('all_pairs')": 120, "LiftedStructureLoss": 120,
    "NTXentLoss": 120, "TupletMarginLoss": 120, "AngularLoss": 120, "AngularLoss(form='hinge')": 4440,
    "TripletMarginLoss": 4440, "TripletMarginLoss(distance='cosine', smooth=True)": 4440,
    "TripletMarginLoss(power=2)": 4440, "TripletMarginLoss(triplets='semihard')": 120,
    "TripletMarginLoss(triplets='semihard_all')": 4440,
}  # fmt: skip
MINED = ("MultiSimilarityLoss", "LiftedStructureStarLoss(epsilon=0.1)", "BinomialDevianceLoss(epsilon=0.1)")
MINED += ("MinedPairLoss",)
# Rows that have a loss: those with a pair of either side, where not those with a positive.
PER_SIDE = ("ContrastiveLoss", "SNRContrastiveLoss", "BinomialDevianceLoss", "BinLiftedLoss")
SHARES = ("CircleLoss(over='batch')", "IntraPairVarianceLoss", "HistogramLoss", "ProxyAnchorLoss")


def _rows_with_a_loss(name, rows):
    if name in MINED:
        return int((rows != 0).sum())
    if name in ("NPairsLoss", "NPairsLoss('ovo')"):
        return 10
    per_side = name.startswith(PER_SIDE) or name in ("MultiSimilarityLoss(epsilon=None)", "MarginLoss")
    return 41 if per_side or hasattr(made(name, 6), "weight") else 40


BETA = torch.tensor(1.2)  # as MarginLoss holds it, in float32


class _Pairs:
    """Dense similarities and distances of normalised embeddings, and which pairs and triplets there are."""

    def __init__(self, x, labels):
        self.x = nn.functional.normalize(x)
        self.s, self.d = self.x @ self.x.T, torch.cdist(self.x, self.x, compute_mode="donot_use_mm_for_euclid_dist")
        same = labels[:, None] == labels
        self.pos, self.neg = same & ~torch.eye(len(x)).bool(), ~same
        self.triplets = self.pos[:, :, None] & self.neg[:, None, :]

    def gaps(self, z):
        """z_ap - z_an of every triplet."""
        return (z[:, :, None] - z[:, None, :])[self.triplets]

    def band(self):
        gap = -self.gaps(self.s)  # s_an - s_ap
        return (gap + 0.2) * ((gap < 0) & (gap > -0.2))

    def nearest_farther(self):
        """Of each positive pair with its nearest negative that is farther, or else the farthest."""
        negatives = self.d.masked_fill(~self.neg, torch.inf)[:, None, :].expand(-1, len(self.x), -1)
        near = negatives.masked_fill(negatives <= self.d[:, :, None], torch.inf).amin(2)
        last = self.d.masked_fill(~self.neg, -torch.inf).amax(1, keepdim=True)
        return [(self.d - torch.where(near.isinf(), last, near) + 0.2)[self.pos].relu()]

    def ratios(self):
        centred = self.x - self.x.mean(1, keepdim=True)
        r = torch.cdist(centred, centred).square() / centred.square().sum(1, keepdim=True)
        return [(r[self.pos] - 0.1).relu(), (1.2 - r[self.neg]).relu()]

    def angles(self):
        middle = (self.x[:, None] + self.x[None]) / 2
        far = torch.cdist(middle.flatten(0, 1), self.x).square().view(len(self.x), len(self.x), -1)
        return (self.d.square()[:, :, None] - 4 / 3 * far)[self.triplets].relu()  # tan(30 degrees)^2 is 1 / 3

    def boundary(self):
        return (self.d + (0.2 - BETA).double()).relu(), ((0.2 + BETA).double() - self.d).relu()

    def boundary_of_triplets(self):
        pos, neg = self.boundary()
        return [torch.cat([pos[:, :, None].expand_as(self.triplets)[self.triplets],
                           neg[:, None, :].expand_as(self.triplets)[self.triplets]])]  # fmt: skip


# Losses that average terms: the terms of each kind, written down one by one.
TERMS = {
    "ContrastiveLoss": lambda p: [p.d[p.pos], (1 - p.d[p.neg]).relu()],
    "ContrastiveLoss(0.9, 0.2, 'cosine')": lambda p: [(0.9 - p.s[p.pos]).relu(), (p.s[p.neg] - 0.2).relu()],
    "ContrastiveLoss(power=2)": lambda p: [p.d[p.pos].square() / 2, (1 - p.d[p.neg]).relu().square() / 2],
    "SNRContrastiveLoss": _Pairs.ratios,
    "TripletMarginLoss": lambda p: [(p.gaps(p.d) + 0.2).relu()],
    "TripletMarginLoss(distance='cosine', smooth=True)": lambda p: [nn.functional.softplus(0.2 - p.gaps(p.s))],
    "TripletMarginLoss(power=2)": lambda p: [(p.gaps(p.d.square()) + 0.2).relu()],
    "TripletMarginLoss(triplets='semihard')": _Pairs.nearest_farther,
    "TripletMarginLoss(triplets='semihard_all')": lambda p: [p.band()],
    "AngularLoss(form='hinge')": lambda p: [p.angles()],
    "MarginLoss": lambda p: [torch.cat([p.boundary()[0][p.pos], p.boundary()[1][p.neg]])],
    "MarginLoss(mode='triplets')": _Pairs.boundary_of_triplets,
}


def _of_terms(name, x, labels):
    """ "sum", "nonzero" and "mean_pairs" of a loss of TERMS, and what is added beside the terms."""
    kinds = TERMS[name](_Pairs(x, labels))
    sums, above = [k.sum() for k in kinds], [(k > 0).sum() for k in kinds]
    if name == "SNRContrastiveLoss":  # a mean over embeddings, added to every row
        extra = 0.1 * nn.functional.normalize(x).sum(1).abs().mean()
        sums_and_more, more = sum(sums) + 41 * extra, extra
    else:  # nu times the rows' boundaries, divided as the pairs are
        extra = 41 * (0.01 * BETA).double() if name == "MarginLoss" else 0.0
        sums_and_more, more = sum(sums) + extra, extra / above[0]
    averages = [sum(s / n for s, n in zip(sums, counts, strict=True)) + more
                for counts in (above, [k.numel() for k in kinds])]  # fmt: skip
    return sums_and_more, *averages


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", CRITERIA)
def test_reductions_agree_with_the_rows(name, impl):
    x, labels = batch(41, 6, 4, torch.float64)  # 41 is 10 classes of 4 and a single sample
    words = CRITERIA[name]().averagings
    found = {word: CRITERIA[name](impl=impl, reduction=word)(x, labels) for word in words}
    assert set(words) >= {"mean", "sum", "none", "mean_valid", "nonzero"}
    rows = found["none"]
    assert rows.shape == ((200,) if name == "ProxyAnchorLoss" else (41,))
    assert rows.any()
    assert_same(found["sum"], rows.sum())
    if name in SHARES:
        for word in set(words) - {"none"}:
            assert_same(found[word], rows.sum())
        return
    assert_same(found["mean"], rows.sum() / MEANS.get(name, 41))
    assert_same(found["mean_valid"], rows.sum() / _rows_with_a_loss(name, rows))
    if name not in TERMS:
        assert_same(found["nonzero"], rows[rows > 0].mean() if (rows > 0).any() else rows.sum() * 0)
        return
    total, nonzero, mean_pairs = _of_terms(name, x, labels)
    assert_same(found["sum"], total)
    assert_same(found["nonzero"], nonzero)
    if "mean_pairs" in words:
        assert_same(found["mean_pairs"], mean_pairs)


def test_every_loss_of_terms_has_them_written_down():
    """What the rows' own `terms` say, so that a new loss of terms is not averaged by rows unseen."""
    x, labels = batch(41, 6, 4, torch.float64)
    for name in CRITERIA:
        criterion = made(name, 6, impl="reference", reduction="nonzero")
        if name == "SoftTripleLoss":
            continue  # has no pairs
        rows = criterion.row_losses(criterion.pairs_of(*criterion.check(x, labels, None, None), "reference"))
        assert bool(rows.terms) == (name in TERMS), name
        assert rows.shares == (name in SHARES), name


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
@pytest.mark.parametrize("name", WANTS_MAX_POSITIVES)
def test_without_max_positives_a_whole_graph_is_refused_and_a_broken_one_is_right(name):
    x, labels = batch(90, 8, 3, torch.float32)
    criterion = CRITERIA[name](impl="tiled")
    with pytest.raises(torch._dynamo.exc.Unsupported, match="max_positives must be given for one compiled graph"):
        torch.compile(criterion, fullgraph=True, backend="aot_eager")(x, labels)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(criterion, backend="aot_eager")(x, labels), criterion(x, labels))


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
    from flashpair.ops import encode
    from flashpair.pairs import Pairs

    x, labels = batch(30, 4, 3, torch.float64)
    pairs = Pairs.from_embeddings(x, labels, None, None, "dot", False, "tiled", True)
    spec = encode((flashpair.Reduction("logsumexp", "negatives"),), (), "dot", "tiled")
    p = pairs.plan
    return pairs.x, (None, p.lo, p.hi, None, p.ref_order, None, [], *map(_listed, spec))


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
    monkeypatch.setattr("flashpair.ops._op", lambda name, x: getattr(torch.ops.flashpair, name))
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
    """The README's example: two reductions, a row formula."""

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
