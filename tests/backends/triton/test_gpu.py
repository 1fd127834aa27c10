"""The compiled kernels on a GPU: parity, bits, memory, streams, graphs, compile, 64-bit offsets.

Part of bench.gpu_proof; skipped where torch finds no GPU.
"""

from __future__ import annotations

import pytest
import torch
from helpers import CRITERIA, assert_as_good_as, assert_same, batch, forms

from flashpair import Bound, MultiSimilarityLoss, Reduction, metrics, row_reduce
from flashpair.engine import nearest
from flashpair.engine.dispatch import unsupported_reasons
from flashpair.miners import hard_classes
from flashpair.tools.check import value_and_gradient

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

if torch.cuda.is_available():
    from flashpair.backends.triton import launcher, shared_top

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SCHEDULES = ["fused", "tiled"]
UNIT_ONLY = ("AngularLoss(form='hinge')",)  # which refuse normalize=False
ONCHIP = unsupported_reasons("onchip", torch.device("cuda")) if torch.cuda.is_available() else []
MINING = [*SCHEDULES, "screened"]
EVERY = [*MINING, pytest.param("onchip", marks=pytest.mark.skipif(bool(ONCHIP), reason="; ".join(ONCHIP)))]


def _cuda(*tensors):
    return tuple(None if t is None else t.cuda() for t in tensors)


def _unit(x):
    """Rows of norm 1, rounded to their dtype once, so that every implementation starts from the same numbers."""
    return torch.nn.functional.normalize(x.double()).to(x.dtype)


@pytest.mark.parametrize("impl", SCHEDULES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CRITERIA)
def test_every_criterion_against_float64(name, dtype, impl):
    """float64 to rounding; else as near as eager code of that precision, whose products are of that dtype, too."""
    if name == "SoftTripleLoss" and impl == "fused":
        pytest.skip("has no kernel of its own")
    options = {} if name in UNIT_ONLY else {"normalize": False}
    for n, d in ((800, 128), (333, 100)):
        x, labels = batch(n, d, 4, torch.float32)
        (x, labels) = _cuda(_unit(x.to(dtype)), labels)
        truth = value_and_gradient(CRITERIA[name](impl="reference", **options), x.double(), labels)
        found = value_and_gradient(CRITERIA[name](impl=impl, **options), x, labels)
        if dtype == torch.float64:
            for f, t in zip(found, truth, strict=True):
                assert_same(f, t)
            continue
        eager = value_and_gradient(CRITERIA[name](impl="reference", **options), x, labels)
        for f, e, t in zip(found, eager, truth, strict=True):
            # the reference multiplies 16-bit numbers in float32; the kernels round weights to them, once a pair
            rounding = torch.finfo(dtype).eps if dtype in (torch.bfloat16, torch.float16) else 0.0
            bound = 2 * ((e.double() - t).norm() / t.norm() + torch.finfo(torch.float32).eps) + rounding
            assert (f.double() - t).norm() / t.norm() <= bound


@pytest.mark.parametrize("impl", SCHEDULES)
@pytest.mark.parametrize("d", [1, 16, 31, 64, 65, 127, 128, 129, 256, 257, 300, 768, 1024])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_width(d, dtype, impl):
    """One chunk and slab, several, cut ones, odd rows that no vector load fits."""
    x, labels = batch(300, d, 4, torch.float32)
    y, ref_labels = batch(450, d, 4, torch.float32, seed=1)
    x, y = x.to(dtype) / d**0.5, y.to(dtype) / d**0.5
    x, labels, y, ref_labels = _cuda(x, labels, y, ref_labels)
    for refs in ({}, {"ref_emb": y, "ref_labels": ref_labels}):
        results = []
        for as_dtype, which in ((dtype, impl), (torch.float64, "reference"), (torch.float32, "reference")):
            a = x.detach().to(as_dtype).requires_grad_()
            more = {k: v.to(as_dtype) if v.is_floating_point() else v for k, v in refs.items()}
            (row,) = row_reduce(a, labels, Reduction("logsumexp", "negatives", scale=2.0), impl=which, **more)
            results.append([row.detach(), *torch.autograd.grad(row.sum(), a)])
        for f, t, e in zip(*results, strict=True):
            if dtype == torch.float32:
                assert_as_good_as(f, e, t)
            else:
                assert (f.double() - t).norm() <= 2 * torch.finfo(dtype).eps * t.norm()


