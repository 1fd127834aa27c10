"""Bad input is refused by name before any work; odd but valid input works as the specification says."""

from __future__ import annotations

import pytest
import torch
from conftest import needs_extension
from helpers import CRITERIA, PAIR_CRITERIA, batch, relative

import flashpair
from flashpair import GeneralizedLiftedStructureLoss, LiftedStructureStarLoss, MultiSimilarityLoss, NPairsLoss
from flashpair.engine import dispatch

X, LABELS = batch(8, 4, 2, torch.float32)
BAD_CALLS = {
    "labels are float": (TypeError, "labels must be an integer tensor", (X, LABELS.float()), {}),
    "labels are bool": (TypeError, "labels must be an integer tensor", (X, LABELS > 1), {}),
    "labels are a list": (TypeError, "labels must be an integer tensor", (X, LABELS.tolist()), {}),
    "labels of another length": (ValueError, r"labels must have shape \(N,\) = \(8,\)", (X, LABELS[:7]), {}),
    "labels are 2-D": (ValueError, r"labels must have shape .* got int64 \(8, 1\)", (X, LABELS[:, None]), {}),
    "labels on another device": (ValueError, "labels must be on the device", (X, LABELS.to("meta")), {}),
    "embeddings are 1-D": (ValueError, r"embeddings must have shape \(N, D\)", (X[0], LABELS), {}),
    "embeddings are 3-D": (ValueError, r"embeddings must have shape \(N, D\)", (X[None], LABELS), {}),
    "embeddings are integers": (TypeError, "embeddings must be a float16, .* got int32", (X.int(), LABELS), {}),
    "embeddings are complex": (TypeError, "embeddings must be .* got complex64", (X + 1j, LABELS), {}),
    "embeddings have no width": (ValueError, r"with D > 0, got float32 \(8, 0\)", (X[:, :0], LABELS), {}),
    "embeddings are an array": (TypeError, "embeddings must be .* got numpy ndarray", (X.numpy(), LABELS), {}),
    "ref_emb without ref_labels": (ValueError, "ref_labels must be given with ref_emb", (X, LABELS), {"ref_emb": X}),
    "ref_labels without ref_emb": (ValueError, "ref_emb must be given with", (X, LABELS), {"ref_labels": LABELS}),
    "ref_emb of another width": (
        ValueError, "ref_emb must have the width of embeddings, D = 4", (X, LABELS),
        {"ref_emb": X[:, :3], "ref_labels": LABELS},
    ),
    "ref_emb on another device": (
        ValueError, "ref_emb must be on the device", (X, LABELS), {"ref_emb": X.to("meta"), "ref_labels": LABELS},
    ),
    "ref_labels of another length": (
        ValueError, r"ref_labels must have shape \(M,\)", (X, LABELS), {"ref_emb": X, "ref_labels": LABELS[:5]},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_CALLS)
@pytest.mark.parametrize("impl", ["reference", "auto"])
def test_bad_calls(name, impl):
    error, words, arguments, options = BAD_CALLS[name]
    with pytest.raises(error, match=words):
        MultiSimilarityLoss(impl=impl)(*arguments, **options)


BAD_CONSTRUCTORS = {
    "unknown impl": (ValueError, "impl must be one of auto, reference", lambda: MultiSimilarityLoss(impl="fast")),
    "unknown reduction": (ValueError, "reduction must be one of", lambda: NPairsLoss(reduction="average")),
    "unknown variant": (ValueError, "variant must be one of mc, ovo", lambda: NPairsLoss("mp")),
    "unknown l2_kind": (ValueError, "l2_kind must be one of", lambda: NPairsLoss(l2_kind="l2")),
    "unknown distance": (ValueError, "distance must be one of", lambda: GeneralizedLiftedStructureLoss(1.0, "l1")),
    "negative epsilon": (
        ValueError,
        "epsilon must be .* at least 0, got -0.1",
        lambda: MultiSimilarityLoss(epsilon=-0.1),
    ),
    "learnable epsilon": (
        TypeError,
        "epsilon must be a number",
        lambda: MultiSimilarityLoss(epsilon=torch.tensor(0.1)),
    ),
    "zero alpha": (ValueError, "alpha must be .* above 0, got 0", lambda: MultiSimilarityLoss(alpha=0)),
    "endless alpha": (ValueError, "alpha must be a finite number", lambda: MultiSimilarityLoss(alpha=10**400)),
    "infinite beta": (ValueError, "beta must be a finite number", lambda: LiftedStructureStarLoss(beta=float("inf"))),
    "beta is a word": (TypeError, "beta must be a number", lambda: LiftedStructureStarLoss(beta="50")),
    "alpha is a vector": (ValueError, r"alpha must be .* shape \(\)", lambda: MultiSimilarityLoss(alpha=torch.ones(2))),
    "negative l2_weight": (ValueError, "l2_weight must be", lambda: NPairsLoss(l2_weight=-1.0)),
    "normalize is a number": (TypeError, "normalize must be a bool", lambda: MultiSimilarityLoss(normalize=1)),
}


@pytest.mark.parametrize("name", BAD_CONSTRUCTORS)
def test_bad_constructors(name):
    error, words, make = BAD_CONSTRUCTORS[name]
    with pytest.raises(error, match=words):
        make()


def test_lifted_structure_is_defined_within_a_batch():
    with pytest.raises(ValueError, match="ref_emb must be None"):
        flashpair.LiftedStructureLoss()(X, LABELS, ref_emb=X, ref_labels=LABELS)


def test_an_explicit_implementation_never_falls_back(monkeypatch):
    monkeypatch.setattr(dispatch.extension, "emulated", lambda: False)
    monkeypatch.setattr(dispatch, "_onchip", lambda device: "onchip needs flashpair built with CUDA: no nvcc")
    with pytest.raises(
        RuntimeError, match=r"'onchip' cannot run: onchip needs a CUDA device.*; onchip needs flashpair"
    ):
        MultiSimilarityLoss(impl="onchip")(X, LABELS)


POSITIVES_ALONE = (  # losses that a row without a negative has
    "MultiSimilarityLoss(epsilon=None)", "NPairsLoss('softlabel')", "ContrastiveLoss",
    "ContrastiveLoss(0.9, 0.2, 'cosine')", "ContrastiveLoss(power=2)", "SNRContrastiveLoss", "BinomialDevianceLoss",
    "BinLiftedLoss", "SupConLoss", "IntraPairVarianceLoss", "MarginLoss",
)  # fmt: skip
NEGATIVES_ALONE = set(POSITIVES_ALONE) - {"NPairsLoss('softlabel')", "SupConLoss"}  # that one without a positive has


@pytest.mark.parametrize("impl", ["reference", pytest.param("tiled", marks=needs_extension)])
@pytest.mark.parametrize("name", CRITERIA)
class TestOddButValid:
    def run(self, name, impl, x, labels):
        x = x.double().requires_grad_()
        loss = CRITERIA[name](impl=impl)(x, labels)
        loss.backward()
        assert loss.isfinite() and x.grad.isfinite().all()
        return loss.item(), x.grad

    def test_no_samples(self, name, impl):
        assert self.run(name, impl, X[:0], LABELS[:0])[0] == 0

    def test_one_sample(self, name, impl):
        loss, grad = self.run(name, impl, X[:1], LABELS[:1])
        some = name not in PAIR_CRITERIA or name == "SNRContrastiveLoss"  # of class weights, of a regularizer
        assert (loss != 0) == some and grad.any() == some

    def test_one_class(self, name, impl):
        loss, _ = self.run(name, impl, X, torch.zeros_like(LABELS))
        assert (abs(loss) > 1e-14) == (name in POSITIVES_ALONE or name not in PAIR_CRITERIA)

    def test_all_classes_single(self, name, impl):
        loss, _ = self.run(name, impl, X, torch.arange(8))
        assert (loss != 0) == (name in NEGATIVES_ALONE or name not in PAIR_CRITERIA)

    def test_duplicates_and_zero_rows(self, name, impl):
        x = X.clone()
        x[1], x[5] = x[0], x[4]
        x[2] = 0
        self.run(name, impl, x, LABELS)
        self.run(name, impl, torch.ones_like(X), LABELS)
        self.run(name, impl, torch.zeros_like(X), LABELS)

    def test_labels_are_names_alone(self, name, impl):
        if name not in PAIR_CRITERIA:
            pytest.skip("labels are places among the class weights")
        truth = self.run(name, impl, X, LABELS)
        names = torch.tensor([-(2**63), 2**63 - 1, -1, 0])
        for labels in (names[LABELS], (LABELS - 3).to(torch.int8), LABELS.to(torch.uint8), LABELS.to(torch.int16)):
            loss, grad = self.run(name, impl, X, labels)
            assert loss == pytest.approx(truth[0], rel=1e-12, abs=1e-15)
            torch.testing.assert_close(grad, truth[1])

    @pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
    @pytest.mark.parametrize("impl_batch", [8, 300])
    def test_not_finite_comes_out_as_nan(self, name, impl, bad, impl_batch):
        """Mining compares, and no comparison may swallow a NaN; nor may the row that holds it have few pairs."""
        x, labels = batch(impl_batch, 4, 2, torch.float32)
        for where in (0, impl_batch - 1):
            y = x.clone()
            y[where, 1] = bad
            y.requires_grad_()
            loss = CRITERIA[name](impl=impl)(y, labels)
            loss.backward()
            assert loss.isnan()
            assert y.grad.isnan().any()


@needs_extension
def test_not_finite_references_come_out_as_nan():
    for where in (0, 7):
        y = X.clone()
        y[where, 0] = torch.nan
        for impl in ("reference", "tiled"):
            assert MultiSimilarityLoss(impl=impl)(X, LABELS, ref_emb=y, ref_labels=LABELS).isnan()


@pytest.mark.parametrize("impl", ["reference", pytest.param("tiled", marks=needs_extension)])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", CRITERIA)
def test_no_reduction_swallows_a_nan(name, bad, impl):
    x = X.clone()
    x[7, 0] = bad  # of a sample that mc and ovo, which take two of a class, leave out
    labels = torch.tensor([0, 0, 1, 1, 2, 2, 2, 2])
    for reduction in CRITERIA[name]().averagings:
        assert CRITERIA[name](impl=impl, reduction=reduction)(x, labels).isnan().any(), reduction


def test_the_embeddings_decide_the_dtype():
    weight = torch.nn.Parameter(torch.tensor(0.1, dtype=torch.float64))
    assert NPairsLoss(l2_weight=weight)(X, LABELS).dtype == torch.float32


@needs_extension
@pytest.mark.parametrize("size", [1e-17, 1e15, 1e18])
def test_norms_far_from_one(size):
    """Normalised losses do not depend on the norm, and dot products that overflow are not a wrong number."""
    x, labels = batch(300, 8, 4, torch.float32)
    for name in ("MultiSimilarityLoss", "LiftedStructureStarLoss"):
        found = CRITERIA[name](impl="tiled")(x * size, labels)
        torch.testing.assert_close(found, CRITERIA[name](impl="reference")(x, labels), rtol=1e-4, atol=0)
    assert MultiSimilarityLoss(impl="tiled")(x * 1e25, labels).isnan()  # squares overflow
    alone = x[:, :1] * 1e25
    for impl in ("tiled", "reference"):
        assert MultiSimilarityLoss(impl=impl)(alone, labels).isnan()  # of one column too, whose norm is its entry
    raw = NPairsLoss(impl="tiled")(x * size, labels)
    truth = NPairsLoss(impl="reference")((x * size).double(), labels)
    assert not raw.isfinite() or relative(raw, truth) < 1e-5


@pytest.mark.parametrize("impl", ["reference", pytest.param("tiled", marks=needs_extension)])
@pytest.mark.parametrize("size", [1e-18, 1e-12, 1e12])
def test_signal_to_noise_does_not_depend_on_the_norm(size, impl):
    """A ratio of variances; and its gradient, which is 1 / size times as large: no reciprocal on the way overflows."""
    x, labels = batch(60, 8, 4, torch.float64)
    rows, truth = (x * size).float().requires_grad_(), x.clone().requires_grad_()
    loss = flashpair.SNRContrastiveLoss(normalize=False, impl=impl)(rows, labels)
    wanted = flashpair.SNRContrastiveLoss(normalize=False, impl="reference")(truth, labels)
    assert relative(loss.detach(), wanted.detach()) < 1e-5
    (found,), (gradient,) = torch.autograd.grad(loss, rows), torch.autograd.grad(wanted, truth)
    assert relative(found.double() * size, gradient) < 1e-5
