"""`onchip` on a GPU: parity, bits, limits (graphs and streams: test_gpu.py). Part of bench.gpu_proof."""

from __future__ import annotations

import pytest
import torch
from helpers import CRITERIA, assert_as_good_as, assert_same, batch

from flashpair import MultiSimilarityLoss
from flashpair.backends.cuda import onchip
from flashpair.engine import dispatch
from flashpair.engine.dispatch import unsupported_reasons
from flashpair.tools.check import value_and_gradient

WHY_NOT = unsupported_reasons("onchip", torch.device("cuda")) if torch.cuda.is_available() else ["needs a CUDA device"]
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(bool(WHY_NOT), reason="; ".join(WHY_NOT))]
FORMS = {name: make for name, make in CRITERIA.items() if make().row_formula() is not None}
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def _cuda(*tensors):
    return tuple(t.cuda() for t in tensors)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", FORMS)
def test_every_criterion_against_float64(name, dtype):
    for n, d in ((1000, 128), (333, 100), (32, 512)):
        x, labels = _cuda(*batch(n, d, 4, torch.float32))
        x = (x / d**0.25).to(dtype)
        truth = value_and_gradient(FORMS[name](impl="reference"), x.double(), labels)
        found = value_and_gradient(FORMS[name](impl="onchip"), x, labels)
        eager = value_and_gradient(FORMS[name](impl="reference"), x, labels)
        for f, e, t in zip(found, eager, truth, strict=True):
            assert_same(f, t) if dtype == torch.float64 else assert_as_good_as(f, e, t)


EDGES = (0, 1, 2, 3, 4, 5, 31, 32, 33, 127, 128, 129, 131, 132, 133, 255, 256, 257, 528, 529, 1023, 1024, 1025, 1400)


@pytest.mark.parametrize("n", EDGES)
def test_edges_of_blocks(n):
    """Edges of quads, of rows a block (132 multiprocessors: 1, 2, 4, 8, 16), of passes of 1,024 columns."""
    x, labels = _cuda(*batch(n, 40, 4, torch.float64, seed=n))
    y, ref_labels = _cuda(*batch(60, 40, 4, torch.float64, seed=1))
    for name in ("MultiSimilarityLoss", "NPairsLoss", "GeneralizedLiftedStructureLoss(distance='euclidean')"):
        for refs in ({}, {"ref_emb": y.requires_grad_(), "ref_labels": ref_labels}):
            results = []
            for impl in ("onchip", "reference"):
                a = x.clone().requires_grad_()
                rows = FORMS[name](impl=impl, reduction="none")(a, labels, **refs)
                leaves = [a, y] if refs else [a]
                results.append([rows.detach(), *torch.autograd.grad(rows.sum(), leaves)])
            for f, t in zip(*results, strict=True):
                assert_same(f, t)


@pytest.mark.parametrize("d", [1, 3, 4, 31, 64, 257, 1024, 2048])
def test_widths(d):
    x, labels = _cuda(*batch(200, d, 4, torch.float64))
    found, truth = (value_and_gradient(MultiSimilarityLoss(impl=impl), x, labels) for impl in ("onchip", "reference"))
    for f, t in zip(found, truth, strict=True):
        assert_same(f, t)


def test_gradcheck():
    x, labels = _cuda(*batch(12, 5, 3, torch.float64))
    for make in FORMS.values():
        assert torch.autograd.gradcheck(lambda t, m=make: m(impl="onchip")(t, labels), (x.requires_grad_(),))


@pytest.mark.parametrize(("n", "dtype"), [(256, torch.float32), (1024, torch.bfloat16), (1000, torch.float64)], ids=str)
def test_same_bits_a_thousand_times(n, dtype):
    """Into memory that holds NaN, while another stream keeps other multiprocessors busy in between."""
    x, labels = _cuda(*batch(n, 96, 4, dtype))
    criterion, noise = MultiSimilarityLoss(impl="onchip"), torch.cuda.Stream()
    first = value_and_gradient(criterion, x, labels)
    different = torch.zeros((), dtype=torch.int64, device="cuda")
    torch.use_deterministic_algorithms(True)  # fills what torch.empty returns
    try:
        for k in range(1000):
            if k % 10 == 0:
                with torch.cuda.stream(noise):
                    torch.randn(2_000_000, device="cuda").sin_()
            again = value_and_gradient(criterion, x, labels)
            different += sum((a != b).sum() for a, b in zip(first, again, strict=True))
    finally:
        torch.use_deterministic_algorithms(False)
    assert different.item() == 0


