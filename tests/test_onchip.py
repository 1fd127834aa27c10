"""The CUDA kernel's own source, run on the CPU (tests/cuda_on_host), against the dense float64 reference.

Blocks of 64 threads, so that one pass of a product is 256 columns. A row count is a number of multiprocessors here: the
kernel for 1, 2, 4, 8 or 16 rows a block is the first that needs no more blocks than there are.
"""

from __future__ import annotations

import pytest
import torch
from helpers import CRITERIA, assert_as_good_as, assert_same, batch, relative

from flashpair import LiftedStructureLoss, MultiSimilarityLoss, NPairsLoss, Reduction, extension, onchip, row_reduce
from flashpair.criteria.base import REDUCTIONS

pytestmark = pytest.mark.skipif(not extension.emulated(), reason="no compiler to build the emulated kernel with")
FORMS = {name: make for name, make in CRITERIA.items() if make().row_formula() is not None}


@pytest.fixture
def chip(monkeypatch):
    """Makes the emulated device one of so many multiprocessors, with so much shared memory a block."""

    def make(processors, shared=227 * 1024, cooperative=1):
        for name, value in (("PROCESSORS", processors), ("SHARED", shared), ("COOPERATIVE", cooperative)):
            monkeypatch.setenv(f"CUDA_ON_HOST_{name}", str(value))
        forget()

    def forget():
        onchip._limits.cache_clear()
        onchip._plan.cache_clear()

    yield make
    monkeypatch.undo()
    forget()


