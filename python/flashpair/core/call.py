"""One call of row reductions in two parts: its constants (`Call`) and its tensors (`Operands`).

    Reductions ── compile_call ──► Call ── encode ──► arguments of the registered operators ── decode ──► Call
               └─ operands_of ──► Operands

Calls with equal constants share one `Call`. The first step of a training run compiles it, and later steps look it up.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .problem import Operands, Term, Terms, solid
from .reduction import OPS, SIDES, TRANSFORMS, Bound, Reduction, bound_places

OFFSET, REF_OFFSET, LOWER, UPPER = ROLES = range(4)  # what a vector is to its reduction, in the order of `Term.slots`
CODES, SHIFTS = 6, 3  # how many integers and how many floats encode one term


class Call(NamedTuple):
    """The constants of a call of K reductions.

    Attributes:
        terms: the K reductions.
        vectors: for each of `Operands.vectors`, 4 times the number of its reduction, plus its role (see `ROLES`).
        scales: K numbers, the scale of each reduction; 1 where the scale is a tensor.
        distance: ``"dot"``, ``"euclidean"`` or ``"squared_euclidean"``.
        backend: the backend that runs the call.
    """

    terms: Terms
    vectors: tuple[int, ...]
    scales: tuple[float, ...]
    distance: str
    backend: str

    @property
    def vector_roles(self) -> tuple[tuple[int, int], ...]:
        """For each vector the number of its reduction, and its role."""
        return tuple(divmod(vector, len(ROLES)) for vector in self.vectors)


class _Constants(NamedTuple):
    """The parts of a `Reduction` that are not tensors. They are hashable, and so a key for the compiled `Call`."""

    op: int
    side: int
    transform: int  # its place, as a name may be registered again
    detach: bool
    scale: float  # 1 where it is a tensor
    offset: float  # 0 where it is none, a vector, or added to the row's value afterwards
    vectors: tuple[bool, bool]  # whether the offset is a vector, and whether there is a ref_offset
    lower: tuple[int, float, bool]  # the reduction that bounds the window (-1: none), the shift, whether a vector does
    upper: tuple[int, float, bool]


def _constants(r: Reduction, bounded_by: tuple[int, int]) -> _Constants:
    """bounded_by: the numbers of the reductions that bound the window below and above, -1 for none."""
    is_vector = isinstance(r.offset, Tensor) and not r.offset_outside
    is_number = r.offset is not None and not isinstance(r.offset, Tensor) and not r.offset_outside
    lower, upper = (
        (k, bound.shift if isinstance(bound, Bound) else 0.0, bound is not None and k < 0)
        for bound, k in zip((r.lower, r.upper), bounded_by, strict=True)
    )
    return _Constants(
        OPS.index(r.op), SIDES.index(r.side), TRANSFORMS.index(r.transform), r.detach,
        1.0 if isinstance(r.scale, Tensor) else r.scale,
        float(r.offset) if is_number else 0.0,  # type: ignore[arg-type]
        (is_vector, r.ref_offset is not None), lower, upper,
    )  # fmt: skip


def compile_call(reductions: Sequence[Reduction], distance: str, backend: str) -> Call:
    """The constants of a call of some reductions.

    Raises:
        ValueError: a window is bound to a reduction that is not an earlier one of the call, or that has an offset.
    """
    reductions = tuple(reductions)
    constants = tuple(map(_constants, reductions, bound_places(reductions)))
    return (_compile if torch.compiler.is_compiling() else _compiled)(constants, distance, backend)


def _compile(constants: tuple[_Constants, ...], distance: str, backend: str) -> Call:
    """Gives every vector its place."""
    vectors: list[int] = []
    for k, c in enumerate(constants):
        is_vector = (*c.vectors, c.lower[2], c.upper[2])
        vectors += [len(ROLES) * k + role for role in ROLES if is_vector[role]]
    terms = [
        Term(
            c.op, c.side, c.transform, c.detach, c.lower[0], c.upper[0], c.lower[1], c.upper[1], c.offset,
            _slots(vectors, k),
        )
        for k, c in enumerate(constants)
    ]  # fmt: skip
    return Call(tuple(terms), tuple(vectors), tuple(c.scale for c in constants), distance, backend)


def _slots(vectors: Sequence[int], k: int) -> tuple[int, ...]:
    """`Term.slots` of reduction `k`: where the vector of each role stands among `Call.vectors`, or -1."""
    wanted = [len(ROLES) * k + role for role in ROLES]
    return tuple(vectors.index(vector) if vector in vectors else -1 for vector in wanted)


_compiled = functools.lru_cache(maxsize=256)(_compile)


def operands_of(
    call: Call, reductions: Sequence[Reduction], n: int, m: int, dtype: torch.dtype, device: torch.device
) -> Operands:
    """The tensors of a call. The bounds of windows have no gradient.

    Args:
        call: the constants of `reductions`.
        reductions: the K reductions, whose vectors are in label order.
        n: the number of anchors.
        m: the number of references.
        dtype: the dtype of the results.
        device: the device of the results.
    """
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
    """`value` in that dtype on that device; a number becomes a tensor ().

    `torch.full` writes the number on the device itself. A copy from the host would wait for the device.
    """
    return value.to(device, dtype) if isinstance(value, Tensor) else torch.full((), value, dtype=dtype, device=device)


Encoded = tuple[tuple[int, ...], tuple[int, ...], tuple[float, ...], tuple[float, ...], str, str]


def encode(call: Call) -> Encoded:
    """The call in types that the registered operators take: `Call.vectors`, the integers and the floats of all terms,
    the scales, the distance and the backend."""
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
    """The call from what `encode` made of it."""
    return _decoded(tuple(vectors), tuple(codes), tuple(shifts), tuple(scales), distance, backend)


@functools.lru_cache(maxsize=256)
def _decoded(
    vectors: tuple[int, ...], codes: tuple[int, ...], shifts: tuple[float, ...], scales: tuple[float, ...],
    distance: str, backend: str,
) -> Call:  # fmt: skip
    terms = []
    for k in range(len(scales)):
        op, side, transform, detach, lower_of, upper_of = codes[CODES * k : CODES * (k + 1)]
        lower, upper, offset = shifts[SHIFTS * k : SHIFTS * (k + 1)]
        slots = _slots(vectors, k)
        terms.append(Term(op, side, transform, bool(detach), lower_of, upper_of, lower, upper, offset, slots))
    return Call(tuple(terms), vectors, scales, distance, backend)
