"""pair_weights against the oracle's, and against what it promises: that gradients are weights times embeddings."""

from __future__ import annotations

import golden
import pytest
import torch
from helpers import CRITERIA, PAIR_CRITERIA, REFERENCE_CRITERIA, assert_same, batch, made

import flashpair

ORACLE = golden.load()
WEIGHTS = ("dL_dS", "dL_dD", "dL_dD2", "dL_dcos")
CASES = [c for c in ORACLE["cases"] if any(word in c for word in WEIGHTS)]
PAIRS_ONCE = ("lifted_song", "circle_global", "histogram")  # whose unordered pairs the oracle has once, on i < j
OF_SIMILARITIES = ("fastap", "proxynca")  # here; in the oracle of D^2, which of unit vectors is 2 - 2 s


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c['loss']}-{c['batch']}-{c['params']}")
def test_equal_to_the_oracle(case):
    x, labels = golden.batch(case, ORACLE)
    found = flashpair.pair_weights(golden.criterion_for(case, ORACLE), x, labels)
    (word,) = (word for word in WEIGHTS if word in case)
    truth = torch.tensor(case[word], dtype=torch.float64)
    if case["loss"].startswith(PAIRS_ONCE):
        found, truth = found + found.T, truth + truth.T
    if case["loss"] in OF_SIMILARITIES:
        truth = -2 * truth
    if case["loss"] == "proxy_anchor":
        truth = truth.T
    assert found.shape == truth.shape
    assert found.any() or case["batch"] != "A"
    assert (found - truth).abs().max() <= 1e-10


def test_every_loss_of_pairs_has_a_case():
    assert len(CASES) > 100
    assert {c["loss"] for c in CASES} >= {"fastap", "nca_d2", "proxynca", "proxy_anchor", "cosface", "margin"}


def _of_one_set(distance, w, x):
    """dX of a square problem from its weights."""
    w = w + w.T
    if distance == "dot":
        return w @ x
    u = 2 * w
    if distance == "euclidean":
        d = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")
        u = torch.where(d > 0, w / torch.where(d > 0, d, 1.0), 0.0)
    return u.sum(1, keepdim=True) * x - u @ x


def _of_two_sets(distance, w, x, y):
    """dX of anchors against references, and dY."""
    if distance == "dot":
        return w @ y, w.T @ x
    u = 2 * w if distance == "squared_euclidean" else w / torch.cdist(x, y)
    return u.sum(1, keepdim=True) * x - u @ y, u.sum(0)[:, None] * y - u.T @ x


# SNR's ratio has the norm in it beside the distance, and angles those of sums: their weights are not all there is.
OF_PAIRS_ALONE = [n for n in PAIR_CRITERIA if not n.startswith(("SNRContrastiveLoss", "AngularLoss"))]


@pytest.mark.parametrize("name", OF_PAIRS_ALONE)
@pytest.mark.parametrize("references", [False, True], ids=["square", "references"])
def test_gradients_are_weights_times_embeddings(name, references):
    if references and name not in REFERENCE_CRITERIA:
        pytest.skip("is defined within a batch")
    x, labels = batch(20, 4, 4, torch.float64)
    y, ref_labels = batch(30, 4, 3, torch.float64, seed=1)
    x, y = torch.nn.functional.normalize(x), torch.nn.functional.normalize(y)  # which histograms' nodes are for
    criterion = CRITERIA[name](normalize=False)
    more = {"ref_emb": y.requires_grad_(), "ref_labels": ref_labels} if references else {}
    w = flashpair.pair_weights(criterion, x, labels, **more)
    criterion(x.requires_grad_(), labels, **more).backward()
    assert w.shape == (20, 30 if references else 20)
    assert w.any()
    if references:
        dx, dy = _of_two_sets(criterion.distance, w, x.detach(), y.detach())
        assert_same(x.grad, dx)
        assert_same(y.grad, dy)
    else:
        assert_same(x.grad, _of_one_set(criterion.distance, w, x.detach()))


@pytest.mark.parametrize("name", [n for n in CRITERIA if n not in PAIR_CRITERIA and n != "SoftTripleLoss"])
def test_gradients_are_weights_times_class_weights(name):
    """Of embeddings against unit class weights; SphereFace's has the embedding's norm in it beside the products."""
    x, labels = batch(20, 4, 4, torch.float64)
    x = torch.nn.functional.normalize(x)
    criterion = made(name, 4, normalize=False)
    w = flashpair.pair_weights(criterion, x, labels)
    criterion(x.requires_grad_(), labels).backward()
    assert w.shape == ((200, 20) if name == "ProxyAnchorLoss" else (20, 200))
    unit = torch.nn.functional.normalize(criterion.weight.detach().double())
    dx = (w.T if name == "ProxyAnchorLoss" else w) @ unit
    found = x.grad
    if name == "SphereFaceLoss":
        found, dx = (t - (t * x.detach()).sum(1, keepdim=True) * x.detach() for t in (found, dx))  # across x alone
    assert_same(found, dx)


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