def results(make, impl, x, labels, y=None, ref_labels=None, need=(True, True), **options):
    """Loss and the wanted gradients, under an upstream gradient that is not 1."""
    a = x.clone().requires_grad_(need[0])
    more, wanted = {}, [a] * need[0]
    if y is not None:
        b = y.clone().requires_grad_(need[1])
        more, wanted = {"ref_emb": b, "ref_labels": ref_labels}, wanted + [b] * need[1]
    loss = make(impl=impl, **options)(a, labels, **more)
    upstream = torch.randn(loss.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return [loss.detach(), *torch.autograd.grad(loss, wanted, upstream.to(loss.dtype))]


def assert_parity(make, *batch, **options):
    found, truth = (results(make, impl, *batch, **options) for impl in ("onchip", "reference"))
    for f, t in zip(found, truth, strict=True):
        assert_same(f, t)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("name", FORMS)
def test_every_formula_and_reduction(name, reduction, chip):
    chip(13)
    x, labels = batch(23, 7, 3, torch.float64)
    y, ref_labels = batch(18, 7, 4, torch.float64, seed=1)
    assert_parity(FORMS[name], x, labels, reduction=reduction)
    assert_parity(FORMS[name], x, labels, y, ref_labels, reduction=reduction)


# Every count of rows at its edges; quads of rows and columns; passes of 256 columns in either product (N, or D);
# inner axes with and without a share for every group of threads.
EDGES = [(n, 5, 4) for n in (0, 1, 2, 3, 4, 5)] + [(n, 9, 32) for n in (31, 32, 33, 63, 64, 65)]
EDGES += [(7, d, 7) for d in (1, 3, 4, 255, 256, 257)] + [(17, 131, 2), (32, 64, 2), (48, 33, 3)]
EDGES += [(255, 3, 16), (256, 3, 16), (260, 5, 17)]


@pytest.mark.parametrize(("n", "d", "processors"), EDGES)
def test_edges_of_blocks_and_passes(n, d, processors, chip):
    chip(processors)
    x, labels = batch(n, d, 4, torch.float64, seed=n)
    assert_parity(MultiSimilarityLoss, x, labels)


@pytest.mark.parametrize(
    ("n", "m", "processors"), [(0, 5, 8), (5, 0, 8), (1, 1, 2), (3, 40, 12), (40, 3, 12), (9, 300, 20)]
)
def test_edges_of_rectangles(n, m, processors, chip):
    chip(processors)
    x, labels = batch(n, 6, 4, torch.float64)
    y, ref_labels = batch(m, 6, 4, torch.float64, seed=1)
    for name in ("MultiSimilarityLoss", "NPairsLoss", "GeneralizedLiftedStructureLoss(distance='euclidean')"):
        assert_parity(FORMS[name], x, labels, y, ref_labels)


@pytest.mark.parametrize("rows", onchip.BLOCK_ROWS)
def test_every_kernel(rows, chip):
    chip(-(-40 // rows))
    assert onchip.block_rows(40, 40, 12, 8, False, onchip.limits(0)) == rows
    x, labels = batch(40, 12, 4, torch.float64)
    assert_parity(MultiSimilarityLoss, x, labels)
    x = x.float()
    found = results(MultiSimilarityLoss, "onchip", x, labels)
    truth = results(MultiSimilarityLoss, "reference", x.double(), labels)
    eager = results(MultiSimilarityLoss, "reference", x, labels)
    for f, e, t in zip(found, eager, truth, strict=True):
        assert_as_good_as(f, e, t)


PATTERNS = {
    "one class": torch.zeros(20, dtype=torch.int64),
    "all single": torch.arange(20),
    "two classes": torch.arange(20) % 2,
    "one large, many small": torch.tensor([0] * 10 + list(range(1, 11))),
    "far apart": torch.tensor([-(2**63), 2**63 - 1, 2**32, 0, 2**32 + 2**31] * 4),
}


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_label_patterns(pattern, name, chip):
    chip(10)
    x, _ = batch(20, 6, 4, torch.float64)
    x[7] = x[2]  # a duplicate is a real pair
    x[11] = 0.0
    assert_parity(FORMS[name], x, PATTERNS[pattern])


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8])
def test_other_integers_and_strides(dtype, chip):
    chip(8)
    x, labels = batch(32, 12, 4, torch.float64)
    found = results(MultiSimilarityLoss, "onchip", x[::2, ::2], labels.to(dtype)[::2])
    for f, t in zip(found, results(MultiSimilarityLoss, "reference", x[::2, ::2], labels[::2]), strict=True):
        assert_same(f, t)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", FORMS)
def test_precision(name, dtype, chip):
    """As near to float64 as the dense code of that precision, which multiplies 16-bit numbers in float32 as well."""
    chip(8)
    x, labels = batch(30, 33, 3, torch.float32)
    y, ref_labels = batch(20, 33, 3, torch.float32, seed=1)
    x, y = x.to(dtype), y.to(dtype)
    found = results(FORMS[name], "onchip", x, labels, y, ref_labels)
    eager = results(FORMS[name], "reference", x, labels, y, ref_labels)
    truth = results(FORMS[name], "reference", x.double(), labels, y.double(), ref_labels)
    for f, e, t in zip(found, eager, truth, strict=True):
        assert f.dtype == e.dtype
        assert_as_good_as(f, e, t)


def test_embeddings_and_references_of_two_dtypes(chip):
    chip(8)
    x, labels = batch(12, 6, 3, torch.float64)
    found = results(MultiSimilarityLoss, "onchip", x.float(), labels, x, labels)
    truth = results(MultiSimilarityLoss, "reference", x.float(), labels, x, labels)
    assert [f.dtype for f in found] == [torch.float64, torch.float32, torch.float64]
    for f, t in zip(found, truth, strict=True):
        assert relative(f, t) <= 8 * torch.finfo(f.dtype).eps


@pytest.mark.parametrize("need", [(True, False), (False, True)])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_only_one_side_wants_a_gradient(need, reduction, chip):
    chip(8)
    x, labels = batch(14, 6, 3, torch.float64)
    y, ref_labels = batch(11, 6, 3, torch.float64, seed=1)
    assert_parity(MultiSimilarityLoss, x, labels, y, ref_labels, need=need, reduction=reduction)


def test_without_gradients(chip):
    chip(4)
    x, labels = batch(14, 6, 3, torch.float64)
    with torch.no_grad():
        losses = [MultiSimilarityLoss(impl=impl)(x, labels) for impl in ("onchip", "reference")]
    assert_same(*losses)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf, 1e300])
