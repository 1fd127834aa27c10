"""Switching from pytorch-metric-learning 2.9.

criterion = flashpair.compat.pml.fuse(loss, miner)
loss = criterion(embeddings, labels)  # where it was loss(embeddings, labels, miner(embeddings, labels))
"""

from __future__ import annotations

import importlib
from typing import Any

from ..core.extras import extra
from ..engine.dispatch import check_name
from ..losses.base import Criterion
from .divergence import Divergence, Watch
from .pml_losses import SWITCHES
from .pml_parts import name, numbers, reduction, regularizers, similarity, statistics, unchanged
from .pml_switch import OF_KIND, VALID, Asked, Switch, copied

__all__ = ["Divergence", "fuse"]

WRAPPERS = {
    "CrossBatchMemory": "fuse the loss that it wraps, and give the memory as ref_emb and ref_labels",
    "DistributedLossWrapper": "fuse the loss that it wraps, and give all processes' embeddings as ref_emb",
    "SelfSupervisedLoss": "fuse the loss that it wraps, and give labels that pair the views",
    "MultipleLosses": "fuse its losses one by one",
}


def fuse(loss: Any, miner: Any = None, *, impl: str = "auto") -> Criterion:
    """The criterion that gives the numbers of a pytorch-metric-learning loss, with its miner if there is one.

    Call it with (embeddings, labels) and, if the loss takes them, `ref_emb` and `ref_labels`. It mines by itself.

    Where the library's number is wrong (see `flashpair.compat.divergence.REASONS`), the criterion gives flashpair's. A
    call with such a case warns with a `Divergence`, once in a process for each class of loss and reason. On a GPU a
    later call warns, since no call waits for the device. Calls within a compiled or captured graph, calls of
    `flashpair.distributed`, and calls with streamed references never warn. Half-precision embeddings are computed in
    float32.

    Weights, proxies, centres and a learned beta are copied, with the loss's dtype and device, as ``weight`` or
    ``beta``. Give the optimizer the new criterion's parameters. Later changes of `loss` do not reach the criterion.

    Args:
        loss: a loss of ``pytorch_metric_learning.losses`` with the library's own distances and reducers: MeanReducer,
            AvgNonZeroReducer, SumReducer, DivisorReducer where it is the default, or DoNothingReducer for losses with
            one element for each row, which then gives these elements (N,).
        miner: None; for MultiSimilarityLoss a MultiSimilarityMiner; for TripletMarginLoss a BatchHardMiner, or a
            TripletMarginMiner of "all" or "semihard" triplets with at least the loss's margin (triplets beyond the
            loss's margin add 0).
        impl: ``"auto"`` (the default) or the name of an implementation; see `Criterion`.

    Returns:
        A `Criterion`.

    Raises:
        ImportError: pytorch-metric-learning 2.9 is not installed.
        TypeError: an unknown class of loss.
        ValueError: a loss or miner that flashpair cannot reproduce, with every reason.

    Examples:
        >>> from flashpair.compat import pml
        >>> from pytorch_metric_learning.losses import ContrastiveLoss
        >>> loss = ContrastiveLoss()
        >>> criterion = pml.fuse(loss)
        >>> x = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0], [-0.8, 0.6]])
        >>> labels = torch.tensor([0, 0, 1, 1])
        >>> torch.allclose(criterion(x, labels), loss(x, labels))
        True
    """
    check_name(impl)
    modules = _library()
    known, switch = _switch(loss, modules)
    owner, reasons = known.__name__, list[str]()
    unchanged(loss, known, "loss", reasons)
    statistics(loss, "loss", reasons)
    regularizers(loss, switch.parameters, reasons)
    found = similarity(loss.distance, modules, "loss", reasons)
    if found is not None and (found.kind not in switch.kinds or not (found.unit or switch.raw)):
        kinds = " or ".join(switch.kinds)
        units = "normalised or raw" if switch.raw else "normalised"
        reasons.append(f"{owner} must have a distance that is {kinds}, {units}, got {found}")
    values = numbers(loss, switch.numbers, reasons)
    for each, wanted in switch.fixed.items():
        if getattr(loss, each) != wanted:
            reasons.append(f"{each} must be {wanted!r}, got {getattr(loss, each)!r}")
    word = reduction(loss, modules, reasons)
    reasons += switch.refusals(loss, word)
    options, reductions = _mining(loss, miner, owner, found, modules, reasons)
    reductions = switch.reductions if reductions is None else reductions
    if word is not None and word not in reductions:
        taken = " or ".join(reductions)
        mined = "" if miner is None else f" with {name(miner)}"
        reasons.append(f"the reduction of {owner}{mined} must be {taken}, got {word} ({name(loss.reducer)})")
    if reasons or found is None or word is None:
        raise ValueError(f"{name(loss)} cannot be fused: {'; '.join(reasons)}")
    criterion = switch.make(Asked(loss, found, reductions[word], impl, **options), *values)
    if (weight := copied(loss, switch)) is not None:
        criterion.weight = weight
    watched = (*switch.divergences, *OF_KIND.get(found.kind, ()))
    watch = Watch(owner, watched, {each: float(getattr(loss, each)) for each in switch.watched})
    if watched:
        criterion.register_forward_hook(watch, with_kwargs=True)
    return criterion


