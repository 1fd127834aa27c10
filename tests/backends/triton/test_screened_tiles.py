"""`screened` on the GPU, in Triton's interpreter: no pair that counts is lost, be it listed, dense or ruled out."""

from __future__ import annotations

import golden
import pytest
import torch
from helpers import CRITERIA, assert_as_good_as, assert_same, gradients

import flashpair
from flashpair import Bound, MultiSimilarityLoss, Reduction, row_reduce
from flashpair.core.call import compile_call, encode
from flashpair.core.class_pairs import ClassPairs
from flashpair.core.similarity import dense_pairs
from flashpair.engine.dispatch import interpreted
from flashpair.tools.check import value_and_gradient

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(
    not interpreted(), reason="there is a GPU: tests/backends/triton/test_gpu.py runs the kernels"
)

if interpreted():
    from flashpair.backends.triton.kernels import configs

    from flashpair.backends.triton import fused, launch, screened, screened_tiles, shared_top
    from flashpair.engine import row_reduce_op

MINED = ["MultiSimilarityLoss", "LiftedStructureStarLoss(epsilon=0.1)"]
ORACLE = golden.load()
SCREENABLE = [c for c in ORACLE["cases"] if c["loss"] in ("ms", "lifted_star_m")]


@pytest.fixture(autouse=True)
def tiles(monkeypatch):
    """Small ones, of several chunks of D, so that little batches have blocks of every kind; under the name of `fused`,
    which is what takes CPU tensors in the interpreter."""
    monkeypatch.setattr(row_reduce_op, "backend_module", lambda impl, device: screened)
    monkeypatch.setitem(configs.SCREENS, configs.INTERPRETER, configs.Screen(32, 32, 32, (4, 1)))
    monkeypatch.setattr(screened_tiles, "CROWDED", 8)
    monkeypatch.setattr(configs, "choose", lambda *_: configs.Config(32, 32, 32, 32, (4, 1), (4, 1)))


@pytest.fixture
def found(monkeypatch):
    """What each screen has found: candidates, dense blocks, and how many of those were known beforehand."""
    seen, find = [], screened_tiles.ScreenedTiles.find

    def spy(self, group, values):
        one = find(self, group, values)
        seen.append((int((one.keys != screened_tiles.LAST).sum()), int(one.dense.sum()), int(self.masked().sum())))
        return one

    monkeypatch.setattr(screened_tiles.ScreenedTiles, "find", spy)
    return seen