@pytest.mark.parametrize("name", FORMS)
def test_what_is_not_finite_is_nan(name, bad, chip):
    """Nowhere does a comparison swallow it. 1e300 squared overflows, where a loss normalises or takes distances."""
    chip(8)
    x, labels = batch(12, 6, 3, torch.float64)
    x[5, 2] = bad
    if bad == 1e300 and not FORMS[name]().normalize:
        pytest.skip("dot products of finite numbers")
    for impl in ("onchip", "reference"):
        loss, grad = results(FORMS[name], impl, x, labels)
        assert loss.isnan() and grad.isnan().any()


@pytest.mark.parametrize("kind", ["mean_sq", "tf_contrib", "mean_norm"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "mean_valid"])
@pytest.mark.parametrize("variant", ["mc", "ovo", "all_pairs"])
def test_penalty_on_norms(variant, reduction, kind, chip):
    chip(6)
    x, labels = batch(11, 5, 3, torch.float64)

    def make(**options):
        return NPairsLoss(variant, 0.02, kind, **options)

    assert_parity(make, x, labels, reduction=reduction)


def test_same_bits_and_untouched_inputs(chip):
    chip(9)
    x, labels = batch(34, 20, 4, torch.float32)
    before = x.clone(), labels.clone()
    torch.use_deterministic_algorithms(True)  # fills what torch.empty returns with NaN
    try:
        runs = [results(MultiSimilarityLoss, "onchip", x, labels) for _ in range(5)]
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0], strict=True))
    assert torch.equal(x, before[0]) and torch.equal(labels, before[1])


