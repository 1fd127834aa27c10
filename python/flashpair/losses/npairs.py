"""Multi-class N-pair loss (Sohn, NIPS 2016) in its forms, on dot products that are not normalised.

mc:         L_k = log(1 + sum_{l != k} e^(f_k . f_l+ - f_k . f_k+))
ovo:        L_k = sum_{l != k} log(1 + e^(f_k . f_l+ - f_k . f_k+))
all_pairs:  L_ip = log(1 + sum_{y_n != y_i} e^(f_i . f_n - f_i . f_p)) for every positive pair (i, p)
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..core import checks
from ..core.class_pairs import ClassPairs, pick_class_pairs
from ..core.pairs import PairAccess
from ..core.reduction import Reduction
from ..core.row_formula import RowFormula
from ..core.similarity import softplus, upcast
from .base import Criterion, Penalty, RowLosses
from .declaration import Range, Search, Source, loss
from .papers import SOHN_2016

L2_KINDS = ("mean_sq", "tf_contrib", "mean_norm")


@loss(
    key="n_pairs",
    group="pairs",
    sources=(Source(SOHN_2016, "`mc` and `ovo`"),),
    note="`all_pairs` and `softlabel` take any batch",
    forms={
        "": {},
        "('ovo')": {"variant": "ovo"},
        "('all_pairs')": {"variant": "all_pairs"},
        "('softlabel')": {"variant": "softlabel"},
    },
    searches={"": Search({"l2_weight": Range(1e-4, 1.0, log=True)})},
)
class NPairsLoss(Criterion):
    """Multi-class N-pair loss, on dot products that are not normalised (Sohn, 2016).

    f_k is the anchor of class k, f_k+ its positive; f_i . f_j is a dot product:

        "mc":         L_k  = log(1 + sum_{l != k} e^(f_k . f_l+ - f_k . f_k+))
        "ovo":        L_k  = sum_{l != k} log(1 + e^(f_k . f_l+ - f_k . f_k+))
        "all_pairs":  L_ip = log(1 + sum_{y_n != y_i} e^(f_i . f_n - f_i . f_p))
        "softlabel":  L_i  = log sum_{j != i} e^(f_i . f_j) - mean_P f_i . f_p

    - ``"mc"`` and ``"ovo"`` take one pair of each class: its first two samples in batch order as anchor and positive,
      or with `ref_emb` its first sample and its first reference. The other classes' positives are the negatives.
      Classes without a pair, and further samples of a class, take no part.
    - ``"all_pairs"`` takes every positive pair, with all samples of other classes as negatives.
    - ``"softlabel"`` is the cross entropy of each anchor's similarities against equal shares of its positives. With
      anchors as embeddings and positives as `ref_emb` it is TensorFlow Addons' npairs_loss, which allows repeated
      classes.

    Args:
        variant: ``"mc"`` (the default), ``"ovo"``, ``"all_pairs"`` or ``"softlabel"``.
        l2_weight: weight of a penalty on the norms of the embeddings before normalisation, at least 0 (Sohn: 0.02,
            times 0.25 in the code); a number or a learnable tensor ().
        l2_kind: the penalty, over the vectors f that take part: ``"mean_sq"``: mean |f|^2; ``"tf_contrib"``: half of
            that (tf.contrib's 0.25 (mean |f|^2 + mean |f+|^2)); ``"mean_norm"``: mean |f|.
        normalize: L2-normalise the embeddings and references first; by default they are taken as they are.
        reduction: ``"mean"`` (the default) divides by the number of classes with a pair (``"all_pairs"``: of ordered
            positive pairs; ``"softlabel"``: by N). With "none" a class's loss is in its anchor's row. Others: see
            `Criterion`.
        impl: ``"auto"`` (the default) or the name of an implementation; see `Criterion`.

    Shape:
        - embeddings: (N, D), float16 to float64. labels: (N,), integers.
        - ref_emb: (M, D) and ref_labels: (M,), optional.
        - output: (), or (N,) with ``reduction="none"``; float32, or float64 for float64 inputs.

    Raises:
        TypeError: `l2_weight` is not a number or tensor, `normalize` not a bool.
        ValueError: `l2_weight` is below 0; an unknown `variant`, `l2_kind`, `reduction` or `impl`.

    Examples:
        >>> x = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0], [-0.8, 0.6]])
        >>> labels = torch.tensor([0, 0, 1, 1])
        >>> round(flashpair.NPairsLoss()(x, labels).item(), 4)
        0.5093
    """

    shown = ("variant", "l2_weight", "l2_kind")

    def __init__(
        self,
        variant: str = "mc",
        l2_weight: float | Tensor = 0.0,
        l2_kind: str = "mean_sq",
        *,
        normalize: bool = False,
        reduction: str = "mean",
        impl: str = "auto",
    ) -> None:
        super().__init__(normalize=normalize, reduction=reduction, impl=impl)
        self.variant = checks.word(variant, ("mc", "ovo", "all_pairs", "softlabel"), "variant")
        self.l2_weight = checks.number(l2_weight, "l2_weight", at_least=0)
        self.l2_kind = checks.word(l2_kind, L2_KINDS, "l2_kind")

    def row_losses(self, pairs: PairAccess) -> RowLosses:
        if self.variant == "softlabel":
            return self._soft_labels(pairs)
        return self._every_pair(pairs) if self.variant == "all_pairs" else self._one_pair_a_class(pairs)

    def row_formula(self) -> RowFormula | None:
        if self.variant == "softlabel":
            return None
        name = {"mc": "n_pair", "ovo": "one_vs_one"}.get(self.variant, "all_pairs")
        return RowFormula(name, (-1.0, 1.0), one_pair=self.variant != "all_pairs")

    def _every_pair(self, pairs: PairAccess) -> RowLosses:
        (neg,) = pairs.reduce(Reduction("logsumexp", "negatives"))
        (losses,) = pairs.reduce(Reduction("sum", "positives", "softplus", scale=-1.0, offset=neg))
        positives = pairs.num_positives()
        return RowLosses(losses, positives > 0, positives.sum())

    def _soft_labels(self, pairs: PairAccess) -> RowLosses:
        pos, every = pairs.reduce(Reduction("sum", "positives"), Reduction("logsumexp", "all"))
        positives = pairs.num_positives()
        valid = positives > 0
        losses = torch.where(valid, every, 0.0) - pos / positives.clamp_min(1)
        return RowLosses(losses, valid, valid.shape[0])

    def _one_pair_a_class(self, pairs: PairAccess) -> RowLosses:
        chosen = pairs.class_pairs()
        few = pairs.take_pairs(chosen)
        target = few.matched_similarities()
        if self.variant == "mc":
            (neg,) = few.reduce(Reduction("logsumexp", "negatives"))
            losses = softplus(neg - target)
        else:
            (losses,) = few.reduce(Reduction("sum", "negatives", "softplus", offset=-target))
        taken = chosen.place < chosen.taken
        rows = losses.new_zeros(pairs.labels.shape[0])
        losses = rows.index_add(0, chosen.anchors, torch.where(taken, losses, 0.0))
        valid = rows.detach().index_add(0, chosen.anchors, taken.to(rows.dtype)) > 0
        return RowLosses(losses, valid, chosen.taken)

    @property
    def penalizes_references(self) -> bool:  # type: ignore[override]
        return isinstance(self.l2_weight, Tensor) or self.l2_weight != 0.0

    def penalty_of(
        self, x: Tensor, labels: Tensor, y: Tensor | None, ref_labels: Tensor | None, chosen: ClassPairs | None = None
    ) -> Penalty | None:
        if not self.penalizes_references:
            return None
        x, y = upcast(x, y)
        if self.variant in ("all_pairs", "softlabel"):
            squares = torch.cat([x, *([] if y is None else [y])]).square().sum(1)
            weight = torch.ones_like(squares)
        else:
            chosen = pick_class_pairs(labels, ref_labels) if chosen is None else chosen
            refs = x if y is None else y
            squares = torch.cat([x[chosen.anchors], refs[chosen.positives]]).square().sum(1)
            both = (chosen.anchors, chosen.positives)
            weight = torch.cat([(torch.arange(len(t), device=x.device) < chosen.taken) for t in both]).to(x.dtype)
        if self.l2_kind == "mean_norm":
            nonzero = squares > 0
            size = torch.where(nonzero, torch.where(nonzero, squares, 1.0).sqrt(), 0.0)
        else:
            size = squares if self.l2_kind == "mean_sq" else squares / 2
        return Penalty(self.l2_weight * (size * weight).sum(), weight.sum())
