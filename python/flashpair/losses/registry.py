"""All criteria, in every form that uses the engine in another way. `check` and the tests go through them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import losses as c
from .base import Criterion
from .declaration import REGISTRY

CLASSES = 200


class OfClasses(Criterion):
    """A loss against class weights that takes embeddings of any width. Equal widths have equal weights.

    Args:
        kind: the criterion's class.
        options: its arguments beside the number of classes and the width.
        common: normalize, reduction and impl.
    """

    takes_references = False

    def __init__(self, kind: type[c.ClassCriterion], options: dict[str, Any], **common: Any) -> None:
        super().__init__(**{"normalize": True, "reduction": "mean", "impl": "auto", **common})
        self.averagings = kind.averagings
        self.kind, self.options, self.common = kind, options, common
        self.made = torch.nn.ModuleDict()

    def of_width(self, d: int) -> c.ClassCriterion:
        if str(d) not in self.made:
            with torch.random.fork_rng(devices=()):
                torch.manual_seed(d)
                self.made[str(d)] = self.kind(CLASSES, d, **self.options, **self.common)
        made: c.ClassCriterion = self.made[str(d)]  # type: ignore[assignment]
        return made

    def forward(
        self, embeddings: Tensor, labels: Tensor, *tuples: Any, ref_emb: Tensor | None = None,
        ref_labels: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        criterion = self.of_width(embeddings.shape[1]).to(embeddings.device)
        loss: Tensor = criterion(embeddings, labels, *tuples, ref_emb=ref_emb, ref_labels=ref_labels)
        return loss


def of_classes(kind: type[c.ClassCriterion], **options: Any) -> Callable[..., Criterion]:
    return functools.partial(OfClasses, kind, options)


CRITERIA: dict[str, Callable[..., Criterion]] = {
    loss.name + suffix: of_classes(loss.kind, **loss.forms[suffix]) if loss.group == "classes" else loss.form(suffix)  # type: ignore[arg-type]
    for loss in REGISTRY.values()
    for suffix in loss.forms
}
