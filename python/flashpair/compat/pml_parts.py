"""Reads the parts of a pytorch-metric-learning loss (distance, reducer, ...), with every reason to refuse one."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

REDUCERS = {
    "MeanReducer": "mean",
    "AvgNonZeroReducer": "nonzero",
    "SumReducer": "sum",
    "DivisorReducer": "divisor",
    "DoNothingReducer": "none",
}
# Attributes of a class body that do not change what its parent computes.
HARMLESS = {"__init__", "__module__", "__qualname__", "__doc__", "__annotations__"}
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Similarity(NamedTuple):
    """``"dot"``, ``"euclidean"``, ``"squared_euclidean"`` or ``"snr"``, of embeddings normalised (`unit`) or raw."""

    kind: str
    unit: bool

    def __str__(self) -> str:
        return f"{'normalised' if self.unit else 'raw'} {self.kind}"


def name(part: Any) -> str:
    return type(part).__name__


def similarity(distance: Any, modules: Any, owner: str, reasons: list[str]) -> Similarity | None:
    known = modules.distances
    kinds = {
        known.LpDistance: {1: "euclidean", 2: "squared_euclidean"},
        known.CosineSimilarity: {1: "dot"},
        known.DotProductSimilarity: {1: "dot"},
        known.SNRDistance: {1: "snr"},
    }
    found = kinds.get(type(distance))
    if found is None:
        reasons.append(f"distance {name(distance)} of the {owner} is not known")
        return None
    statistics(distance, owner, reasons)
    unchanged(distance, type(distance), f"distance of the {owner}", reasons)
    if distance.p != 2:
        reasons.append(f"distance {name(distance)}(p={distance.p!r}) of the {owner}: p must be 2")
    if distance.power not in found:
        powers = " or ".join(map(str, found))
        reasons.append(f"distance {name(distance)}(power={distance.power!r}) of the {owner}: power must be {powers}")
        return None
    return Similarity(found[distance.power], bool(distance.normalize_embeddings))


def reduction(loss: Any, modules: Any, reasons: list[str]) -> str | None:
    """One word for all the parts of the loss."""
    known = {getattr(modules.reducers, each): word for each, word in REDUCERS.items()}
    reducer, each = loss.reducer, [loss.reducer]
    if type(reducer) is modules.reducers.MultipleReducers:
        each = [
            reducer.reducers[part] if part in reducer.reducers else reducer.default_reducer
            for part in loss._sub_loss_names()
        ]
    for one in {id(one): one for one in [reducer, *each]}.values():
        statistics(one, "reducer", reasons)
        unchanged(one, type(one), "reducer", reasons)
    words = {known.get(type(one)) for one in each}
    if None in words:
        unknown = ", ".join(sorted({name(one) for one in each if type(one) not in known}))
        reasons.append(f"reducer {unknown} is none of {', '.join(REDUCERS)}")
        return None
    if len(words) > 1:
        reasons.append(f"all parts must have the same reducer, got {', '.join(map(name, each))}")
        return None
    if any((one.low, one.high) != (0, None) for one in each if name(one) == "AvgNonZeroReducer"):
        reasons.append("the limits of AvgNonZeroReducer were changed")
    return words.pop()


def numbers(loss: Any, names: tuple[str, ...], reasons: list[str]) -> list[Any]:
    """The values of these attributes. Tensors are refused, because nothing would train them after the switch."""
    found = [getattr(loss, each) for each in names]
    reasons.extend(
        f"{each} must be a number, got a tensor" for each, v in zip(names, found, strict=True) if isinstance(v, Tensor)
    )
    return [v if isinstance(v, (int, bool, Tensor)) else float(v) for v in found]


def statistics(part: Any, owner: str, reasons: list[str]) -> None:
    if part.collect_stats:
        reasons.append(f"collect_stats of {name(part)} ({owner}): the fused criterion collects no statistics")


def unchanged(part: Any, known: type, owner: str, reasons: list[str]) -> None:
    """Whether `part` overrides nothing of `known`, the class in the table that it is an instance of."""
    between = type(part).__mro__[: type(part).__mro__.index(known)]
    own = {each for cls in between for each in vars(cls) if each not in HARMLESS and hasattr(known, each)}
    own |= {each for each in vars(part) if callable(getattr(known, each, None))}
    if own:
        reasons.append(f"{name(part)} ({owner}) is {known.__name__} with its own {', '.join(sorted(own))}")
    if any(getattr(part, hooks, None) for hooks in HOOKS):
        reasons.append(f"{name(part)} ({owner}) has hooks, which would not be called")


def regularizers(loss: Any, weights: tuple[str, ...], reasons: list[str]) -> None:
    for which in ("embedding_regularizer", "weight_regularizer"):
        if getattr(loss, which, None) is not None:
            reasons.append(f"{which} {name(getattr(loss, which))} is not part of the fused criterion")
    if others := [each for each, _ in loss.named_parameters() if each not in weights]:
        reasons.append(f"parameters that are not known: {', '.join(others)}")