def _clusters(n, d, noise, dtype=torch.float64, per_class=4):
    generator = torch.Generator().manual_seed(n)
    labels = torch.arange(n) // per_class
    centres = torch.randn(n // per_class + 1, d, generator=generator, dtype=torch.float64)
    x = centres[labels] + noise * torch.randn(n, d, generator=generator, dtype=torch.float64)
    return torch.nn.functional.normalize(x).to(dtype), labels


def _compare(make, x, labels, refs=None, distance="dot", impl="fused"):
    """Rows and all gradients of the reductions that `make` returns with their learned inputs; -> the rows."""
    results = []
    for which in (impl, "reference"):
        a = x.clone().requires_grad_()
        b = None if refs is None else refs[0].clone().requires_grad_()
        more = {} if refs is None else {"ref_emb": b, "ref_labels": refs[1]}
        reductions, learned = make()
        rows = row_reduce(a, labels, *reductions, distance=distance, impl=which, **more)
        finite = tuple(torch.where(row.isfinite(), row, 0.0) for row in rows)
        inputs = [a, *([] if b is None else [b]), *learned]
        results.append([*(row.detach() for row in rows), *gradients(finite, inputs)])
    for f, t in zip(*results, strict=True):
        assert_same(f, t)
    return results[0][: len(reductions)]


def _criterion(name, x, labels, refs=()):
    results = []
    for impl in ("fused", "reference"):
        inputs = [t.clone().requires_grad_() for t in (x, *refs[:1])]
        more = {"ref_emb": inputs[1], "ref_labels": refs[1]} if refs else {}
        rows = CRITERIA[name](impl=impl, reduction="none")(inputs[0], labels, **more)
        results.append([rows.detach(), *gradients((rows,), inputs)])
    for f, t in zip(*results, strict=True):
        assert_same(f, t)


@pytest.mark.parametrize("name", MINED)
@pytest.mark.parametrize("n", [0, 1, 31, 32, 33, 64, 65, 130])
def test_edges_of_the_batch(n, name):
    x, labels = _clusters(n, 20, 0.1)
    _criterion(name, x, labels)


@pytest.mark.parametrize(("n", "m"), [(0, 40), (40, 0), (1, 100), (100, 1), (64, 96), (97, 130)])
def test_edges_of_references(n, m):
    (x, labels), (y, ref_labels) = _clusters(n, 20, 0.1), _clusters(m, 20, 0.1)
    _criterion("MultiSimilarityLoss", x, labels, (y, ref_labels))


@pytest.mark.parametrize("d", [1, 32, 33, 70])
def test_edges_of_the_width(d, found):
    x, labels = _clusters(130, d, 0.05)
    _compare(lambda: ([Reduction("sum", "negatives", lower=2.2 / d**0.5)], []), x, labels)
    assert d == 1 or 0 < found[0][0] < 130**2 // 10


def _every_form(x, labels, refs, distance):
    """One term of each kind of window, which leaves some of a hundred pairs; with learned scales and offsets."""
    (y, ref_labels), n = refs or (x, labels), x.shape[0]
    generator = torch.Generator().manual_seed(1)
    z = dense_pairs(x, y, distance)
    low, few, many, high = z[labels[:, None] != ref_labels].quantile(torch.tensor([0.02, 0.96, 0.98, 0.99]).double())
    scale = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)
    noise = 0.01 * torch.rand(n, generator=generator, dtype=torch.float64)
    above, below = ((1.3 * edge + noise).requires_grad_() for edge in (many, low))
    ref = torch.randn(y.shape[0], generator=generator, dtype=torch.float64, requires_grad=True)
    least = Reduction("min", "positives", detach=True)
    shift = (high - row_reduce(x, labels, least, distance=distance, impl="reference")[0].median()).item()
    terms = [
        least,
        Reduction("logsumexp", "negatives", scale=2 * scale, lower=Bound(least, shift)),
        Reduction("max", "negatives", lower=Bound(least, shift), detach=True),
        Reduction("max", "negatives"),
        Reduction("min", "negatives"),
        Reduction("sum", "negatives", "hinge", scale=scale, offset=-above),
        Reduction("sum", "negatives", "hinge", scale=-scale, offset=below),
        Reduction("sum", "negatives", "hinge", scale=-1.3, offset=below),
        Reduction("sum", "negatives", "softplus", scale=3.0, offset=above, lower=few.item(), upper=many.item()),
        Reduction("min", "negatives", lower=few.item(), upper=high.item()),
        Reduction("sum", "negatives", "lifted", scale=-0.1, offset=above, ref_offset=ref, lower=high.item()),
        Reduction("count", "negatives", upper=low.item()),
    ]
    return terms, [scale, above, below, ref]


@pytest.mark.parametrize(
    ("distance", "references", "room", "crowded"),
    [
        ("dot", False, 32, 8), ("dot", True, 1, 8), ("dot", False, 0, 8),
        ("euclidean", False, 1, 8), ("euclidean", True, 32, 30),
    ],
)  # fmt: skip
def test_every_form(distance, references, room, crowded, monkeypatch, found):
    """Blocks are ruled out, listed and dense side by side; with no room for candidates, this is `fused`."""
    monkeypatch.setattr(screened_tiles, "ROOM", room)
    monkeypatch.setattr(screened_tiles, "CROWDED", crowded)
    n, m = 128, 115 if references else 128
    x, labels = _clusters(n, 24, 0.2)
    refs = (x[:m] + 0.01, labels[:m]) if references else None
    _compare(lambda: _every_form(x, labels, refs, distance), x, labels, refs, distance)
    candidates, dense, masked = (sum(each) for each in zip(*found, strict=True))
    assert (candidates > 0) == (room > 0)
    assert dense > masked or (room, crowded) == (32, 8)