def test_no_host_sync_and_no_new_memory_from_the_device():
    x, labels = _cuda(*batch(600, 64, 4, torch.float32))
    criterion = MultiSimilarityLoss(impl="onchip")
    for _ in range(3):
        value_and_gradient(criterion, x, labels)
    before = torch.cuda.memory_stats()["num_alloc_retries"], torch.cuda.memory_reserved()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(20):
            value_and_gradient(criterion, x, labels)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert (torch.cuda.memory_stats()["num_alloc_retries"], torch.cuda.memory_reserved()) == before


def test_one_launch():
    from torch.profiler import ProfilerActivity, profile

    x, labels = _cuda(*batch(256, 128, 4, torch.float32))
    x.requires_grad_()
    criterion = MultiSimilarityLoss(impl="onchip")
    criterion(x, labels)
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        criterion(x, labels)
        torch.cuda.synchronize()
    events = [event for event in seen.key_averages() if "cuda" in str(event.device_type).lower()]
    if not events:
        pytest.skip("no profiler here")
    kernels = {event.key: event.count for event in events if "emcpy" not in event.key and "emset" not in event.key}
    assert list(kernels.values()) == [1] and "loss_and_gradient" in next(iter(kernels))


def test_auto_takes_it_for_small_batches(monkeypatch):
    called = []
    run = onchip.run_small_batch
    monkeypatch.setattr(onchip, "run_small_batch", lambda call: called.append(call.x.shape[0]) or run(call))
    learned = torch.nn.Parameter(torch.tensor(2.0, device="cuda"))
    for n, alpha, takes in ((64, 2.0, True), (64, learned, False), (dispatch.ONCHIP_SIDE + 4, 2.0, False)):
        called.clear()
        x, labels = _cuda(*batch(n, 32, 4, torch.float32))
        assert value_and_gradient(MultiSimilarityLoss(alpha=alpha), x, labels)[1].isfinite().all()
        assert bool(called) == takes


def test_large_batches_in_float32():
    for n in (1500, 2048):
        x, labels = _cuda(*batch(n, 40, 4, torch.float32))
        truth = value_and_gradient(MultiSimilarityLoss(impl="reference"), x.double(), labels)
        found = value_and_gradient(MultiSimilarityLoss(impl="onchip"), x, labels)
        eager = value_and_gradient(MultiSimilarityLoss(impl="reference"), x, labels)
        for f, e, t in zip(found, eager, truth, strict=True):
            assert_as_good_as(f, e, t)


def test_references_with_gradients_under_no_grad():
    """Their blocks are left out, and the plan is made without them: 1024 x 1024 would not fit with them."""
    x, labels = _cuda(*batch(1024, 32, 4, torch.float32))
    y = x.clone().requires_grad_()
    with torch.no_grad():
        found = MultiSimilarityLoss(impl="onchip")(x.requires_grad_(), labels, ref_emb=y, ref_labels=labels)
    assert found.isfinite()


def test_largest_batch_runs_and_one_more_is_refused():
    n = onchip.largest_batch(64, onchip.limits(0))
    x, labels = _cuda(*batch(n + 4, 64, 4, torch.float32))
    assert value_and_gradient(MultiSimilarityLoss(impl="onchip"), x[:n], labels[:n])[1].isfinite().all()
    with pytest.raises(RuntimeError, match="impl='onchip' cannot run"):
        MultiSimilarityLoss(impl="onchip")(x, labels)


def test_loss_scaling_in_half_precision():
    """float16 gradients of 1e-8 vanish; scaled by 2^16 they do not, because they are scaled before they are rounded."""
    x, labels = _cuda(*batch(512, 64, 4, torch.float16))
    x.requires_grad_()
    scale = 2.0**16
    (small,) = torch.autograd.grad(MultiSimilarityLoss(impl="onchip")(x, labels) * 1e-3 * scale, x)
    (truth,) = torch.autograd.grad(MultiSimilarityLoss(impl="reference")(x, labels) * 1e-3 * scale, x)
    assert_as_good_as(small, truth, truth)
