"""Losses of one's own, and calls, that are wrong are told so; what PyTorch's bools mean; NaN in, NaN out."""

from __future__ import annotations

import pytest
import torch
from helpers import CRITERIA

import flashpair
from flashpair import Reduction, RowLosses
from flashpair.tools import check

COMMON = {"normalize": True, "reduction": "mean", "impl": "auto"}


def own(row_losses, **attributes):
    return type("Own", (flashpair.Criterion,), {"row_losses": row_losses, **attributes})(**COMMON)


def batch():
    return torch.randn(12, 6, generator=torch.Generator().manual_seed(0)), torch.arange(12) // 3


@pytest.mark.parametrize("word", ["cosine", "manhattan", None, 3])
def test_a_distance_that_is_none_is_refused_where_the_class_is_defined_and_where_it_is_used(word):
    with pytest.raises(ValueError, match="distance of Own must be one of dot, euclidean, squared_euclidean, got"):
        type("Own", (flashpair.Criterion,), {"distance": word})
    criterion = flashpair.NTXentLoss()
    criterion.distance = word
    with pytest.raises(ValueError, match="distance of NTXentLoss must be one of"):
        criterion(*batch())


def ones(r):
    return torch.ones_like(r, dtype=torch.bool)


@pytest.mark.parametrize(
    ("row_losses", "error", "words"),
    [
        (lambda s, p: p.reduce(Reduction("sum", "all"))[0], TypeError, "row_losses of Own must return RowLosses"),
        (lambda s, p: RowLosses(p.reduce(Reduction("sum", "all")), ones(p.labels), 12), TypeError, "returns a tuple"),
        (
            lambda s, p: RowLosses(p.reduce(Reduction("sum", "all"))[0].mean(), ones(p.labels), 12),
            ValueError,
            "one a row",
        ),
        (lambda s, p: RowLosses(p.reduce(Reduction("sum", "all"))[0], torch.ones(12), 12), TypeError, "bool tensor"),
    ],
)
@pytest.mark.parametrize("impl", ["reference", "auto"])
def test_rows_of_the_wrong_kind_are_named(row_losses, error, words, impl):
    criterion = own(row_losses)
    criterion.impl = impl
    with pytest.raises(error, match=words):
        criterion(*batch())


def test_no_rows_at_all_and_tuples_of_a_miner_are_named():
    with pytest.raises(NotImplementedError, match="Own has no row_losses"):
        type("Own", (flashpair.Criterion,), {})(**COMMON)(*batch())
    with pytest.raises(TypeError, match="takes no tuples of indices"):
        flashpair.MultiSimilarityLoss()(*batch(), (torch.zeros(1), torch.zeros(1)))


class Detached(flashpair.Criterion):
    def __init__(self, **common):
        super().__init__(**{**COMMON, **common})
        self.scale = torch.nn.Parameter(torch.tensor(10.0))

    def row_losses(self, pairs):
        scale = self.scale if self.impl == "reference" else self.scale.detach()
        (losses,) = pairs.reduce(Reduction("sum", "negatives", "softplus", scale=scale))
        return RowLosses(losses, ones(losses), losses.shape[0])


def test_check_compares_the_gradients_of_parameters():
    assert check.check(Detached, "reference")[0]
    good, words = check.check(Detached, "tiled")
    assert not good and "gradient of scale error 1.0e+00" in words


@pytest.mark.parametrize("proxies", [False, True])
def test_a_class_loss_of_ones_own_takes_many_classes(monkeypatch, proxies):
    class Hinge(flashpair.ClassCriterion):
        def row_losses(self, pairs):
            (own,) = pairs.reduce(Reduction("sum", "positives"))
            (losses,) = pairs.reduce(Reduction("sum", "negatives", "hinge", offset=0.2 - own))
            return RowLosses(losses, ones(losses), losses.shape[0])

    if proxies:
        Hinge.pairs_of = flashpair.ProxyAnchorLoss.pairs_of
    found = []
    for impl, size in (("reference", 2**25), ("tiled", 2**25), ("tiled", 64)):
        monkeypatch.setattr("flashpair.chunked.class_weights.CHUNK_BYTES", size)
        torch.manual_seed(0)
        criterion = Hinge(9, 6, normalize=True, reduction="none", impl=impl)
        x, labels = batch()
        x.requires_grad_()
        loss = criterion(x, labels)
        found.append((loss, *torch.autograd.grad(loss.square().sum(), (x, criterion.weight))))
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    "phi",
    [
        lambda t: ((t > -1) + (t < 1)) * t,
        lambda t: ((t > 0) ** 2) * t,
        lambda t: ((t > 0) / 2) * t,
        lambda t: torch.where((t > -1) + (t < 1), t, -t),
        lambda t: torch.where(t > 0, 0.1, 0.2) * t,
    ],
)
def test_sums_of_truth_values_have_no_steps(phi):
    flashpair.register_transform("of_truths", phi)
    x, labels = batch()
    reduction = Reduction("sum", "negatives", "of_truths")
    with pytest.raises(RuntimeError, match="truth value"):
        flashpair.row_reduce(x, labels, reduction, impl="tiled")
    found, wanted = (flashpair.row_reduce(x, labels, reduction, impl=impl)[0] for impl in ("auto", "reference"))
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("name", sorted(CRITERIA))
@pytest.mark.parametrize("labels", [torch.arange(12) // 4, torch.zeros(12, dtype=torch.int64), torch.arange(12)])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_comes_out_as_nan_with_every_reduction(name, labels, value):
    x, _ = batch()
    x[5, 2] = value
    for impl in ("reference", "auto"):
        for reduction in CRITERIA[name](impl=impl).averagings:
            try:
                criterion = CRITERIA[name](impl=impl, reduction=reduction)
            except ValueError:  # a reduction that this form does not take
                continue
            assert criterion(x, labels).isnan().all(), (impl, reduction)


@pytest.mark.parametrize("name", sorted(CRITERIA))
def test_another_default_dtype_does_not_matter(name):
    x, labels = batch()
    x = x.requires_grad_()
    criteria = [CRITERIA[name](impl=impl, reduction=r) for impl in ("reference", "auto") for r in ("none", "mean")]
    wanted = [criterion(x, labels) for criterion in criteria]
    torch.set_default_dtype(torch.float64)
    try:
        for criterion, truth in zip(criteria, wanted, strict=True):
            found = criterion(x, labels)
            assert found.dtype == torch.float32
            torch.testing.assert_close(found, truth)
    finally:
        torch.set_default_dtype(torch.float32)
