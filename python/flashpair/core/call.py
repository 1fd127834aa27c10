"""A call of row reductions as the engine passes it on: `Call`, its constants, beside `Operands`, its tensors.

    Reductions ── compile_call ──► Call ── encode / decode ──► what the registered operators take

Equal constants give the same `Call`: it is compiled in the first step of a training run and looked up in all others.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .problem import Operands, Term, Terms, solid
from .reduction import OPS, SIDES, TRANSFORMS, Bound, Reduction, bound_places

OFFSET, REF_OFFSET, LOWER, UPPER = ROLES = range(4)  # of a vector in its reduction, in the order of `Term.slots`
CODES, SHIFTS = 6, 3  # integers and numbers that a term is encoded as


class Call(NamedTuple):
    """The constants of a call of K reductions.

    Attributes:
        terms: the K reductions.
        vectors: what each of `Operands.vectors` is: the number of its reduction times 4, plus its role.
        scales: (K,), the scales that are numbers, and 1 where all of them are a tensor.
        distance: what pairs are compared by.
        backend: the implementation that runs.
    """

    terms: Terms
    vectors: tuple[int, ...]
    scales: tuple[float, ...]
    distance: str
    backend: str

    @property
    def vector_roles(self) -> tuple[tuple[int, int], ...]:
        """The number of the reduction, and the role, of each vector."""
        return tuple(divmod(vector, len(ROLES)) for vector in self.vectors)


class _Constants(NamedTuple):
    """What a `Reduction` says that is no tensor; a window's end is (whose value bounds it or -1, shift, a vector)."""

    op: int
    side: int
    transform: int  # its place, as a name may be registered again
    detach: bool
    scale: float
    offset: float
    vectors: tuple[bool, bool]  # whether its offset is one, and whether it has a ref_offset
    lower: tuple[int, float, bool]
    upper: tuple[int, float, bool]


def _constants(r: Reduction, places: tuple[int, int]) -> _Constants:
    by_vector = isinstance(r.offset, Tensor) and not r.offset_outside
    number = r.offset is not None and not isinstance(r.offset, Tensor) and not r.offset_outside
    lower, upper = (
        (of, bound.shift if isinstance(bound, Bound) else 0.0, bound is not None and of < 0)
        for bound, of in zip((r.lower, r.upper), places, strict=True)
    )
    return _Constants(
        OPS.index(r.op), SIDES.index(r.side), TRANSFORMS.index(r.transform), r.detach,
        1.0 if isinstance(r.scale, Tensor) else r.scale,
        float(r.offset) if number else 0.0,  # type: ignore[arg-type]
        (by_vector, r.ref_offset is not None), lower, upper,
    )  # fmt: skip


def compile_call(reductions: Sequence[Reduction], distance: str, backend: str) -> Call:
    """The constants of a call.

    Raises:
        ValueError: a bound on a reduction that does not stand before it, or that has an offset of its own.
    """
    reductions = tuple(reductions)
    constants = tuple(map(_constants, reductions, bound_places(reductions)))
    return (_compile if torch.compiler.is_compiling() else _compiled)(constants, distance, backend)


def _compile(constants: tuple[_Constants, ...], distance: str, backend: str) -> Call:
    terms: list[Term] = []
    vectors: list[int] = []
    for k, c in enumerate(constants):
        slots = []
        for role, there in enumerate((*c.vectors, c.lower[2], c.upper[2])):
            slots.append(len(vectors) if there else -1)
            vectors += [len(ROLES) * k + role] if there else []
        terms.append(
            Term(
                c.op, c.side, c.transform, c.detach, c.lower[0], c.upper[0], c.lower[1], c.upper[1], c.offset,
                tuple(slots),
            )
        )  # fmt: skip
    return Call(tuple(terms), tuple(vectors), tuple(c.scale for c in constants), distance, backend)


_compiled = functools.lru_cache(maxsize=256)(_compile)


def operands_of(
    call: Call, reductions: Sequence[Reduction], n: int, m: int, dtype: torch.dtype, device: torch.device
) -> Operands:
    """The tensors of a call of n anchors and m references; windows have no gradient."""
    vectors: list[Tensor] = []
    for k, role in call.vector_roles:
        r = reductions[k]
        value = (r.offset, r.ref_offset, r.lower, r.upper)[role]
        vector = solid(as_tensor(value, dtype, device).expand(m if role == REF_OFFSET else n))
        vectors.append(vector.detach() if role in (LOWER, UPPER) else vector)
    scale = None
    if any(isinstance(r.scale, Tensor) for r in reductions):
        scale = torch.stack([as_tensor(r.scale, dtype, device) for r in reductions])
    return Operands(scale, call.scales, vectors)


def as_tensor(value: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor there, or a number as a tensor (); a number is not copied from the host, which would wait."""
    return value.to(device, dtype) if isinstance(value, Tensor) else torch.full((), value, dtype=dtype, device=device)


Encoded = tuple[tuple[int, ...], tuple[int, ...], tuple[float, ...], tuple[float, ...], str, str]


def encode(call: Call) -> Encoded:
    """The call as the registered operators take it: vectors, integers and numbers of the terms, scales, two words."""
    codes: list[int] = []
    shifts: list[float] = []
    for t in call.terms:
        codes += [t.op, t.side, t.transform, int(t.detach), t.lower_of, t.upper_of]
        shifts += [t.lower_shift, t.upper_shift, t.shift]
    return call.vectors, tuple(codes), tuple(shifts), call.scales, call.distance, call.backend


def decode(
    vectors: Sequence[int], codes: Sequence[int], shifts: Sequence[float], scales: Sequence[float], distance: str,
    backend: str,
) -> Call:  # fmt: skip
    """The call that `encode` was given."""
    return _decoded(tuple(vectors), tuple(codes), tuple(shifts), tuple(scales), distance, backend)


@functools.lru_cache(maxsize=256)
def _decoded(
    vectors: tuple[int, ...], codes: tuple[int, ...], shifts: tuple[float, ...], scales: tuple[float, ...],
    distance: str, backend: str,
) -> Call:  # fmt: skip
    place = {vector: at for at, vector in enumerate(vectors)}
    terms = []
    for k in range(len(scales)):
        op, side, transform, detach, lower_of, upper_of = codes[CODES * k : CODES * (k + 1)]
        lower, upper, offset = shifts[SHIFTS * k : SHIFTS * (k + 1)]
        slots = tuple(place.get(len(ROLES) * k + role, -1) for role in ROLES)
        terms.append(Term(op, side, transform, bool(detach), lower_of, upper_of, lower, upper, offset, slots))
    return Call(tuple(terms), vectors, scales, distance, backend)
