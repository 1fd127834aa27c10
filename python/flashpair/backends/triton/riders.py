"""Extremes that need no pass of their own: a logsumexp keeps the z of its largest term, which is the max (or min) of
the same pairs. Mined losses ask for both of one window."""

from __future__ import annotations

from collections.abc import Sequence

from ...core.problem import LOGSUMEXP, MAX, MIN, Operands, Term, Terms


def _pairs(t: Term) -> tuple[object, ...]:
    """Which pairs a term is of."""
    return t.side, t.lower_of, t.upper_of, t.lower_shift, t.upper_shift, t.slots[2:]


def riders(terms: Terms, operands: Operands, stage: Sequence[int]) -> dict[int, int]:
    """Of a stage's terms, the extremes whose place nobody wants, each with the logsumexp that has its value: of a known
    scale, whose sign says which extreme that is."""
    found: dict[int, int] = {}
    leaders = [k for k in stage if terms[k].op == LOGSUMEXP and not terms[k].transformed]
    for k in leaders if operands.scale is None else ():
        op = MIN if operands.scales[k] < 0 else MAX
        same = (j for j in stage if terms[j].op == op and not terms[j].indexed and _pairs(terms[j]) == _pairs(terms[k]))
        found |= dict.fromkeys(same, k)
    return found
