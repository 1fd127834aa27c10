"""Transforms of one's own: every operation that can be taken apart into steps, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import needs_extension
from helpers import assert_as_good_as, assert_same, batch, gradients

import flashpair
from flashpair import Reduction, register_transform, row_reduce
from flashpair.core import expression
from flashpair.core.transforms import custom
from flashpair.engine.dispatch import interpreted

needs_interpreter = pytest.mark.skipif(
    not interpreted(), reason="there is a GPU: tests/backends/triton/test_gpu.py runs the kernels"
)
F = torch.nn.functional

# Functions of t, by the operations of programs.KNOWN that they are there for. t is about -3 to 3.
ONE = {
    "add subtract": lambda t: torch.add(t, 2, alpha=3) - torch.sub(t, 1.5) + (1 - t),
    "multiply": lambda t: t * t * 0.5 * t,
    "divide": lambda t: t / (9 + t) + 1 / (8 + t),
    "negate exp": lambda t: (-t).exp() + torch.exp(t / 2),
    "log": lambda t: torch.log(t * t + 1),
    "log1p": lambda t: torch.log1p(t.square()),
    "sqrt": lambda t: torch.sqrt(t * t + 0.5),
    "sigmoid": lambda t: t.sigmoid() * torch.sigmoid(-2 * t),
    "tanh": torch.tanh,
    "expm1": lambda t: torch.expm1(t / 3),
    "softplus": lambda t: F.softplus(t) + F.softplus(t, beta=3, threshold=40),
    "relu": lambda t: F.relu(t) + (t - 1).relu().square(),
    "abs": lambda t: t.abs() + torch.absolute(t - 0.3),
    "maximum minimum": lambda t: torch.maximum(t, t * t) + torch.minimum(t + 1, 2 * t),
    "clamp": lambda t: t.clamp(-1, 2) + torch.clamp(t, min=0.5) * t.clamp(max=1.0),
    "where gt lt": lambda t: torch.where(t > 0.3, t * t, 2 * t) + torch.where(t < -0.5, t.exp(), 0.0 * t),
    "ge le": lambda t: (t >= 0.7) * t + torch.where(t <= 0.1, t, 3 * t),
    "detach": lambda t: t.relu().detach() * (t - 0.5),
    "reciprocal": lambda t: (t * t + 2).reciprocal(),
    "pow": lambda t: t**3 + (t * t + 1) ** 0.5 + t.pow(2),
}
TWO = {  # of scale * z and the offset, which do not come in as their sum
    "product": lambda s, own: s * own + s.square() / (1 + own * own),
    "slack": lambda s, own: F.softplus(own - 2 * s, threshold=100),
    "larger": lambda s, own: torch.maximum(s, own) - torch.where(own > 0, s, 2 * s),
}
FUNCTIONS = {**ONE, **TWO}
# not what autograd takes for the derivative of the value
CONSTANT = ("detach",)


@pytest.fixture
def name(request):
    """A function of FUNCTIONS as a transform: its name there, with a word of its own for the engine."""
    register_transform("under_test", FUNCTIONS[request.param])
    return request.param


every = pytest.mark.parametrize("name", FUNCTIONS, indirect=True)


def _inputs(n, m, dtype):
    """Embeddings, references, and an offset for each anchor."""
    x, labels = batch(n, 5, 4, dtype)
    y, ref_labels = batch(m, 5, 3, dtype, seed=1)
    offset = torch.randn(n, generator=torch.Generator().manual_seed(5), dtype=torch.float64).to(dtype)
    return F.normalize(x), labels, F.normalize(y), ref_labels, offset


def _results(impl, n, m, dtype, side="all"):
    """Sums over a square batch and over references, and gradients in all that is differentiable."""
    x, labels, y, ref_labels, offset = _inputs(n, m, dtype)
    inputs = [t.requires_grad_() for t in (x, y, offset, torch.tensor(2.0, dtype=dtype))]
    r = Reduction("sum", side, "under_test", scale=inputs[3], offset=offset)
    rows = (
        *row_reduce(x, labels, r, impl=impl),
        *row_reduce(x, labels, r, ref_emb=y, ref_labels=ref_labels, impl=impl),
    )
    return [*(row.detach() for row in rows), *gradients(rows, inputs)]


def test_the_table_has_every_operation():
    covered = {word for name in ONE for word in name.split()}
    covered |= {"square"}
    assert covered == set(expression.KNOWN)


@needs_extension
@every
def test_tiles_equal_the_reference(name):
    for found, truth in zip(_results("tiled", 300, 290, torch.float64), _results("reference", 300, 290, torch.float64),
                            strict=True):  # fmt: skip
        assert_same(found, truth)


@needs_extension
@every
def test_float32_is_as_good_as_dense_code(name):
    truth = _results("reference", 150, 140, torch.float64)
    exact = _inputs(150, 140, torch.float64)
    rounded = _inputs(150, 140, torch.float32)
    assert all((a.double() - b.double()).abs().max() < 1e-6 for a, b in zip(exact, rounded, strict=True))
    found, eager = (_results(impl, 150, 140, torch.float32) for impl in ("tiled", "reference"))
    for f, e, t in zip(found[:-1], eager, truth, strict=False):  # the scale's: one number, luck
        assert f.dtype == torch.float32
        assert_as_good_as(f, e, t)


@needs_extension
@every
def test_derivatives_are_those_of_finite_differences(name):
    x, labels, *_, offset = _inputs(7, 6, torch.float64)

    def rows(x, offset):
        return row_reduce(x, labels, Reduction("sum", "all", "under_test", scale=1.7, offset=offset), impl="tiled")[0]

    inputs = [t.requires_grad_() for t in (x, offset)]
    if name in CONSTANT:
        assert not torch.autograd.gradcheck(rows, inputs, raise_exception=False)
        return
    assert torch.autograd.gradcheck(rows, inputs)
    assert torch.autograd.gradgradcheck(rows, inputs)


@needs_extension
@pytest.mark.parametrize("name", ["relu", "softplus", "sqrt", "detach", "maximum minimum"], indirect=True)
def test_logsumexp_of_a_transform(name):
    x, labels, y, ref_labels, _ = _inputs(90, 80, torch.float64)
    r = Reduction("logsumexp", "negatives", "under_test", scale=2.0, offset=-0.3)
    results = []
    for impl in ("tiled", "reference"):
        inputs = [t.clone().requires_grad_() for t in (x, y)]
        rows = (
            *row_reduce(inputs[0], labels, r, impl=impl),
            *row_reduce(inputs[0], labels, r, ref_emb=inputs[1], ref_labels=ref_labels, impl=impl),
        )
        results.append([*(row.detach() for row in rows), *gradients(rows, inputs)])
    for found, truth in zip(*results, strict=True):
        assert_same(found, truth)


@needs_extension
@pytest.mark.parametrize("name", ["maximum minimum", "abs", "relu", "clamp", "where gt lt", "ge le"], indirect=True)
def test_derivatives_at_ties_and_corners_are_autograds(name):
    """Products of exactly the values at which both sides of a function meet."""
    corners = torch.tensor([-1.0, -0.5, 0.0, 0.1, 0.3, 0.5, 0.7, 1.0, 2.0], dtype=torch.float64)
    results = []
    for impl in ("tiled", "reference"):
        x = torch.ones(1, 1, dtype=torch.float64)
        y = corners[:, None].clone().requires_grad_()
        r = Reduction("sum", "negatives", "under_test")
        (row,) = row_reduce(x, torch.tensor([0]), r, ref_emb=y, ref_labels=torch.arange(1, 10), impl=impl)
        results.append([row.detach(), torch.autograd.grad(row.sum(), y)[0]])
    for found, truth in zip(*results, strict=True):
        assert_same(found, truth)


@needs_extension
def test_infinities_are_those_of_dense_code():
    """e^t of an anchor with itself is inf here, and no part of any sum; of some pairs it is inf, too."""
    register_transform("under_test", torch.exp)
    x, labels = batch(40, 16, 4, torch.float32)
    x = x * torch.tensor(12.0)
    x[1::2] *= -1e-3
    results = []
    for impl in ("tiled", "reference"):
        a = x.clone().requires_grad_()
        (rows,) = row_reduce(a, labels, Reduction("sum", "negatives", "under_test", scale=0.1), impl=impl)
        finite = rows.isfinite()
        results.append([finite, rows.detach().isnan(), *gradients((torch.where(finite, rows, 0.0),), [a])])
    assert results[0][0].any() and not results[0][0].all()
    assert all(torch.equal(found, truth) for found, truth in zip(results[0][:2], results[1][:2], strict=True))
    assert torch.equal(results[0][2].isnan(), results[1][2].isnan())


@needs_interpreter
@every
def test_generated_kernels_equal_the_reference(name):
    for found, truth in zip(_results("fused", 20, 18, torch.float64, "negatives"),
                            _results("reference", 20, 18, torch.float64, "negatives"), strict=True):  # fmt: skip
        assert_same(found, truth)


def _long(t):
    for k in range(60):
        t = t + (t * (k + 2)).exp()
    return t


REFUSED = {
    "an unknown operation": (torch.sin, "it uses sin, which is not one of add, subtract"),
    "control flow": (lambda t: t.abs() if (t == t).all() else t, "it cannot be traced: .*control flow"),
    "too many steps": (_long, "it takes [0-9]+ steps, of at most 96"),
    "a broken power": (lambda t: (t * t + 1) ** 1.3, "a power of 1.3"),
    "another threshold": (lambda t: F.softplus(t, threshold=5), "softplus with threshold 5"),
    "a limit of the pair's": (lambda t: t.clamp(max=t * t), "clamp with a limit that depends on the pair"),
}


@pytest.mark.parametrize("what", REFUSED)
@pytest.mark.parametrize("impl", [pytest.param("tiled", marks=needs_extension),
                                  pytest.param("fused", marks=needs_interpreter)])  # fmt: skip
def test_what_has_no_steps_is_refused_with_its_reason(what, impl):
    dense, reason = REFUSED[what]
    register_transform("refused", dense)
    x, labels = batch(20, 5, 4, torch.float64)
    with pytest.raises(RuntimeError, match=f"'{impl}' cannot run: transform 'refused' has no fused form: .*{reason}"):
        row_reduce(x, labels, Reduction("sum", "negatives", "refused"), impl=impl)


@pytest.mark.parametrize("what", REFUSED)
def test_auto_takes_the_reference_for_it(what):
    register_transform("refused", REFUSED[what][0])
    x, labels = batch(20, 5, 4, torch.float64)
    results = []
    for impl in ("auto", "reference"):
        a = x.clone().requires_grad_()
        (rows,) = row_reduce(a, labels, Reduction("sum", "negatives", "refused", scale=0.01), impl=impl)
        results.append([rows.detach(), *gradients((rows,), [a])])
    for found, truth in zip(*results, strict=True):
        assert_same(found, truth)


@pytest.mark.parametrize(
    "dense, error, words",
    [
        (lambda t: t if t.sum() > 0 else -t, ValueError, "must be elementwise"),
        (lambda t: t.sort().values, ValueError, "must be elementwise"),
        (lambda t: t.softmax(-1), ValueError, "must be elementwise"),
        (lambda t: t + torch.rand_like(t), ValueError, "must be elementwise"),
        (lambda t: torch.cumsum(t, 0), ValueError, "must be elementwise"),
        (lambda s, own: s.cumsum(0) + own, ValueError, "must be elementwise"),
        (lambda t: t.sin_(), ValueError, "must not change its argument in place"),
        (lambda t: t.sum(), TypeError, r"must return a tensor like t, float64 \(2, 3\) on cpu, got float64 \(\)"),
        (lambda t: None, TypeError, "must return a tensor like t, .* got NoneType"),
        (lambda t: 3.0, TypeError, "must return a tensor like t, .* got float 3.0"),
        (lambda t: torch.sin(t) > 0, TypeError, r"must return a tensor like t, .* got bool \(2, 3\)"),
        (lambda t: t.half(), TypeError, r"must return a tensor like t, .* got float16 \(2, 3\)"),
        (lambda t: t.to("meta"), TypeError, "must return a tensor like t, .* on meta"),
        (lambda: 1.0, TypeError, "must be a function of t, or of scale \\* z and the offset, got one with 0 arguments"),
        (lambda a, b, c: a, TypeError, "got one with 3 arguments"),
    ],
)
def test_what_is_no_function_of_one_number_is_refused(dense, error, words):
    with pytest.raises(error, match=words):
        register_transform("refused", dense)


def test_what_a_function_returns_is_looked_at_in_a_call_too():
    register_transform("refused", lambda t: torch.sin(t).double())
    x, labels = batch(20, 5, 4, torch.float32)
    with pytest.raises(TypeError, match=r"must return a tensor like t, float32 \(20, 20\) on cpu, got float64"):
        row_reduce(x, labels, Reduction("sum", "negatives", "refused"))


def test_registering_again_replaces():
    x, labels = batch(20, 5, 4, torch.float64)
    found = []
    for dense in (torch.tanh, torch.sigmoid):
        register_transform("under_test", dense)
        found.append(row_reduce(x, labels, Reduction("sum", "all", "under_test"))[0])
    z = (x @ x.T).sigmoid()
    assert_same(found[1], z.sum(1) - z.diagonal())
    assert not torch.equal(*found)


def test_steps_are_not_repeated_and_constants_are_worked_out():
    register_transform("under_test", lambda t: t * t + (t * t + 2 * 3) * 0 + 1)
    p = custom("under_test").program
    assert [step.op for step in p.steps].count("multiply") <= 2, "t^2, and 2 t for its derivative at the most"


def test_triton_can_tell_generated_functions_apart():
    """It knows the functions that a kernel calls by their names."""
    pytest.importorskip("triton")
    from flashpair.backends.triton.codegen import functions

    register_transform("one", lambda t: t * t)
    register_transform("other", lambda t: t * t * t)
    register_transform("wrapped", lambda t: t * t, value=lambda t: t * t, slope=lambda t: 2.0 * t)
    names = [f.__name__ for name in ("one", "other", "wrapped") for f in functions(custom(name))]
    assert len(set(names)) == 6


class TestJitFunctions:
    """`value` and `slope` of one's own in Triton."""

    @pytest.fixture(autouse=True)
    def registered(self):
        own_transform = pytest.importorskip("own_transform")
        register_transform("log_cosh", own_transform.dense, value=own_transform.value, slope=own_transform.slope)
        self.functions = own_transform

    def _rows(self, x, labels, impl, transform="log_cosh"):
        r = Reduction("sum", "negatives", transform, scale=1.5, offset=-0.2)
        return row_reduce(x, labels, r, impl=impl)[0]

    @pytest.mark.parametrize("impl", [pytest.param("fused", marks=needs_interpreter),
                                      pytest.param("tiled", marks=needs_extension), "auto"])  # fmt: skip
    def test_equals_the_reference(self, impl):
        x, labels = batch(50, 5, 4, torch.float64)
        results = []
        for which in (impl, "reference"):
            a = x.clone().requires_grad_()
            rows = self._rows(a, labels, which)
            results.append([rows.detach(), *gradients((rows,), [a])])
        for found, truth in zip(*results, strict=True):
            assert_same(found, truth)

    @needs_interpreter
    def test_may_overflow_where_there_is_no_pair(self):
        register_transform("grow", torch.exp, value=self.functions.grow, slope=self.functions.grow)
        x, labels = batch(40, 16, 4, torch.float32)
        x = x * torch.tensor(12.0)
        x[1::2] *= -1e-3
        results = []
        for impl in ("fused", "reference"):
            a = x.clone().requires_grad_()
            r = Reduction("sum", "negatives", "grow", scale=1e-2)
            rows = row_reduce(a, labels, r, impl=impl)[0]
            finite = rows.isfinite()
            results.append([finite, *gradients((torch.where(finite, rows, 0.0),), [a])])
        assert torch.equal(results[0][0], results[1][0])
        assert torch.equal(results[0][1].isnan(), results[1][1].isnan())

    def test_bad_registrations(self):
        own = self.functions
        with pytest.raises(ValueError, match="'hinge' is a built-in transform"):
            register_transform("hinge", own.dense)
        with pytest.raises(TypeError, match="name must be an identifier"):
            register_transform("log cosh", own.dense)
        with pytest.raises(TypeError, match="dense must be callable"):
            register_transform("own", None)
        with pytest.raises(ValueError, match="value and slope must be given together"):
            register_transform("own", own.dense, value=own.value)


@needs_extension
def test_a_criterions_transforms_are_kept_by_their_numbers():
    """Two losses with other numbers do not take each other's transform."""
    x, labels = batch(40, 6, 4, torch.float64)
    for margin in (5.0, 20.0, 5.0):
        found, truth = (flashpair.TupletMarginLoss(margin, impl=impl)(x, labels) for impl in ("tiled", "reference"))
        assert_same(found, truth)
        s = F.normalize(x) @ F.normalize(x).T
        same = labels[:, None] == labels
        neg = (64 * s).masked_fill(same, -math.inf).logsumexp(1, keepdim=True)
        theta = torch.acos(s.clamp(-1, 1)) - math.radians(margin)
        pairs = torch.logaddexp(torch.zeros_like(s), neg - 64 * theta.cos())
        assert_same(truth, pairs[same & ~torch.eye(40).bool()].mean())
