"""The losses that a comparison knows by name, and the search space of each."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import NamedTuple

from ...losses import ClassCriterion, Criterion
from ...losses.declaration import REGISTRY, Declaration, Range, Search
from ..import_target import criterion


class Candidate(NamedTuple):
    """A loss to compare.

    Attributes:
        make: makes the criterion from values of `space`, and for a loss with class weights also from ``num_classes``
            and ``embedding_size``.
        space: the hyper-parameters that are searched for.
        of_classes: whether the loss has class weights or proxies.
    """

    make: Callable[..., Criterion]
    space: Mapping[str, Range]
    of_classes: bool = False


def _declared(declaration: Declaration, search: Search) -> Candidate:
    def make(**given: float) -> Criterion:
        sizes = {name: given.pop(name) for name in ("num_classes", "embedding_size") if name in given}
        values = {name: search.space[name].value(value) for name, value in given.items()}
        return declaration.kind(**sizes, **values, **search.fixed)  # type: ignore[arg-type]

    return Candidate(make, search.space, declaration.group == "classes")


LOSSES: dict[str, Candidate] = {
    key + suffix: _declared(REGISTRY[key], search)
    for key in sorted(REGISTRY)
    for suffix, search in REGISTRY[key].searches.items()
}


OLD_NAMES = {"triplet": "triplet_margin", "triplet_hard": "triplet_margin_hard"}


def candidate(name: str) -> Candidate:
    """A loss of `LOSSES` by its name, or your own `flashpair.Criterion` as FILE.py:Name or module:Name.

    Your own can have a class attribute ``search_space``, a dict from argument names to `Range`s (or tuples like them).
    Without it there is no search: a trial is a training with the defaults.

    Args:
        name: a key of `LOSSES`, FILE.py:Name or module:Name.

    Returns:
        A `Candidate`.

    Raises:
        ValueError: there is no such loss, or its search space is invalid.

    Examples:
        >>> from flashpair.tools.reality_check import candidate
        >>> candidate("nt_xent").space["temperature"]
        Range(low=0.01, high=1.0, log=True, integer=False)
    """
    if name in OLD_NAMES:
        warnings.warn(f"the loss {name!r} is now {OLD_NAMES[name]!r}", DeprecationWarning, stacklevel=2)
    name = OLD_NAMES.get(name, name)
    if name in LOSSES:
        return LOSSES[name]
    if ":" not in name:
        raise ValueError(f"a loss is FILE.py:Name, module:Name or one of {', '.join(LOSSES)}; got {name!r}")
    kind = criterion(name)
    try:
        space = {key: Range(*given) for key, given in getattr(kind, "search_space", {}).items()}
        if not all(0 * r.high == 0 and (0 if r.log else -float("inf")) < r.low < r.high for r in space.values()):
            raise TypeError("low must be below high, and above 0 where log is")
    except (TypeError, AttributeError) as error:
        raise ValueError(f"search_space of {name} must map names to (low, high, log): {error}") from error
    return Candidate(kind, space, issubclass(kind, ClassCriterion))