@pytest.mark.parametrize("spread", [0.0, torch.inf])
def test_one_exponential_for_both_ends_and_one_for_each(spread, monkeypatch, found):
    """Dense blocks are listed for the tiles of both kernels."""
    monkeypatch.setattr(shared_top, "SPREAD", dict.fromkeys(shared_top.SPREAD, spread))
    monkeypatch.setattr(screened_tiles, "CROWDED", 64)
    x, labels = _clusters(130, 20, 0.6)
    _criterion("MultiSimilarityLoss", x, labels)
    assert found[0][0] > 0 and found[0][1] > found[0][2]


@pytest.mark.parametrize("side", ["negatives", "all"])
def test_many_positives_splits_and_blocks_of_two_tiles(side, monkeypatch, found):
    """Of a block whose second tile is crowded, what the first one has listed is dropped."""
    monkeypatch.setattr(launch, "choose_splits", lambda *_: 3)
    monkeypatch.setitem(configs.SCREENS, configs.INTERPRETER, configs.Screen(64, 32, 32, (4, 1)))
    monkeypatch.setattr(screened_tiles, "CROWDED", 30)
    x, labels = _clusters(270, 6, 0.4, per_class=25)
    refs = (x[:200], labels[:200])
    for more in (None, refs):
        _compare(lambda: ([Reduction("sum", side, "softplus", lower=0.75)], []), x, labels, more)
    assert all(candidates > 0 and dense > masked for candidates, dense, masked in found)


def test_references_past_the_end_take_no_part():
    x, labels = _clusters(150, 8, 0.3)
    results = []
    for impl in ("fused", "reference"):
        a, k = x.clone().requires_grad_(), torch.arange(120)
        pairs = flashpair.make_pairs(a, labels, distance="euclidean", impl=impl)
        chosen = pairs.take_pairs(ClassPairs(k, k.flip(0), k, torch.tensor(70)))
        rows = chosen.reduce(Reduction("logsumexp", "negatives", upper=0.9), Reduction("min", "negatives"))
        finite = [torch.where(row.isfinite(), row, 0.0)[:70] for row in rows]
        results.append([*(f.detach() for f in finite), *torch.autograd.grad(sum(f.sum() for f in finite), a)])
    for f, t in zip(*results, strict=True):
        assert_same(f, t)


def _whole_numbers(dtype):
    """Similarities and squared distances that every precision holds exactly, and quantised rows do not."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randint(-300, 300, (130, 12), generator=generator).to(dtype)
    return x, torch.arange(130) // 2, x.double() @ x.double().T


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("sign", [1, -1])
def test_thresholds_within_an_ulp_of_pairs(sign, dtype, found):
    """Each row's window opens, or closes, right at one of its pairs: outside; and one rounding further: inside."""
    x, labels, s = _whole_numbers(dtype)
    s = torch.where(labels[:, None] == labels, -torch.inf, sign * s)
    edge, place = s.sort(1, descending=True).values[:, 3].to(dtype), torch.tensor(-torch.inf, dtype=dtype)
    for moved in (edge, torch.nextafter(edge, place)):
        word = {"lower": moved} if sign == 1 else {"upper": -moved}
        (rows,) = row_reduce(x, labels, Reduction("count", "negatives", **word), impl="fused")
        assert torch.equal(rows.double(), (s > moved.double()[:, None]).sum(1).double())
    assert 130 < found[0][0] < 130**2 // 10


@pytest.mark.parametrize("distance", ["dot", "euclidean"])
def test_without_the_bound_pairs_are_lost(distance, monkeypatch):
    x, labels, s = _whole_numbers(torch.float32)
    negative = labels[:, None] != labels
    z = s if distance == "dot" else -torch.cdist(x.double(), x.double())
    edge = torch.where(negative, z, -torch.inf).sort(1, descending=True).values[:, 3:5].mean(1).float()
    word = {"lower": edge} if distance == "dot" else {"upper": -edge}
    term = Reduction("count", "negatives", **word)

    def count():
        return row_reduce(x, labels, term, distance=distance, impl="fused")[0]

    assert torch.equal(count(), torch.full((130,), 4.0))
    quantise = screened_tiles.ScreenedTiles._quantise
    monkeypatch.setattr(
        screened_tiles.ScreenedTiles,
        "_quantise",
        lambda *a: (r := quantise(*a))._replace(error=torch.zeros_like(r.error)),
    )
    assert (count() < 4).any()