@pytest.mark.parametrize("impl", SCHEDULES)
@pytest.mark.parametrize("n", [0, 1, 15, 63, 64, 65, 127, 128, 129, 255, 257, 1025])
def test_tile_edges(n, impl):
    x, labels = _cuda(*batch(n, 40, 4, torch.float64, seed=n))
    y, ref_labels = _cuda(*batch(200, 40, 4, torch.float64, seed=1))
    for name in ("MultiSimilarityLoss", "GeneralizedLiftedStructureLoss(distance='euclidean')"):
        for refs in ({}, {"ref_emb": y, "ref_labels": ref_labels}):
            results = []
            for which in (impl, "reference"):
                a = x.clone().requires_grad_()
                rows = CRITERIA[name](impl=which, reduction="none")(a, labels, **refs)
                results.append([rows.detach(), torch.autograd.grad(rows.sum(), a)[0]])
            for f, t in zip(*results, strict=True):
                assert_same(f, t)


@pytest.mark.parametrize("impl", SCHEDULES)
def test_gradcheck(impl):
    x, labels = _cuda(*batch(12, 5, 3, torch.float64))
    for name, make in CRITERIA.items():
        if not make().differentiates or (name == "SoftTripleLoss" and impl == "fused"):
            continue
        assert torch.autograd.gradcheck(lambda t, m=make: m(impl=impl)(t, labels), (x.requires_grad_(),))