def _library() -> Any:
    """pytorch_metric_learning with its submodules."""
    with extra("compat", "flashpair.compat.pml.fuse"):
        library = importlib.import_module("pytorch_metric_learning")
        for part in ("losses", "miners", "distances", "reducers"):
            importlib.import_module(f"pytorch_metric_learning.{part}")
    if not library.__version__.startswith("2.9."):
        raise ImportError(f"flashpair.compat.pml.fuse supports pytorch-metric-learning 2.9, got {library.__version__}")
    return library


def _switch(loss: Any, modules: Any) -> tuple[type, Switch]:
    classes = {getattr(modules.losses, each): switch for each, switch in SWITCHES.items()}
    for cls in type(loss).__mro__:
        if cls in classes:
            return cls, classes[cls]
    advice = WRAPPERS.get(name(loss), f"it must be one of {', '.join(SWITCHES)}")
    raise TypeError(f"loss {name(loss)} cannot be fused: {advice}")


def _mining(
    loss: Any, miner: Any, owner: str, found: Any, modules: Any, reasons: list[str]
) -> tuple[dict[str, Any], dict[str, str] | None]:
    """The criterion's options that replace the miner, and the reductions that are possible with them."""
    if miner is None:
        return {}, None
    for kind, of in (
        ("MultiSimilarityMiner", "MultiSimilarityLoss"),
        ("BatchHardMiner", "TripletMarginLoss"),
        ("TripletMarginMiner", "TripletMarginLoss"),
    ):
        known = getattr(modules.miners, kind)
        if isinstance(miner, known) and owner == of:
            break
    else:
        reasons.append(f"miner {name(miner)} with {owner}: no criterion has this mining")
        return {}, None
    unchanged(miner, known, "miner", reasons)
    statistics(miner, "miner", reasons)
    mined = similarity(miner.distance, modules, "miner", reasons)
    if None not in (found, mined) and found != mined:
        reasons.append(f"the miner must have the distance of the loss, {found}, got {mined}")
    if kind == "MultiSimilarityMiner":
        return {"epsilon": miner.epsilon}, None
    if kind == "BatchHardMiner":
        for limit in ("allowed_pos_range", "allowed_neg_range"):
            if getattr(miner, limit) is not None:
                reasons.append(f"{limit} of {name(miner)} must be None, got {getattr(miner, limit)!r}")
        if (miner.pos_strategy, miner.neg_strategy) != ("hard", "hard"):
            reasons.append("the strategies of BatchHardMiner were changed")
        return {"triplets": "hard"}, VALID
    kept = miner.type_of_triplets
    if kept not in ("all", "semihard"):
        reasons.append(f"type_of_triplets of {name(miner)} must be all or semihard, got {kept}")
    if loss.smooth_loss:
        reasons.append(f"smooth_loss with {name(miner)}: a triplet outside of the margin adds to the loss")
    if not miner.margin >= loss.margin:
        reasons.append(f"the margin of {name(miner)} must be at least the loss's, {loss.margin}, got {miner.margin}")
    return {"triplets": "semihard_all" if kept == "semihard" else "all"}, {"nonzero": "nonzero", "sum": "sum"}
