"""Hard negative class mining (Sohn, Improved Deep Metric Learning with Multi-class N-pair Loss Objective, 2016)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core import checks
from ..core.similarity import upcast

AGGREGATES = ("max", "sum")


def hard_classes(
    anchors: Tensor, positives: Tensor, count: int, *, aggregate: str = "max", start: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:  # fmt: skip
    """Hard negative class mining: classes that the network confuses with one another (Sohn, 2016, section 3.2.3).

    It starts with one class and then repeatedly adds the class that violates the triplet constraint most with those
    chosen before. Class c violates it with a chosen class s by:

        f_s . f_c+ - f_s . f_s+

    The paper leaves open how the violations with several chosen classes combine: `aggregate` takes their maximum or
    their sum. Ties are broken at random. Each step is one product of a row with all classes: C D memory, count C D
    multiplications.

    Args:
        anchors: (C, D), float16 to float64, the embedding of a sample of each class.
        positives: (C, D), that of another sample of the same class.
        count: how many classes to choose, 1 to C.
        aggregate: ``"max"`` (the default) or ``"sum"``.
        start: the first class; None: drawn at random.
        generator: a torch.Generator on the CPU; None: torch's default one.

    Shape:
        - anchors, positives: (C, D), float16 to float64.
        - output: (count,) int64.

    Returns:
        (count,) int64 on the embeddings' device, in the order they were chosen.

    Raises:
        TypeError: an argument of a wrong type, named.
        ValueError: shapes that do not fit, `count` or `start` out of range, embeddings that are not finite, or an
            unknown `aggregate`.

    Examples:
        >>> anchors = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])
        >>> flashpair.miners.hard_classes(anchors, anchors, count=2, start=1).tolist()  # class 2 is nearer to class 1
        [1, 2]
    """
    for name, given in (("anchors", anchors), ("positives", positives)):
        checks.embeddings(given, name, "C, D")
    if anchors.shape != positives.shape or anchors.device != positives.device:
        raise ValueError(f"positives must be like anchors, {checks.what(anchors)}, got {checks.what(positives)}")
    f, positive = upcast(torch.stack([anchors, positives]).detach(), None)[0]
    if not (f.isfinite().all() and positive.isfinite().all()):
        raise ValueError("anchors and positives must be finite, got NaN or infinity")
    checks.word(aggregate, AGGREGATES, "aggregate")
    classes = f.shape[0]
    if checks.integer(count, "count", at_least=1) > classes:
        raise ValueError(f"count must be at most {classes}, the number of classes, got {count}")
    place = "cpu" if generator is None else generator.device
    if start is None:
        start = int(torch.randint(classes, (1,), generator=generator, device=place))
    elif checks.integer(start, "start") >= classes:
        raise ValueError(f"start must be below {classes}, the number of classes, got {start}")
    # In a random order, argmax breaks ties at random.
    order = torch.randperm(classes, generator=generator, device=place).to(f.device)
    f, positive = f[order], positive[order]
    own_similarity = (f * positive).sum(1)
    chosen = torch.empty(count, dtype=torch.int64, device=f.device)
    chosen[0] = (order == start).int().argmax()
    violation = f.new_full((classes,), 0.0 if aggregate == "sum" else -torch.inf)
    for k in range(1, count):
        last = chosen[k - 1 : k]
        more = (positive @ f[last].T)[:, 0] - own_similarity[last]
        violation = violation + more if aggregate == "sum" else torch.maximum(violation, more)
        violation[chosen[:k]] = -torch.inf
        chosen[k] = violation.argmax()
    return order[chosen]
