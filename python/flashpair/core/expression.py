"""A user's transform as a list of steps, traced from its PyTorch code.

The C++ kernels run the steps on vectors of pairs, and Triton kernels are generated from them. The derivatives are steps
of the same list, made by forward differentiation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, fx

OPS = (
    "scaled", "own", "constant", "add", "subtract", "multiply", "divide", "maximum", "minimum", "negate", "exp", "log",
    "log1p", "sqrt", "softplus", "sigmoid", "absolute", "above", "choose",
    "expm1",
)  # fmt: skip
"""The operations of a step, in the order of StepOp in csrc/cpu/types.h. ``"scaled"`` is s, ``"own"`` the offset."""
MOST_STEPS = 96  # that an expression may have


class Step(NamedTuple):
    """One operation on the results of earlier steps, of which a, b and c are the numbers.

    ``"choose"`` is a where c > 0, else b. ``"above"`` is 1 where a > b, else 0.
    """

    op: str
    a: int = 0
    b: int = 0
    c: int = 0
    constant: float = 0.0


class Expression(NamedTuple):
    """A transform phi(s, offset) of s = scale * z, and its derivatives.

    Attributes:
        steps: all steps, each after those that it uses.
        value: the number of the step that is phi.
        slope: the number of the step that is phi's derivative in s.
        d_offset: the number of the step that is phi's derivative in the offset.
    """

    steps: tuple[Step, ...]
    value: int
    slope: int
    d_offset: int


class _Unknown(Exception):
    """A function uses something that cannot be written as steps."""


class _Writer:
    """Appends steps. It writes equal steps once, and computes steps of constants beforehand."""

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self.places: dict[Step, int] = {}

    def put(self, op: str, a: int = 0, b: int = 0, c: int = 0, constant: float = 0.0) -> int:
        """The number of a step, which is appended if there is none like it yet."""
        step = Step(op, a, b, c, constant)
        if step not in self.places:
            self.places[step] = len(self.steps)
            self.steps.append(step)
        return self.places[step]

    def number(self, value: float) -> int:
        """The number of the step that is a constant."""
        return self.put("constant", constant=float(value))

    def known(self, place: int) -> float | None:
        """The value of a step that is a constant; None for other steps."""
        return self.steps[place].constant if self.steps[place].op == "constant" else None

    def add(self, a: int, b: int) -> int:
        x, y = self.known(a), self.known(b)
        if x is not None and y is not None:
            return self.number(x + y)
        return b if x == 0 else a if y == 0 else self.put("add", a, b)

    def subtract(self, a: int, b: int) -> int:
        x, y = self.known(a), self.known(b)
        if x is not None and y is not None:
            return self.number(x - y)
        return self.negate(b) if x == 0 else a if y == 0 else self.put("subtract", a, b)

    def multiply(self, a: int, b: int) -> int:
        x, y = self.known(a), self.known(b)
        if x is not None and y is not None:
            return self.number(x * y)
        if x == 0 or y == 0:
            return self.number(0.0)
        return b if x == 1 else a if y == 1 else self.put("multiply", a, b)

    def divide(self, a: int, b: int) -> int:
        x, y = self.known(a), self.known(b)
        if x is not None and y:
            return self.number(x / y)
        return self.number(0.0) if x == 0 else a if y == 1 else self.put("divide", a, b)

    def negate(self, a: int) -> int:
        x = self.known(a)
        return self.put("negate", a) if x is None else self.number(-x)

    def choose(self, condition: int, a: int, b: int) -> int:
        return a if a == b else self.put("choose", a, b, condition)


class _Dual(NamedTuple):
    """A step, and the steps of its derivatives in s (`by_scaled`) and in the offset (`by_offset`)."""

    value: int
    by_scaled: int
    by_offset: int


class _Truth(_Dual):
    """The step of a comparison, 0 or 1. In PyTorch it is a bool, whose arithmetic differs (a sum of two is "or")."""


class _Tracer:
    """Turns the calls in a function's graph into steps, by a method for each function of PyTorch in `KNOWN`."""

    def __init__(self) -> None:
        self.w = _Writer()
        self.zero, self.one = self.w.number(0.0), self.w.number(1.0)

    def dual(self, value: Any) -> _Dual:
        """A number as a step without derivatives; a step as it is."""
        if isinstance(value, _Dual):
            return value
        if isinstance(value, (int, float)):
            return _Dual(self.w.number(value), self.zero, self.zero)
        raise _Unknown(f"a value of type {type(value).__name__}")

    def chain(self, value: int, slope: int, x: _Dual) -> _Dual:
        return _Dual(value, self.w.multiply(slope, x.by_scaled), self.w.multiply(slope, x.by_offset))

    def binary(self, value: int, x: _Dual, y: _Dual, join: Callable[[int, int], int]) -> _Dual:
        return _Dual(value, join(x.by_scaled, y.by_scaled), join(x.by_offset, y.by_offset))

    def constant(self, value: int) -> _Dual:
        return _Dual(value, self.zero, self.zero)

    def add(self, x: Any, y: Any, alpha: float = 1) -> _Dual:
        x, y = self.dual(x), self.multiply(y, alpha) if alpha != 1 else self.dual(y)
        return self.binary(self.w.add(x.value, y.value), x, y, self.w.add)

    def subtract(self, x: Any, y: Any, alpha: float = 1) -> _Dual:
        x, y = self.dual(x), self.multiply(y, alpha) if alpha != 1 else self.dual(y)
        return self.binary(self.w.subtract(x.value, y.value), x, y, self.w.subtract)

    def multiply(self, x: Any, y: Any) -> _Dual:
        x, y = self.dual(x), self.dual(y)
        w = self.w
        return self.binary(
            w.multiply(x.value, y.value), x, y, lambda dx, dy: w.add(w.multiply(dx, y.value), w.multiply(x.value, dy))
        )

    def divide(self, x: Any, y: Any) -> _Dual:
        x, y = self.dual(x), self.dual(y)
        w, value = self.w, self.w.divide(x.value, y.value)
        return self.binary(value, x, y, lambda dx, dy: w.divide(w.subtract(dx, w.multiply(value, dy)), y.value))

    def negate(self, x: _Dual) -> _Dual:
        return self.subtract(0.0, x)

    def exp(self, x: _Dual) -> _Dual:
        value = self.w.put("exp", x.value)
        return self.chain(value, value, x)

    def log(self, x: _Dual) -> _Dual:
        return self.chain(self.w.put("log", x.value), self.w.divide(self.one, x.value), x)

    def log1p(self, x: _Dual) -> _Dual:
        return self.chain(self.w.put("log1p", x.value), self.w.divide(self.one, self.w.add(self.one, x.value)), x)

    def sqrt(self, x: _Dual) -> _Dual:
        value = self.w.put("sqrt", x.value)
        return self.chain(value, self.w.divide(self.w.number(0.5), value), x)

    def sigmoid(self, x: _Dual) -> _Dual:
        value = self.w.put("sigmoid", x.value)
        return self.chain(value, self.w.multiply(value, self.w.subtract(self.one, value)), x)

    def expm1(self, x: _Dual) -> _Dual:
        value = self.w.put("expm1", x.value)
        return self.chain(value, self.w.add(value, self.one), x)

    def tanh(self, x: _Dual) -> _Dual:
        w, low = self.w, self.expm1(self.multiply(-2.0, self.abs(x)))
        size = w.divide(w.negate(low.value), w.add(low.value, w.number(2.0)))
        value = w.choose(w.put("above", self.zero, x.value), w.negate(size), size)
        return self.chain(value, w.subtract(self.one, w.multiply(value, value)), x)

    def softplus(self, x: _Dual, beta: float = 1, threshold: float = 20) -> _Dual:
        """torch's softplus is linear past its threshold. The true softplus differs from that by 2e-9 at 20."""
        x = self.multiply(beta, x)
        soft = self.chain(self.w.put("softplus", x.value), self.w.put("sigmoid", x.value), x)
        if threshold < 20:
            raise _Unknown(f"softplus with threshold {threshold}")
        return self.divide(soft, beta)

    def relu(self, x: _Dual, inplace: bool = False) -> _Dual:
        if inplace:
            raise _Unknown("relu in place")
        above = self.w.put("above", x.value, self.zero)
        value = self.w.put("maximum", x.value, self.zero)
        return _Dual(value, self.w.choose(above, x.by_scaled, self.zero), self.w.choose(above, x.by_offset, self.zero))

    def abs(self, x: _Dual) -> _Dual:
        w = self.w
        sign = w.subtract(w.put("above", x.value, self.zero), w.put("above", self.zero, x.value))
        return self.chain(w.put("absolute", x.value), sign, x)

    def maximum(self, x: Any, y: Any) -> _Dual:
        x, y = self.dual(x), self.dual(y)
        return self._larger(
            "maximum", x, y, self.w.put("above", x.value, y.value), self.w.put("above", y.value, x.value)
        )

    def minimum(self, x: Any, y: Any) -> _Dual:
        x, y = self.dual(x), self.dual(y)
        return self._larger(
            "minimum", x, y, self.w.put("above", y.value, x.value), self.w.put("above", x.value, y.value)
        )

    def _larger(self, op: str, x: _Dual, y: _Dual, first: int, second: int) -> _Dual:
        """Where x and y are equal, each gets half of the derivative, as in PyTorch."""
        w = self.w

        def join(dx: int, dy: int) -> int:
            half = w.multiply(w.number(0.5), w.add(dx, dy))
            return w.choose(first, dx, w.choose(second, dy, half))

        return self.binary(w.put(op, x.value, y.value), x, y, join)

    def clamp(self, x: _Dual, min: Any = None, max: Any = None) -> _Dual:
        for limit, op in ((min, "maximum"), (max, "minimum")):
            if limit is None:
                continue
            bound = self.dual(limit)
            if (bound.by_scaled, bound.by_offset) != (self.zero, self.zero):
                raise _Unknown("clamp with a limit that depends on the pair")
            outside = self.w.put("above", *((bound.value, x.value) if op == "maximum" else (x.value, bound.value)))
            derivatives = [self.w.choose(outside, self.zero, d) for d in (x.by_scaled, x.by_offset)]
            x = _Dual(self.w.put(op, x.value, bound.value), *derivatives)
        return x

    def where(self, condition: Any, x: Any, y: Any) -> _Dual:
        condition, x, y = self.dual(condition), self.dual(x), self.dual(y)
        w = self.w
        value = w.choose(condition.value, x.value, y.value)
        return self.binary(value, x, y, lambda dx, dy: w.choose(condition.value, dx, dy))

    def gt(self, x: Any, y: Any) -> _Dual:
        return _Truth(self.w.put("above", self.dual(x).value, self.dual(y).value), self.zero, self.zero)

    def lt(self, x: Any, y: Any) -> _Dual:
        return self.gt(y, x)

    def ge(self, x: Any, y: Any) -> _Dual:
        return _Truth(*self.subtract(1.0, self.lt(x, y)))

    def le(self, x: Any, y: Any) -> _Dual:
        return _Truth(*self.subtract(1.0, self.gt(x, y)))

    def detach(self, x: _Dual) -> _Dual:
        return self.constant(x.value)

    def square(self, x: _Dual) -> _Dual:
        return self.multiply(x, x)

    def reciprocal(self, x: _Dual) -> _Dual:
        return self.divide(1.0, x)

    def pow(self, x: Any, power: Any) -> _Dual:
        if power == 0.5:
            return self.sqrt(self.dual(x))
        if not isinstance(power, (int, float)) or power != int(power) or not 0 < power <= 16:
            raise _Unknown(f"a power of {power!r}")
        product = self.dual(x)
        for _ in range(int(power) - 1):
            product = self.multiply(product, x)
        return product