@pytest.mark.parametrize("impl", SCHEDULES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_a_hundred_times(dtype, impl):
    x, labels = _cuda(*batch(1500, 96, 4, dtype))
    first = value_and_gradient(MultiSimilarityLoss(impl=impl), x, labels)
    for _ in range(100):
        again = value_and_gradient(MultiSimilarityLoss(impl=impl), x, labels)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("impl", SCHEDULES)
@pytest.mark.parametrize(("n", "d"), [(700, 8), (700, 32), (700, 96), (1500, 1024), (4096, 768)])
def test_backward_sees_the_bits_that_forward_saw(n, d, dtype, impl):
    """A window at exactly a row's highest similarity leaves nothing, in either pass, from either end of a pair."""
    x, labels = _cuda(*batch(n, d, 4, dtype))
    highest = Reduction("max", "negatives", detach=True)
    a = x.clone().requires_grad_()
    rows = row_reduce(a, labels, highest, Reduction("sum", "negatives", lower=Bound(highest)), impl=impl)[1]
    (grad,) = torch.autograd.grad(rows.sum(), a)
    assert not rows.any() and not grad.any()


def _both(make, x, labels):
    results = []
    for impl in ("fused", "reference"):
        a = x.clone().requires_grad_()
        rows = make(a, impl)
        results.append([rows.detach(), torch.autograd.grad(rows.sum(), a)[0]])
    for f, t in zip(*results, strict=True):
        assert_same(f, t)


def test_tiles_of_which_no_pair_counts_are_not_visited(monkeypatch):
    counts = []
    list_tiles = launcher.Launcher.list_tiles
    monkeypatch.setattr(launcher.Launcher, "list_tiles", lambda *a: counts.append(list_tiles(*a)) or counts[-1])
    centres = torch.randn(500, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    noise = torch.randn(2000, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    labels = torch.arange(2000) // 4
    x, labels = _cuda(centres[labels] + 0.4 * noise, labels)
    _both(lambda a, impl: MultiSimilarityLoss(impl=impl, reduction="none")(a, labels), x, labels)
    (listed, each), *_ = counts
    assert 0 < each.sum().item() < listed.numel()


def test_logsumexps_too_far_apart_for_one_exponential(monkeypatch):
    monkeypatch.setattr(shared_top, "SPREAD", dict.fromkeys(shared_top.SPREAD, 100.0))
    x, labels = _cuda(*batch(900, 7, 4, torch.float64))
    x[::2] *= 8
    _both(lambda a, impl: row_reduce(a, labels, Reduction("logsumexp", "negatives"), impl=impl)[0], x, labels)


@pytest.mark.parametrize("impl", SCHEDULES)
@pytest.mark.parametrize("distance", ["dot", "euclidean"])
@pytest.mark.parametrize("references", [False, True], ids=["square", "references"])
@pytest.mark.parametrize("seed", range(4))
def test_every_reduction_side_and_window(seed, references, distance, impl):
    """Every reduction in one call, learned scales and offsets, windows; gradients of the references, too."""
    x, labels = _cuda(*batch(300, 20, 4, torch.float64))
    y, ref_labels = _cuda(*batch(350, 20, 3, torch.float64, seed=1))
    more = {"ref_emb": y.requires_grad_(), "ref_labels": ref_labels} if references else {}
    reductions, learn = forms(300, 350 if references else 300, seed, "cuda")
    inputs = [x.requires_grad_(), *([y] if references else []), *learn]
    results = []
    for which in (impl, "reference"):
        rows = row_reduce(x, labels, *reductions, distance=distance, impl=which, **more)
        finite = [torch.where(r.isfinite(), r, 0.0) for r in rows]
        total = sum((k + 1) * r.sum() for k, r in enumerate(finite) if r.requires_grad)
        grads = torch.autograd.grad(total, inputs, allow_unused=True)
        zeros = [torch.zeros_like(t) if g is None else g for g, t in zip(grads, inputs, strict=True)]
        results.append([*(r.detach() for r in rows), *zeros])
    for f, t in zip(*results, strict=True):
        assert_same(f, t)


@pytest.mark.parametrize(("impl", "d"), [("fused", 128), ("tiled", 768)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_peak_memory_at_131072(impl, d, dtype):
    """Under three times the inputs plus 256 MB; one matrix of similarities would be 34 or 68 GB."""
    n = 131072
    labels = torch.arange(n, device="cuda") // 4
    x = torch.randn(n, d, device="cuda", dtype=dtype).requires_grad_()
    criterion = MultiSimilarityLoss(impl=impl)
    criterion(x[:1000].detach().requires_grad_(), labels[:1000]).backward()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    criterion(x, labels).backward()
    torch.cuda.synchronize()
    # float32 sums of a wide 16-bit gradient are twice the inputs by themselves, beside the sorted copy and the gradient
    copies = 4 if impl == "tiled" and dtype == torch.bfloat16 else 3
    assert torch.cuda.max_memory_allocated() - before <= copies * x.nbytes + 256 * 2**20


@pytest.mark.parametrize("impl", EVERY)
def test_cuda_graph_replays_with_new_numbers(impl):
    x, labels = _cuda(*batch(600, 64, 4, torch.bfloat16))
    static = x.clone().requires_grad_()
    criterion = MultiSimilarityLoss(impl=impl)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            static.grad = None
            criterion(static, labels).backward()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    static.grad = None
    with torch.cuda.graph(graph):
        loss = criterion(static, labels)
        loss.backward()
    for seed in (1, 2):
        fresh = batch(600, 64, 4, torch.bfloat16, seed=seed)[0].cuda()
        with torch.no_grad():
            static.copy_(fresh)
        graph.replay()
        torch.cuda.synchronize()
        eager = value_and_gradient(criterion, fresh, labels)
        assert torch.equal(loss, eager[0]) and torch.equal(static.grad, eager[1])


@pytest.mark.parametrize("impl", EVERY)
def test_fullgraph_compile(impl):
    x, labels = _cuda(*batch(600, 64, 4, torch.float32))
    criterion = MultiSimilarityLoss(impl=impl)
    found = value_and_gradient(torch.compile(criterion, fullgraph=True), x, labels)
    truth = value_and_gradient(MultiSimilarityLoss(impl="reference"), x.double(), labels)
    eager = value_and_gradient(MultiSimilarityLoss(impl="reference"), x, labels)
    for f, e, t in zip(found, eager, truth, strict=True):
        assert_as_good_as(f, e, t)


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("impl", MINING)
def test_no_host_sync(impl, learned):
    x, labels = _cuda(*batch(600, 64, 4, torch.float32))
    alpha = torch.nn.Parameter(torch.tensor(2.0, device="cuda")) if learned else 2.0
    criterion = MultiSimilarityLoss(alpha=alpha, impl=impl)
    shifted = Reduction("sum", "negatives", "softplus", offset=-0.5, lower=0.1)

    def step():
        value_and_gradient(criterion, x, labels)
        row_reduce(x, labels, shifted, impl=impl)

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("impl", EVERY)
def test_runs_on_the_current_stream(impl):
    """What a side stream is still writing is read after it, without the host waiting."""
    x, labels = _cuda(*batch(2000, 64, 4, torch.float32))
    truth = value_and_gradient(MultiSimilarityLoss(impl=impl), x, labels)
    late, stream = torch.zeros_like(x), torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        late.copy_(x)
        found = value_and_gradient(MultiSimilarityLoss(impl=impl), late, labels)
    torch.cuda.synchronize()
    assert all(torch.equal(f, t) for f, t in zip(found, truth, strict=True))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("impl", EVERY)
def test_runs_on_the_tensors_device(impl):
    x, labels = batch(600, 64, 4, torch.float32)
    found, truth = (
        value_and_gradient(MultiSimilarityLoss(impl=impl), x.to(device), labels.to(device))
        for device in ("cuda:1", "cuda:0")
    )
    assert all(f.device.index == 1 and torch.equal(f.cpu(), t.cpu()) for f, t in zip(found, truth, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_offsets_past_two_to_the_thirty_one(dtype):
    """N D is over 2^31, and N M far over: the last rows' gradient comes out as that of a small batch of them."""
    n, d, tail = 2**21 + 64, 1040, 64
    labels = torch.arange(n, device="cuda") // 4
    x = torch.zeros(n, d, device="cuda", dtype=dtype)
    x[-tail:] = torch.randn(tail, d, device="cuda").to(dtype)
    results = []
    for a, own in ((x, labels), (x[-tail:].clone(), labels[-tail:])):
        a = a.requires_grad_()
        (row,) = row_reduce(a, own, Reduction("logsumexp", "positives"), impl="fused")
        (grad,) = torch.autograd.grad(row[-tail:].sum(), a)
        results.append((row.detach()[-tail:], grad[-tail:]))
        del a, grad, row
    for f, t in zip(*results, strict=True):
        assert (f - t).abs().max() <= 8 * torch.finfo(dtype).eps * t.abs().max()


def test_auto_and_mixed_precision():
    x, labels = _cuda(*batch(300, 64, 4, torch.float32))
    criterion = MultiSimilarityLoss()
    with torch.autocast("cuda", dtype=torch.bfloat16):
        weight = torch.eye(64, device="cuda", requires_grad=True)
        loss = criterion(x @ weight, labels)
    loss.backward()
    assert loss.dtype == torch.float32 and weight.grad.isfinite().all()
    wide = torch.randn(100, 640, device="cuda").requires_grad_()
    criterion(wide, torch.arange(100, device="cuda") // 4).backward()
    assert wide.grad.isfinite().all()


@pytest.mark.parametrize("distance", ["dot", "euclidean"])
def test_metrics_and_class_mining_as_on_the_host(distance, monkeypatch):
    """Whole numbers, exact on both, many of them equal, which go by index; queries in several blocks."""
    monkeypatch.setattr(nearest, "BLOCK_BYTES", 2**20)
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-2, 3, (900, 6), generator=generator).float()
    labels = torch.randint(200, (900,), generator=generator)
    found = []
    for device in ("cpu", "cuda"):
        rows, of = x.to(device), labels.to(device)
        given = rows[:500], of[:500], rows[500:], of[500:]
        found.append((
            metrics.retrieval(rows, of, distance=distance, impl="reference"),
            metrics.retrieval(*given, distance=distance, impl="reference", average="macro"),
            metrics.knn_accuracy(*given, k=7, distance=distance, impl="reference"),
            metrics.identification(*given, distance=distance, impl="reference", false_alarm_rates=(0.1,)),
            metrics.verification_rate(rows, of, negatives=(1, 5), distance=distance),
            hard_classes(rows[:400], rows[400:800], 30, generator=torch.Generator().manual_seed(1)).tolist(),
        ))  # fmt: skip
    assert found[0][-1] == found[1][-1]
    for host, device in zip(*(entry[:-1] for entry in found), strict=True):
        assert _numbers(device) == pytest.approx(_numbers(host), abs=1e-12)


def _numbers(found):
    """All numbers of a nested result, in order."""
    if isinstance(found, dict):
        return [number for value in found.values() for number in _numbers(value)]
    return [number for value in found for number in _numbers(value)] if isinstance(found, tuple) else [found]
