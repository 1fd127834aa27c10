"""Which reductions of a call share a launch, which need none, and which are differentiated through its kernels."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

from ...core.problem import LOGSUMEXP, MAX, MIN, POSITIVES, SUM, Operands, Term, Terms
from ...core.reduction import TRANSFORMS
from ...core.transforms import custom
from . import codegen
from .kernels import transforms


def is_generated(t: Term) -> bool:
    """Whether the functions of a term's transform are generated from its steps (codegen.py)."""
    return TRANSFORMS[t.transform] not in transforms.table


def transform_functions(t: Term) -> tuple[Any, Any]:
    """The jit functions of a term's transform, and of it with its derivatives; see kernels/transforms.py."""
    name = TRANSFORMS[t.transform] if t.op == SUM or t.transformed else "identity"
    return transforms.table[name] if name in transforms.table else codegen.functions(custom(name))


def launch_groups(terms: Terms, chosen: Sequence[int]) -> list[tuple[int, ...]]:
    """The chosen terms, two a launch.

    Terms of positives go together, because theirs visit masked tiles only; one of them joins a term of another side
    where that is alone. A term whose transform is generated, which takes registers, is launched by itself.
    """
    alone = [(k,) for k in chosen if is_generated(terms[k])]
    positives = [k for k in chosen if terms[k].side == POSITIVES and not is_generated(terms[k])]
    others = [k for k in chosen if terms[k].side != POSITIVES and not is_generated(terms[k])]
    groups: list[tuple[int, ...]]
    groups = [tuple(others[k : k + 2]) for k in range(0, len(others), 2)]
    if groups and len(groups[-1]) == 1 and positives:
        groups[-1] += (positives.pop(0),)
    return alone + groups + [tuple(positives[k : k + 2]) for k in range(0, len(positives), 2)]


def weighted_terms(terms: Terms, grads: Iterable[Tensor | None]) -> list[int]:
    """The terms whose gradient is a weight for each pair."""
    return [k for k, (t, g) in enumerate(zip(terms, grads, strict=True)) if t.weighted and g is not None]


def windowed_terms(terms: Terms) -> list[int]:
    """The terms whose windows say which clean tiles backward may leave out: all that weigh negatives, or none."""
    weighted = [k for k, t in enumerate(terms) if t.weighted and t.side != POSITIVES]
    return weighted if all(terms[k].window for k in weighted) else []


def _pairs(t: Term) -> tuple[object, ...]:
    """Which pairs a term is of."""
    return t.side, t.lower_of, t.upper_of, t.lower_shift, t.upper_shift, t.slots[2:]


def shared_extremes(terms: Terms, operands: Operands, stage: Sequence[int]) -> dict[int, int]:
    """The extremes of a stage that need no launch, each with the logsumexp that has its value.

    A logsumexp keeps the z of its largest term, which is the max of its pairs, or for a negative scale the min: of a
    known scale, and where nobody wants the extreme's index. Mined losses ask for both of one window.
    """
    found: dict[int, int] = {}
    logsumexps = [k for k in stage if terms[k].op == LOGSUMEXP and not terms[k].transformed]
    for k in logsumexps if operands.scale is None else ():
        op = MIN if operands.scales[k] < 0 else MAX
        same = (j for j in stage if terms[j].op == op and not terms[j].indexed and _pairs(terms[j]) == _pairs(terms[k]))
        found |= dict.fromkeys(same, k)
    return found
