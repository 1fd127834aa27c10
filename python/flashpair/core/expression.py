"""A transform written in PyTorch, as the list of steps that it is: what the C++ kernels run for a vector of pairs at a
time, and what Triton's are generated from. Its derivatives are steps, too (forward differentiation).
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
"""csrc/cpu/types.h's StepOp."""
MOST_STEPS = 96


class Step(NamedTuple):
    """op(a, b) of two earlier steps; "choose": a where c > 0, else b; "above": 1 where a > b, else 0."""

    op: str
    a: int = 0
    b: int = 0
    c: int = 0
    constant: float = 0.0


class Expression(NamedTuple):
    """phi(s, own), s = scale * z, is step `value`, and its derivatives in s and in own are two others."""

    steps: tuple[Step, ...]
    value: int
    slope: int
    d_offset: int


class _Unknown(Exception):
    """Something in a function that has no steps."""


class _Writer:
    """Steps without repetitions, and with what is known beforehand worked out."""

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self.places: dict[Step, int] = {}

    def put(self, op: str, a: int = 0, b: int = 0, c: int = 0, constant: float = 0.0) -> int:
        step = Step(op, a, b, c, constant)
        if step not in self.places:
            self.places[step] = len(self.steps)
            self.steps.append(step)
        return self.places[step]

    def number(self, value: float) -> int:
        return self.put("constant", constant=float(value))

    def known(self, place: int) -> float | None:
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
    """A step with its derivatives in s and in own."""

    at: int
    by_s: int
    by_own: int


class _Truth(_Dual):
    """A comparison's step: bool in PyTorch, where sums of two are "or", powers are integers, and so on."""