@pytest.mark.parametrize("m", [6, 60, 300])
@pytest.mark.parametrize("d", [37, 100, 257])
def test_both_ends_see_the_same_bits(d, m, chip):
    """References that are an anchor's one positive again, under other labels, stand exactly at its window's edge.

    They have no weight; a last bit that differs between the anchor's and the reference's side would give them one.
    """
    chip(40)
    generator = torch.Generator().manual_seed(d + m)
    for _ in range(3):
        x, y = torch.randn(1, d, generator=generator), torch.randn(m, d, generator=generator)
        y[-1] += x[0]  # a harder negative than the positive, so that something is mined
        y[: m // 2] = y[0]
        labels, ref_labels = torch.tensor([0]), torch.arange(m)
        loss, _, dy = results(MultiSimilarityLoss, "onchip", x, labels, y, ref_labels, epsilon=0.0)
        assert loss > 0 and dy[0].any() and dy[-1].any()
        assert not dy[1 : m // 2].any()


def test_backward_twice_and_second_derivatives(chip):
    chip(3)
    x, labels = batch(6, 3, 2, torch.float64)
    a = x.clone().requires_grad_()
    loss = MultiSimilarityLoss(impl="onchip")(a, labels)
    first, again = (torch.autograd.grad(loss, a, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, again)
    for name in ("MultiSimilarityLoss(epsilon=None)", "NPairsLoss('ovo')"):
        for reduction in ("mean", "none"):
            criterion = FORMS[name](impl="onchip", reduction=reduction)
            assert torch.autograd.gradcheck(lambda t, c=criterion: c(t, labels), a)
            assert torch.autograd.gradgradcheck(lambda t, c=criterion: c(t, labels), a)


def test_registered_op(chip):
    chip(3)
    x, labels = batch(6, 3, 2, torch.float64)
    spec = onchip.plan(
        MultiSimilarityLoss().row_formula(), x, None, reduction="mean", unit=True, distance="dot", penalty=False
    )
    torch.library.opcheck(torch.ops.flashpair.onchip, (x, labels, None, None, None, *spec, True, True, True, False))


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_fullgraph_compile(reduction, dynamic, chip):
    chip(6)
    criterion = MultiSimilarityLoss(impl="onchip", reduction=reduction)
    compiled = torch.compile(criterion, fullgraph=True, dynamic=dynamic)
    for n in (12, 13, 30):
        x, labels = batch(n, 5, 3, torch.float64)
        found = results(lambda impl: compiled, "onchip", x, labels)
        for f, t in zip(found, results(MultiSimilarityLoss, "reference", x, labels, reduction=reduction), strict=True):
            assert_same(f, t)


def test_refusals_say_why(chip):
    x, labels = batch(12, 5, 3, torch.float32)

    def refused(criterion, why, *arguments, **more):
        with pytest.raises(RuntimeError, match=why):
            criterion(*(arguments or (x, labels)), **more)

    chip(2)
    many, ids = batch(33, 5, 3, torch.float32)
    refused(MultiSimilarityLoss(impl="onchip"), r"N = 33 is over 32: 2 multiprocessors with 16 rows each", many, ids)
    y = many.requires_grad_()
    refused(MultiSimilarityLoss(impl="onchip"), r"N \+ M = 45 is over 32", x, labels, ref_emb=y, ref_labels=ids)
    chip(12, shared=200)
    refused(
        MultiSimilarityLoss(impl="onchip"),
        r"1 rows of 12 similarities and of D = 8 take 244 bytes",
        x[:11],
        labels[:11],
    )
    chip(12, cooperative=0)
    refused(MultiSimilarityLoss(impl="onchip"), "no cooperative launches")
    chip(12)
    learned = torch.nn.Parameter(torch.tensor(2.0))
    refused(MultiSimilarityLoss(alpha=learned, impl="onchip"), "numbers as hyper-parameters, not tensors")
    refused(NPairsLoss(l2_weight=0.1, reduction="none", impl="onchip"), "not to reduction='none'")
    refused(LiftedStructureLoss(impl="onchip"), "this criterion says none of them")
    with pytest.raises(RuntimeError, match="whole criteria, not row reductions"):
        row_reduce(x, labels, Reduction("max", "negatives"), impl="onchip")


def test_a_subclass_with_rows_of_its_own_is_not_its_parent(chip):
    chip(12)
    x, labels = batch(12, 5, 3, torch.float32)

    class Doubled(MultiSimilarityLoss):
        def row_losses(self, pairs):
            rows = super().row_losses(pairs)
            return rows._replace(losses=rows.losses * 2)

    with pytest.raises(RuntimeError, match="this criterion says none of them"):
        Doubled(impl="onchip")(x, labels)

    class Renamed(MultiSimilarityLoss):
        pass

    assert Renamed(impl="onchip")(x, labels) == MultiSimilarityLoss(impl="onchip")(x, labels)


@pytest.mark.parametrize("name", FORMS)
def test_formula_is_the_row_losses(name):
    """What each criterion says of itself to onchip, and the numbers in it, follow its attributes."""
    formula = FORMS[name]().row_formula()
    assert formula.name in onchip.FORMULAS
    assert (formula.epsilon is not None) == (getattr(FORMS[name](), "epsilon", None) is not None)


@pytest.mark.parametrize("rows", onchip.BLOCK_ROWS)
def test_python_and_cpp_agree_on_a_blocks_memory(rows, chip):
    chip(-(-50 // rows))
    for number, itemsize in ((0, 8), (1, 4)):
        launch = extension.onchip().Launch(
            0, 50, 50, 37, number, True, rows, 0, 0, True, False, False, False, -2.0, 50.0, 0.0, 0.0, 0.0, False
        )
        exact = onchip.Limits(-(-50 // rows), launch.shared, True)
        assert onchip.block_rows(50, 50, 37, itemsize, False, exact) == rows
        assert isinstance(onchip.block_rows(50, 50, 37, itemsize, False, exact._replace(shared=launch.shared - 1)), str)
        assert launch.blocks == exact.processors


def test_a_smaller_batch_leaves_room_for_a_larger_one(chip):
    """A kernel's shared memory is set once for all: 16 rows of 1,000 similarities take 80 KB, of 260 they take 21."""
    x, labels = batch(1000, 3, 4, torch.float32)
    chip(63)
    large = MultiSimilarityLoss(impl="onchip")(x, labels)
    chip(17)
    MultiSimilarityLoss(impl="onchip")(x[:260], labels[:260])
    chip(63)
    assert torch.equal(MultiSimilarityLoss(impl="onchip")(x, labels), large)


def test_largest_batch():
    h200 = onchip.Limits(132, 227 * 1024, True)
    assert onchip.largest_batch(128, h200) == 2112  # sixteen rows on each of 132 multiprocessors
    assert onchip.largest_batch(1024, h200) == 2080
    assert onchip.largest_batch(128, onchip.Limits(132, 99 * 1024, True)) == 1156