@pytest.mark.parametrize("distance", ["dot", "euclidean"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_rows_of_every_size(distance, dtype, found, monkeypatch):
    """Zero rows, huge and tiny ones, duplicates, one coordinate that leaves nothing of the others in int8."""
    x, labels = _clusters(160, 24, 0.3, dtype)
    factors = torch.tensor([0.0, 1e15, 1e-20, 1.0, 1e-6], dtype=dtype)
    x = x * factors[torch.arange(160) % 5 * (torch.arange(160) % 3 == 0)][:, None] + 0 * x
    x[40:50] = x[100]
    x[7, 3] = 1e3
    wide = x.double()
    z = wide @ wide.T if distance == "dot" else torch.cdist(wide, wide, compute_mode="donot_use_mm_for_euclid_dist")
    off = torch.where(labels[:, None] == labels, torch.inf, z if distance != "dot" else -z)
    edge = off.sort(1).values[:, 5:7].mean(1)
    word = {"lower": -edge} if distance == "dot" else {"upper": edge}
    terms = [Reduction("count", "negatives", **word), Reduction("max", "negatives"), Reduction("min", "negatives")]
    for t in terms:
        (f,) = row_reduce(x, labels, t, distance=distance, impl="fused")
        with monkeypatch.context() as all_pairs:
            all_pairs.setattr(row_reduce_op, "backend_module", lambda impl, device: fused)
            (e,) = row_reduce(x, labels, t, distance=distance, impl="fused")
        same = f == e
        if dtype == torch.float32:  # a pair at a threshold may fall on either side of it
            assert same.float().mean() > 0.9 and ((f - e).abs() <= 1e-5 * e.abs() + (t.op == "count") * 10)[~same].all()
        else:
            assert_same(f, e)


@pytest.mark.parametrize("window", [{"lower": -1e50}, {"upper": 1e50}, {"lower": 1e50}, {"upper": -1e50}], ids=str)
def test_windows_beyond_float32(window):
    """Where the screen, in float32, has no such number: nothing is ruled out on its account."""
    x, labels = _clusters(96, 8, 0.3)
    big = {name: torch.tensor(value, dtype=torch.float64) for name, value in window.items()}
    _compare(lambda: ([Reduction("count", "negatives", **big)], []), x * 1e26, labels)


@pytest.mark.parametrize("op", ["min", "max"])
@pytest.mark.parametrize("distance", ["dot", "euclidean"])
def test_equal_extremes_send_their_gradient_to_the_lowest_index(op, distance):
    x = torch.randn(100, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x = (16 * x).round() / 16  # exact products: the bits of the interpreter's, numpy's, hang on a block's shape
    x[20:90] = x[20].clone()
    x[[30, 70]] *= 3
    order = torch.randperm(100, generator=torch.Generator().manual_seed(1))
    _compare(lambda: ([Reduction(op, "negatives")], []), x[order], torch.arange(100)[order], distance=distance)


def test_nothing_is_alive_where_a_window_is_empty(found):
    """Rows without positives have an infinite threshold."""
    x, _ = _clusters(130, 24, 0.1)
    _criterion("MultiSimilarityLoss", x, torch.arange(130))
    assert found[0][0] == 0 and found[0][1] == found[0][2]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_shows_everywhere(bad):
    x, labels = _clusters(130, 24, 0.1)
    x[3, 1] = bad
    loss, grad = value_and_gradient(MultiSimilarityLoss(impl="fused", normalize=False), x, labels)
    assert loss.isnan() and grad.isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_as_accurate_as_dense_code_and_the_same_bits_every_time(dtype, found):
    x, labels = _clusters(160, 24, 0.4, dtype)
    truth = value_and_gradient(MultiSimilarityLoss(impl="reference", normalize=False), x.double(), labels)
    eager = value_and_gradient(MultiSimilarityLoss(impl="reference", normalize=False), x, labels)
    first, again = (value_and_gradient(MultiSimilarityLoss(impl="fused", normalize=False), x, labels) for _ in range(2))
    for f, a, e, t in zip(first, again, eager, truth, strict=True):
        assert torch.equal(f, a)
        assert_as_good_as(f, e, t)
    assert found[0][0] > 0


@pytest.mark.parametrize("want", [(True, False), (False, True)], ids=str)
def test_only_the_gradients_that_are_asked_for(want, found):
    x, labels = _clusters(100, 16, 0.3)
    grads = []
    for impl in ("fused", "reference"):
        a, b = x.clone().requires_grad_(want[0]), (x[:80] + 0.01).requires_grad_(want[1])
        MultiSimilarityLoss(impl=impl)(a, labels, ref_emb=b, ref_labels=labels[:80]).backward()
        assert (a.grad is not None, b.grad is not None) == want
        grads.append(a.grad if want[0] else b.grad)
    assert_same(*grads)
    assert found[0][0] > 0


@pytest.mark.parametrize("distance", ["dot", "euclidean"])
def test_gradcheck(distance, found):
    x, labels = _clusters(64, 3, 0.3)
    window = {"lower": 0.9} if distance == "dot" else {"upper": 0.3}

    def rows(x, scale, offset):
        terms = [Reduction("sum", "negatives", "softplus", scale=scale, offset=offset, **window)]
        terms.append(Reduction("logsumexp", "negatives", scale=-scale, **window))
        return [
            torch.where(r.isfinite(), r, 0.0)[:5]
            for r in row_reduce(x, labels, *terms, distance=distance, impl="fused")
        ]

    inputs = [torch.tensor(0.7, dtype=torch.float64), torch.linspace(-1, 1, 64, dtype=torch.float64)]
    assert torch.autograd.gradcheck(rows, [t.clone().requires_grad_() for t in (x, *inputs)], fast_mode=True)
    assert found[0][0] > 0


@pytest.mark.parametrize("case", SCREENABLE, ids=lambda c: f"{c['loss']}-{c['batch']}")
def test_golden_values_and_gradients(case):
    criterion = golden.criterion_for(case, ORACLE)
    criterion.impl = "fused"
    x, labels = golden.batch(case, ORACLE)
    loss = criterion(x.requires_grad_(), labels)
    loss.backward()
    assert abs(loss.item() - case["value"]) <= 1e-10
    assert (x.grad - golden.gradient(case)).abs().max().item() <= 1e-10


def test_fullgraph_compile():
    x, labels = _clusters(100, 16, 0.3)
    criterion = MultiSimilarityLoss(impl="fused")
    compiled = torch.compile(criterion, fullgraph=True, backend="aot_eager")
    found = value_and_gradient(compiled, x, labels)
    for f, t in zip(found, value_and_gradient(criterion, x, labels), strict=True):
        assert_same(f, t)


@pytest.mark.parametrize("keep", [False, True])
def test_opcheck(keep):
    x, labels = _clusters(100, 16, 0.3)
    plan = flashpair.core.label_order.make_label_order(labels)
    call = compile_call(flashpair.losses.mining._mined(2.0, 50.0, 0.1), "dot", "fused")
    arguments = (x, None, plan.lo, plan.hi, None, plan.ref_order, None, [], *encode(call), keep)
    torch.library.opcheck(torch.ops.flashpair.row_reduce, arguments, test_utils=("test_schema", "test_faketensor"))
    if keep:
        values, *kept = torch.ops.flashpair.row_reduce(*arguments)
        grads = [None, values[1].clone(), None, values[3].clone()]
        more = (*arguments[:-1], values, *kept, grads, [True, False, False, False, False])
        torch.library.opcheck(
            torch.ops.flashpair.row_reduce_backward, more, test_utils=("test_schema", "test_faketensor")
        )
