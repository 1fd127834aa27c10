"""Approximate instructions of tests/ptx are as wrong as the PTX ISA 9.1 lets them be, and never more."""

from __future__ import annotations

import numpy as np
import pytest
from ptx.small import run

COUNT = 1024
STEPS = {"div.approx": 2, "div.full": 2, "rcp.approx": 1, "ex2.approx": 2}  # from the correctly rounded result
SHARES = {"sqrt.approx": 2.0**-23, "rsqrt.approx": 2.0**-22.9, "lg2.approx": 2.0**-22}  # of the exact one
EXACT = {
    "div": lambda a, b: a / b, "rcp": lambda a, b: 1 / a, "ex2": lambda a, b: np.exp2(a), "sqrt": lambda a, b: a**0.5,
    "rsqrt": lambda a, b: a**-0.5, "lg2": lambda a, b: np.log2(a),
}  # fmt: skip


def executed(op, a, b):
    """float32 results of an instruction of operands a, or a and b, float32 (COUNT,)."""
    second = ", %r4" if op.startswith("div") else ""
    out = b.copy()
    run(
        f"ld.global.b32 %r2, [%d0];\nld.global.b32 %r4, [%d1];\n{op}.f32 %r3, %r2{second};\nst.global.b32 [%d1], %r3;",
        a.view(np.uint32), out.view(np.uint32), threads=len(a),
    )  # fmt: skip
    return out


def operands(low, high, seed):
    """Two float32 (COUNT,), of the exponents from low to high."""
    draw = np.random.default_rng(seed)
    return tuple((2.0 ** draw.uniform(low, high, COUNT)).astype(np.float32) for _ in range(2))


def steps(found, truth):
    """How many float32 lie between positive float32 and the float64 truth, rounded."""
    return found.view(np.int32).astype(np.int64) - truth.astype(np.float32).view(np.int32)


@pytest.mark.parametrize("ftz", ["", ".ftz"])
@pytest.mark.parametrize("op", STEPS)
def test_steps_from_the_rounded_result(op, ftz):
    family = op.partition(".")[0]
    a, b = operands(-6, 6, 1) if family == "ex2" else operands(-60, 60, 1)
    wrong = steps(executed(op + ftz, a, b), EXACT[family](a.astype(np.float64), b.astype(np.float64)))
    assert set(wrong) == set(range(-STEPS[op], STEPS[op] + 1))


@pytest.mark.parametrize("op", SHARES)
def test_a_share_of_the_exact_result(op):
    a, b = operands(-100, 100, 2)
    if op == "lg2.approx":
        a = a[(a <= 0.5) | (a >= 2)]
        b = b[: len(a)]
    truth = EXACT[op.partition(".")[0]](a.astype(np.float64), b.astype(np.float64))
    wrong = (executed(op, a, b) - truth) / np.abs(truth)
    assert 0.9 * SHARES[op] < wrong.max() <= SHARES[op]
    assert -0.9 * SHARES[op] > wrong.min() >= -SHARES[op]


def test_a_logarithm_near_one_is_bounded_absolutely():
    a = np.linspace(0.501, 1.999, COUNT).astype(np.float32)
    wrong = executed("lg2.approx", a, a) - np.log2(a.astype(np.float64))
    assert 0.9 * 2.0**-22 < wrong.max() <= 2.0**-22
    assert -0.9 * 2.0**-22 > wrong.min() >= -(2.0**-22)
    near_one = 1 + np.arange(1, 65, dtype=np.float32) * np.float32(2.0**-23)
    relative = executed("lg2.approx", near_one, near_one) / np.log2(near_one.astype(np.float64)) - 1
    assert np.abs(relative).max() > 0.1  # most digits are lost there


@pytest.mark.parametrize(
    ("op", "a", "b", "result"),
    [
        ("ex2.approx", 0.0, 1, 1.0), ("ex2.approx", -np.inf, 1, 0.0), ("ex2.approx", np.inf, 1, np.inf),
        ("ex2.approx.ftz", -127.5, 1, 0.0), ("lg2.approx", 0.0, 1, -np.inf), ("lg2.approx", -1.0, 1, np.nan),
        ("sqrt.approx", 0.0, 1, 0.0), ("sqrt.approx", np.inf, 1, np.inf), ("rsqrt.approx", 0.0, 1, np.inf),
        ("rcp.approx", np.inf, 1, 0.0), ("rcp.approx", 0.0, 1, np.inf), ("div.full", 1.0, np.inf, 0.0),
        ("div.approx", 2.0**120, 2.0**126.5, 0.0), ("div.approx", np.inf, 2.0**126.5, np.nan),
    ],
)  # fmt: skip
def test_special_operands(op, a, b, result):
    found = executed(op, np.full(32, a, np.float32), np.full(32, b, np.float32))
    assert np.array_equal(found, np.full(32, result, np.float32), equal_nan=True)


def test_an_exact_form_is_exact():
    a, b = operands(-60, 60, 3)
    assert np.array_equal(executed("div.rn", a, b), a / b)
    assert np.array_equal(executed("sqrt.rn", a, b), np.sqrt(a))
    assert np.array_equal(executed("rcp.rn", a, b), 1 / a)


def test_a_reciprocal_of_an_upper_word():
    """rcp.approx.ftz.f64 reads the upper word of its operand, and writes one; the rest of both is dropped."""
    a = 2.0 ** np.random.default_rng(4).uniform(-300, 300, 64)
    out = np.zeros(64)
    body = "mul.wide.u32 %d3, %r0, 4;\nadd.s64 %d0, %d0, %d3;\nadd.s64 %d1, %d1, %d3;\n"
    run(body + "ld.global.b64 %d4, [%d0];\nrcp.approx.ftz.f64 %d5, %d4;\nst.global.b64 [%d1], %d5;", a, out)
    assert not (out.view(np.uint64) & np.uint64(2**32 - 1)).any()
    assert 2.0**-21 < np.abs(out * a - 1).max() < 2.0**-18