class _Tracer:
    """Turns the calls of a function's graph into steps."""

    def __init__(self) -> None:
        self.w = _Writer()
        self.zero, self.one = self.w.number(0.0), self.w.number(1.0)

    def dual(self, value: Any) -> _Dual:
        if isinstance(value, _Dual):
            return value
        if isinstance(value, (int, float)):
            return _Dual(self.w.number(value), self.zero, self.zero)
        raise _Unknown(f"a value of type {type(value).__name__}")

    def chain(self, at: int, slope: int, x: _Dual) -> _Dual:
        return _Dual(at, self.w.multiply(slope, x.by_s), self.w.multiply(slope, x.by_own))

    def both(self, at: int, x: _Dual, y: _Dual, join: Callable[[int, int], int]) -> _Dual:
        return _Dual(at, join(x.by_s, y.by_s), join(x.by_own, y.by_own))

    def constant(self, at: int) -> _Dual:
        return _Dual(at, self.zero, self.zero)

    def add(self, x: Any, y: Any, alpha: float = 1) -> _Dual:
        x, y = self.dual(x), self.multiply(y, alpha) if alpha != 1 else self.dual(y)
        return self.both(self.w.add(x.at, y.at), x, y, self.w.add)

    def subtract(self, x: Any, y: Any, alpha: float = 1) -> _Dual:
        x, y = self.dual(x), self.multiply(y, alpha) if alpha != 1 else self.dual(y)
        return self.both(self.w.subtract(x.at, y.at), x, y, self.w.subtract)

    def multiply(self, x: Any, y: Any) -> _Dual:
        x, y = self.dual(x), self.dual(y)
        w = self.w
        return self.both(w.multiply(x.at, y.at), x, y, lambda dx, dy: w.add(w.multiply(dx, y.at), w.multiply(x.at, dy)))

    def divide(self, x: Any, y: Any) -> _Dual:
        x, y = self.dual(x), self.dual(y)
        w, at = self.w, self.w.divide(x.at, y.at)
        return self.both(at, x, y, lambda dx, dy: w.divide(w.subtract(dx, w.multiply(at, dy)), y.at))

    def negate(self, x: _Dual) -> _Dual:
        return self.subtract(0.0, x)

    def exp(self, x: _Dual) -> _Dual:
        at = self.w.put("exp", x.at)
        return self.chain(at, at, x)

    def log(self, x: _Dual) -> _Dual:
        return self.chain(self.w.put("log", x.at), self.w.divide(self.one, x.at), x)

    def log1p(self, x: _Dual) -> _Dual:
        return self.chain(self.w.put("log1p", x.at), self.w.divide(self.one, self.w.add(self.one, x.at)), x)

    def sqrt(self, x: _Dual) -> _Dual:
        at = self.w.put("sqrt", x.at)
        return self.chain(at, self.w.divide(self.w.number(0.5), at), x)

    def sigmoid(self, x: _Dual) -> _Dual:
        at = self.w.put("sigmoid", x.at)
        return self.chain(at, self.w.multiply(at, self.w.subtract(self.one, at)), x)

    def expm1(self, x: _Dual) -> _Dual:
        at = self.w.put("expm1", x.at)
        return self.chain(at, self.w.add(at, self.one), x)

    def tanh(self, x: _Dual) -> _Dual:
        w, low = self.w, self.expm1(self.multiply(-2.0, self.abs(x)))
        size = w.divide(w.negate(low.at), w.add(low.at, w.number(2.0)))
        at = w.choose(w.put("above", self.zero, x.at), w.negate(size), size)
        return self.chain(at, w.subtract(self.one, w.multiply(at, at)), x)

    def softplus(self, x: _Dual, beta: float = 1, threshold: float = 20) -> _Dual:
        """Past its threshold torch's is linear, which this is to 2e-9 at 20."""
        x = self.multiply(beta, x)
        soft = self.chain(self.w.put("softplus", x.at), self.w.put("sigmoid", x.at), x)
        if threshold < 20:
            raise _Unknown(f"softplus with threshold {threshold}")
        return self.divide(soft, beta)

    def relu(self, x: _Dual, inplace: bool = False) -> _Dual:
        if inplace:
            raise _Unknown("relu in place")
        above = self.w.put("above", x.at, self.zero)
        at = self.w.put("maximum", x.at, self.zero)
        return _Dual(at, self.w.choose(above, x.by_s, self.zero), self.w.choose(above, x.by_own, self.zero))

    def abs(self, x: _Dual) -> _Dual:
        w = self.w
        sign = w.subtract(w.put("above", x.at, self.zero), w.put("above", self.zero, x.at))
        return self.chain(w.put("absolute", x.at), sign, x)

    def maximum(self, x: Any, y: Any) -> _Dual:
        x, y = self.dual(x), self.dual(y)
        return self._larger("maximum", x, y, self.w.put("above", x.at, y.at), self.w.put("above", y.at, x.at))

    def minimum(self, x: Any, y: Any) -> _Dual:
        x, y = self.dual(x), self.dual(y)
        return self._larger("minimum", x, y, self.w.put("above", y.at, x.at), self.w.put("above", x.at, y.at))

    def _larger(self, op: str, x: _Dual, y: _Dual, first: int, second: int) -> _Dual:
        """Where both are equal, each has half of the derivative."""
        w = self.w

        def join(dx: int, dy: int) -> int:
            half = w.multiply(w.number(0.5), w.add(dx, dy))
            return w.choose(first, dx, w.choose(second, dy, half))

        return self.both(w.put(op, x.at, y.at), x, y, join)

    def clamp(self, x: _Dual, min: Any = None, max: Any = None) -> _Dual:
        for limit, op in ((min, "maximum"), (max, "minimum")):
            if limit is None:
                continue
            at = self.dual(limit)
            if (at.by_s, at.by_own) != (self.zero, self.zero):
                raise _Unknown("clamp to something that depends on the pair")
            outside = (at.at, x.at) if op == "maximum" else (x.at, at.at)
            cut = self.w.put("above", *outside)
            by = [self.w.choose(cut, self.zero, d) for d in (x.by_s, x.by_own)]
            x = _Dual(self.w.put(op, x.at, at.at), *by)
        return x

    def where(self, condition: Any, x: Any, y: Any) -> _Dual:
        condition, x, y = self.dual(condition), self.dual(x), self.dual(y)
        w = self.w
        at = w.choose(condition.at, x.at, y.at)
        return self.both(at, x, y, lambda dx, dy: w.choose(condition.at, dx, dy))

    def gt(self, x: Any, y: Any) -> _Dual:
        return _Truth(self.w.put("above", self.dual(x).at, self.dual(y).at), self.zero, self.zero)

    def lt(self, x: Any, y: Any) -> _Dual:
        return self.gt(y, x)

    def ge(self, x: Any, y: Any) -> _Dual:
        return _Truth(*self.subtract(1.0, self.lt(x, y)))

    def le(self, x: Any, y: Any) -> _Dual:
        return _Truth(*self.subtract(1.0, self.gt(x, y)))

    def detach(self, x: _Dual) -> _Dual:
        return self.constant(x.at)

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
    """A truth value is `where`'s condition, or is added to, subtracted from or multiplied by a floating-point tensor,
    where it is 0 or 1; what else PyTorch makes of bools and of numbers alone has no steps."""

    def floating(value: Any) -> bool:
        return isinstance(value, _Dual) and not isinstance(value, _Truth)

    given = [*arguments, *options.values()]
    if name == "where":
        values = dict(zip(("condition", "input", "other"), arguments, strict=False)) | options
        if not isinstance(values.get("condition"), _Truth):
            raise _Unknown("where of a condition that is no comparison")
        given = [values.get("input"), values.get("other")]
        if not any(map(floating, given)) or any(isinstance(v, _Truth) for v in given):
            raise _Unknown("where without a floating-point tensor to choose, or with a truth value")
        return
    if not any(isinstance(v, _Truth) for v in given):
        return
    if name not in ("add", "subtract", "multiply") or not any(map(floating, given)) or "alpha" in options:
        raise _Unknown(f"{name} of truth values")


def program(dense: Callable[..., Tensor], two_args: bool) -> Expression | str:
    """The steps of dense(t), t = s + own, or, `two_args`, of dense(s, own); or what is in it that has none."""

    def one(t):  # type: ignore[no-untyped-def]  # fx looks at the names of its arguments
        return dense(t)

    def two(s, own):  # type: ignore[no-untyped-def]
        return dense(s, own)

    tracer = _Tracer()
    w = tracer.w
    s = _Dual(w.put("scaled"), tracer.one, tracer.zero)
    own = _Dual(w.put("own"), tracer.zero, tracer.one)
    inputs = iter((s, own) if two_args else (tracer.add(s, own),))
    duals: dict[fx.Node, _Dual] = {}

    def of(value: Any) -> Any:
        return duals[value] if isinstance(value, fx.Node) else value

    try:
        for node in fx.symbolic_trace(two if two_args else one).graph.nodes:
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
    except Exception as reason:  # of fx, or of the function itself, which has been given something unusual
        return f"it cannot be traced: {reason}"
    if len(w.steps) > 8 * MOST_STEPS:  # before any of them is found not to be needed
        return f"it takes {len(w.steps)} steps, of at most {MOST_STEPS}"
    kept = _ordered(w.steps, last)
    return kept if len(kept.steps) <= MOST_STEPS else f"it takes {len(kept.steps)} steps, of at most {MOST_STEPS}"


def _ordered(steps: list[Step], last: _Dual) -> Expression:
    """Only the steps that are needed, those of the value first."""
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
    return Expression(moved, order[last.at], order[last.by_s], order[last.by_own])