WORDS = {
    "mul": "multiply", "sub": "subtract", "truediv": "divide", "div": "divide", "neg": "negate", "absolute": "abs",
    "clip": "clamp", "negative": "negate", "true_divide": "divide", "greater": "gt", "less": "lt",
}  # fmt: skip
KNOWN = (
    "add", "subtract", "multiply", "divide", "negate", "exp", "expm1", "log", "log1p", "sqrt", "sigmoid", "tanh",
    "softplus", "relu", "abs", "maximum", "minimum", "clamp", "where", "gt", "lt", "ge", "le", "detach", "square",
    "reciprocal", "pow",
)  # fmt: skip


def _check_truths(name: str, arguments: list[Any], options: dict[str, Any]) -> None:
    """Raises where PyTorch would do with a truth value what steps on 0 and 1 do not.

    Allowed is a truth value as the condition of `where`, and one that is added to, subtracted from or multiplied by a
    floating-point tensor.
    """

    def floating(value: Any) -> bool:
        return isinstance(value, _Dual) and not isinstance(value, _Truth)

    operands = [*arguments, *options.values()]
    if name == "where":
        values = dict(zip(("condition", "input", "other"), arguments, strict=False)) | options
        if not isinstance(values.get("condition"), _Truth):
            raise _Unknown("where of a condition that is no comparison")
        branches = [values.get("input"), values.get("other")]
        if not any(map(floating, branches)) or any(isinstance(v, _Truth) for v in branches):
            raise _Unknown("where without a floating-point tensor to choose, or with a truth value")
        return
    if not any(isinstance(v, _Truth) for v in operands):
        return
    if name not in ("add", "subtract", "multiply") or not any(map(floating, operands)) or "alpha" in options:
        raise _Unknown(f"{name} of truth values")


