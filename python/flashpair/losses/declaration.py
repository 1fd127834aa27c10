"""What a loss declares about itself, once, on its class: `@loss(...)`. All lists of losses are made from it."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from .papers import Paper

if TYPE_CHECKING:
    from .base import Criterion

GROUPS = {
    "pairs": "Pairs",
    "rows": "Triplets and pair rows",
    "histograms": "Histograms",
    "classes": "Classes and proxies",
}
"""The groups of losses, and their headings in the documentation. "classes" are the losses with class weights."""

C = TypeVar("C", bound="type[Criterion]")


class Range(NamedTuple):
    """The range in which a hyper-parameter is searched for.

    Attributes:
        low: the least value.
        high: the largest value.
        log: search on a logarithmic scale; then `low` is above 0.
        integer: search for a whole number.
    """

    low: float
    high: float
    log: bool = False
    integer: bool = False

    def value(self, found: float) -> float | int:
        """A value of the search as the argument takes it."""
        return round(found) if self.integer else found


MARGIN, POSITIVE, SCALE = Range(0.0, 1.0), Range(0.01, 1.0, log=True), Range(1.0, 100.0, log=True)
"""Ranges that several losses search in."""


class Search(NamedTuple):
    """A search for hyper-parameters.

    Attributes:
        space: the range of each argument that is searched for.
        fixed: the other arguments that are not left at their defaults.
    """

    space: Mapping[str, Range]
    fixed: Mapping[str, Any] = {}


class Source(NamedTuple):
    """Where a loss comes from.

    Attributes:
        paper: the paper.
        where: the equation or section, in words; empty: all of it.
    """

    paper: Paper
    where: str = ""

    def __str__(self) -> str:
        return f"{self.paper.short}, {self.where}" if self.where else self.paper.short


class Declaration(NamedTuple):
    """A loss as all lists name it.

    Attributes:
        key: its one name in lower case, such as ``"nt_xent"``.
        kind: its class.
        group: a key of `GROUPS`.
        sources: the papers, the first one first.
        note: what the table of losses adds to them.
        forms: arguments that take another way through the engine, each with what is written behind the class's name:
            all of them are checked and tested.
        searches: the searches of the reality check, each with what is written behind the key.
    """

    key: str
    kind: type[Criterion]
    group: str
    sources: tuple[Source, ...]
    note: str
    forms: Mapping[str, Mapping[str, Any]]
    searches: Mapping[str, Search]

    @property
    def name(self) -> str:
        """The class's name."""
        return self.kind.__name__

    @property
    def function(self) -> str:
        """The name of its function in `flashpair.functional`; losses with class weights have none."""
        return "" if self.group == "classes" else f"{self.key}_loss"

    @property
    def source(self) -> str:
        """Papers and note, as the table of losses has them."""
        return "; ".join([*map(str, self.sources), *([self.note] if self.note else [])])

    @property
    def arguments(self) -> tuple[str, ...]:
        """The hyper-parameters that may be given by place, without the sizes of class weights."""
        parameters = inspect.signature(self.kind).parameters.values()
        names = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
        return tuple(names[2:] if self.group == "classes" else names)

    @property
    def reduction(self) -> str:
        """The default of `reduction`."""
        default: str = inspect.signature(self.kind).parameters["reduction"].default
        return default

    def form(self, suffix: str) -> Callable[..., Criterion]:
        """The class with the arguments of one of its forms."""
        options = self.forms[suffix]
        return functools.partial(self.kind, **options) if options else self.kind


REGISTRY: dict[str, Declaration] = {}
"""Every loss that has been declared, by its key."""


def loss(
    *, key: str, group: str, sources: Sequence[Source], note: str = "",
    forms: Mapping[str, Mapping[str, Any]] | None = None, searches: Mapping[str, Search] | None = None,
) -> Callable[[C], C]:  # fmt: skip
    """Declares a loss of this package.

    Args:
        key: its name in lower case, letters, digits and underscores, which no other loss has.
        group: ``"pairs"``, ``"rows"``, ``"histograms"`` or ``"classes"``.
        sources: the papers it comes from, the first one first.
        note: what the table of losses adds to them.
        forms: arguments of the forms to check and to test, each with what is written behind the class's name; None:
            its defaults alone.
        searches: the searches of the reality check, each with what is written behind the key.

    Returns:
        A decorator that returns the class as it is.

    Raises:
        ValueError: a key that is taken or has other characters, or an unknown group.
    """
    if group not in GROUPS:
        raise ValueError(f"group must be one of {', '.join(GROUPS)}, got {group!r}")
    if not re.fullmatch(r"[a-z][a-z0-9_]*", key):
        raise ValueError(f"key must be of lower-case letters, digits and underscores, got {key!r}")

    def declare(kind: C) -> C:
        known = REGISTRY.get(key)
        if known is not None and (known.kind.__module__, known.name) != (kind.__module__, kind.__name__):
            raise ValueError(f"key {key!r} of {kind.__name__} is taken by {known.name}")
        REGISTRY[key] = Declaration(
            key, kind, group, tuple(sources), note, dict(forms or {"": {}}), dict(searches or {})
        )
        return kind

    return declare
