"""Triton's jit functions of a user's transform: generated from its steps (core/expression.py), or the user's own."""

from __future__ import annotations

import hashlib
import itertools
import linecache
import math
from typing import Any

from ...core.expression import Expression
from ...core.transforms import CustomTransform

_TRITON = {
    "scaled": "s", "own": "offset", "add": "{a} + {b}", "subtract": "{a} - {b}", "multiply": "{a} * {b}",
    "divide": "{a} / {b}", "maximum": "tl.maximum({a}, {b}, propagate_nan=tl.PropagateNan.ALL)",
    "minimum": "tl.minimum({a}, {b}, propagate_nan=tl.PropagateNan.ALL)", "negate": "-{a}", "expm1": "expm1({a})",
    "exp": "tl.exp({a})", "log": "tl.log({a})", "log1p": "log1p({a})", "sqrt": "tl.sqrt({a})",
    "softplus": "softplus({a}, zero)", "sigmoid": "logistic({a})", "absolute": "tl.abs({a})",
    "above": "tl.where({a} > {b}, 1.0, 0.0).to(s.dtype)", "choose": "tl.where({c} > 0.0, {a}, {b})",
}  # fmt: skip


def triton_source(p: Expression) -> str:
    """`value` and `slope` of a program as jit functions of kernels/transforms.py's kind."""

    def lines(count: int) -> list[str]:
        found = ["    zero = tl.zeros(s.shape, s.dtype)"]
        for k, step in enumerate(p.steps[:count]):
            if step.op == "constant":
                form = (
                    f"zero + {step.constant!r}" if math.isfinite(step.constant) else f'zero + float("{step.constant}")'
                )
            else:
                form = _TRITON[step.op].format(a=f"n{step.a}", b=f"n{step.b}", c=f"n{step.c}")
            found.append(f"    n{k} = {form}")
        return found

    head = "@triton.jit\ndef {}_TAG(s, offset):\n"
    value = head.format("value") + "\n".join([*lines(p.value + 1), f"    return n{p.value} + zero\n"])
    ends = f"    return n{p.value} + zero, n{p.slope} + zero, n{p.d_offset} + zero\n"
    return value + "\n\n" + head.format("slope") + "\n".join([*lines(len(p.steps)), ends])


_WRAPPED = """
@triton.jit
def value_TAG(s, offset):
    return users_value(s + offset)


@triton.jit
def slope_TAG(s, offset):
    t = s + offset
    g = users_slope(t)
    return users_value(t), g, g
"""


def jit(source: str, tag: str = "", **names: Any) -> tuple[Any, Any]:
    """The two jit functions of some source, which Triton finds where Python's tracebacks look for it.

    Triton knows the functions of a kernel by their names, so that two transforms must not share any. tag: what tells
    theirs apart; by default the source.
    """
    import triton
    import triton.language as tl

    from .kernels import transforms

    tag = tag or hashlib.sha256(source.encode()).hexdigest()[:12]
    source, where = source.replace("TAG", tag), f"<flashpair transform {tag}>"
    linecache.cache[where] = (len(source), None, source.splitlines(keepends=True), where)
    scope = {**{name: getattr(transforms, name) for name in ("expm1", "log1p", "logistic", "softplus")}, **names}
    scope |= {"triton": triton, "tl": tl, "__name__": __name__}
    exec(compile(source, where, "exec"), scope)
    return scope[f"value_{tag}"], scope[f"slope_{tag}"]


_wrapped = itertools.count()


def wrapped(value: Any, slope: Any) -> tuple[Any, Any]:
    """A user's value(t) and slope(t) as functions of s and offset."""
    return jit(_WRAPPED, f"users_{next(_wrapped)}", users_value=value, users_slope=slope)


def functions(transform: CustomTransform) -> tuple[Any, Any]:
    """Jit functions of (scale * z, offset): phi, and its two derivatives; made once a transform."""
    if "triton" not in transform.compiled:
        if transform.value is not None:
            transform.compiled["triton"] = wrapped(transform.value, transform.slope)
        else:
            assert not isinstance(transform.program, str)
            transform.compiled["triton"] = jit(triton_source(transform.program))
    return transform.compiled["triton"]