def program(dense: Callable[..., Tensor], two_args: bool) -> Expression | str:
    """The expression of a transform, or the reason why it has none.

    Args:
        dense: the transform in PyTorch.
        two_args: it is a function of s = scale * z and of the offset, not of their sum t.
    """

    def of_sum(t):  # type: ignore[no-untyped-def]  # fx needs arguments with names
        return dense(t)

    def of_both(s, offset):  # type: ignore[no-untyped-def]
        return dense(s, offset)

    tracer = _Tracer()
    w = tracer.w
    s = _Dual(w.put("scaled"), tracer.one, tracer.zero)
    offset = _Dual(w.put("own"), tracer.zero, tracer.one)
    inputs = iter((s, offset) if two_args else (tracer.add(s, offset),))
    duals: dict[fx.Node, _Dual] = {}

    def of(value: Any) -> Any:
        return duals[value] if isinstance(value, fx.Node) else value

    try:
        for node in fx.symbolic_trace(of_both if two_args else of_sum).graph.nodes:
            if node.op == "placeholder":
                duals[node] = next(inputs)
            elif node.op == "output":
                if not isinstance(of(node.args[0]), _Dual) or isinstance(of(node.args[0]), _Truth):
                    raise _Unknown("a result that is not a floating-point tensor")
                last = tracer.dual(of(node.args[0]))
            else:
                name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
                name = WORDS.get(name, name)
                if node.op not in ("call_function", "call_method") or name not in KNOWN:
                    raise _Unknown(f"{name or node.op}")
                arguments, options = [of(a) for a in node.args], {k: of(v) for k, v in node.kwargs.items()}
                _check_truths(name, arguments, options)
                duals[node] = getattr(tracer, name)(*arguments, **options)
    except _Unknown as reason:
        return f"it uses {reason}, which is not one of {', '.join(KNOWN)}"
    except Exception as reason:  # of fx, or of the function itself, which does not expect fx's proxies
        return f"it cannot be traced: {reason}"
    if len(w.steps) > 8 * MOST_STEPS:  # bounds the work of `_ordered`, which drops steps that are not needed
        return f"it takes {len(w.steps)} steps, of at most {MOST_STEPS}"
    kept = _ordered(w.steps, last)
    return kept if len(kept.steps) <= MOST_STEPS else f"it takes {len(kept.steps)} steps, of at most {MOST_STEPS}"


def _ordered(steps: list[Step], last: _Dual) -> Expression:
    """The steps that the value and its derivatives need, the value's first."""
    order: dict[int, int] = {}

    def visit(k: int) -> None:
        if k in order:
            return
        step = steps[k]
        if step.op not in ("scaled", "own", "constant"):
            visit(step.a)
            if step.op not in ("negate", "exp", "expm1", "log", "log1p", "sqrt", "softplus", "sigmoid", "absolute"):
                visit(step.b)
            if step.op == "choose":
                visit(step.c)
        order[k] = len(order)

    for k in last:
        visit(k)
    moved = tuple(
        step._replace(a=order.get(step.a, 0), b=order.get(step.b, 0), c=order.get(step.c, 0))
        for step in (steps[k] for k in order)
    )
    return Expression(moved, order[last.value], order[last.by_scaled], order[last.by_offset])
