"""What a criterion of a user's own returns, or forgets, is told by name: the method, what it gave, what it takes."""

from __future__ import annotations

import pytest
import torch

import flashpair
from flashpair import Reduction, RowLosses
from flashpair.losses.base import Penalty, Terms

COMMON = {"normalize": True, "reduction": "mean", "impl": "auto"}
N = 12


def batch():
    return torch.randn(N, 6, generator=torch.Generator().manual_seed(0)), torch.arange(N) // 3


def sums(pairs):
    return pairs.reduce(Reduction("sum", "positives"))[0]


def every(r):
    return torch.ones_like(r, dtype=torch.bool)


def whole(s, p):
    return RowLosses(sums(p), every(sums(p)), N)


def own(row_losses=whole, **attributes):
    return type("Own", (flashpair.Criterion,), {"row_losses": row_losses, **attributes})(**COMMON)


def against_memory(criterion, x, labels):
    return flashpair.CrossBatchMemory(criterion, x.shape[1], 32)(x, labels)


def against_stream(criterion, x, labels):
    return criterion(x, labels, ref_emb=flashpair.StreamedReferences(x, labels))


WAYS = {
    "auto": lambda criterion, x, labels: criterion(x, labels),
    "memory": against_memory,
    "stream": against_stream,
    "weights": flashpair.pair_weights,
}
ROWS = {
    "nothing": (lambda s, p: None, TypeError, "row_losses of Own must return RowLosses.*, got NoneType None"),
    "a number": (lambda s, p: 3.0, TypeError, "row_losses of Own must return RowLosses.*, got float 3.0"),
    "a tuple": (
        lambda s, p: (sums(p), every(sums(p)), N),
        TypeError,
        "row_losses of Own must return RowLosses.*, got tuple of 3",
    ),
    "too few": (
        lambda s, p: RowLosses(sums(p)[:4], every(sums(p)[:4]), 4),
        ValueError,
        r"losses of Own must have shape \(12,\), one a row, got float32 \(4,\)",
    ),
    "whole numbers": (
        lambda s, p: RowLosses(sums(p).long(), every(sums(p)), N),
        TypeError,
        "losses of Own must be float32 or float64, .*got int64",
    ),
    "half": (lambda s, p: RowLosses(sums(p).half(), every(sums(p)), N), TypeError, "float32 or float64, .*got float16"),
    "another device": (
        lambda s, p: RowLosses(sums(p).to("meta"), every(sums(p)), N),
        ValueError,
        "losses of Own must be on the device of embeddings, cpu, got float32 .* on meta",
    ),
    "valid elsewhere": (
        lambda s, p: RowLosses(sums(p), every(sums(p)).to("meta"), N),
        ValueError,
        "valid of Own must be on the device of embeddings, cpu, got bool .* on meta",
    ),
    "a number of losses": (lambda s, p: RowLosses(1.0, True, N), TypeError, "losses of Own must be a tensor"),
    "no denominator": (
        lambda s, p: RowLosses(sums(p), every(sums(p)), None),
        TypeError,
        "denominator of Own must be an int, or a tensor of shape .*, got NoneType",
    ),
    "denominators": (
        lambda s, p: RowLosses(sums(p), every(sums(p)), p.num_positives()),
        ValueError,
        r"denominator of Own must be an int, or a tensor of shape \(\), got int64 \(12,\)",
    ),
    "no terms": (
        lambda s, p: RowLosses(sums(p), every(sums(p)), N, (sums(p),)),
        TypeError,
        "terms of Own must be a tuple of Terms",
    ),
    "few terms": (
        lambda s, p: RowLosses(sums(p), every(sums(p)), N, (Terms(sums(p), p.num_positives()[:3]),)),
        TypeError,
        r"number in terms of Own must be a tensor of shape \(12,\), one a row, got int64 \(3,\)",
    ),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", ROWS)
def test_rows(case, way):
    row_losses, error, words = ROWS[case]
    with pytest.raises(error, match=words):
        WAYS[way](own(row_losses), *batch())


@pytest.mark.parametrize("reduction", ["mean", "sum", "none", "mean_valid", "nonzero"])
@pytest.mark.parametrize("impl", ["reference", "auto"])
def test_too_few_rows_with_every_reduction(reduction, impl):
    criterion = own(ROWS["too few"][0])
    criterion.reduction, criterion.impl = reduction, impl
    with pytest.raises(ValueError, match=r"losses of Own must have shape \(12,\)"):
        criterion(*batch())


@pytest.mark.parametrize("anchors", ["samples", "proxies"])
@pytest.mark.parametrize("size", [2**25, 64])
def test_rows_against_class_weights(anchors, size, monkeypatch):
    """As many as there are samples, or proxies; also where weights come in chunks."""
    monkeypatch.setattr("flashpair.chunked.class_weights.CHUNK_BYTES", size)
    rows = {"samples": N, "proxies": 9}[anchors]

    def make(row_losses):
        names = {"row_losses": row_losses, "anchors": anchors}
        return type("Own", (flashpair.ClassCriterion,), names)(9, 6, **COMMON)

    good = make(lambda s, p: RowLosses(sums(p), every(sums(p)), p.count))
    assert good(*batch()).isfinite()
    with pytest.raises(ValueError, match=rf"losses of Own must have shape \({rows},\), one a row"):
        make(lambda s, p: RowLosses(sums(p)[:5], every(sums(p)[:5]), 5))(*batch())
    with pytest.raises(ValueError, match=rf"offset of reductions\[0\] must have shape \(\) or \({rows},\)"):
        make(lambda s, p: p.reduce(Reduction("sum", "positives", offset=torch.ones(3))))(*batch())


@pytest.mark.parametrize("base", [flashpair.Criterion, flashpair.ClassCriterion, flashpair.NTXentLoss])
def test_an_init_that_forgets_its_parents(base):
    def forgets(self):
        self.margin = 1.0

    def half(self):
        torch.nn.Module.__init__(self)

    for init in (forgets, half):
        with pytest.raises(TypeError, match=r"__init__ of Own must call super\(\).__init__\(.*normalize=\.\.\., reduc"):
            type("Own", (base,), {"__init__": init, "row_losses": whole})()
    if base is flashpair.ClassCriterion:

        def grandparents(self):
            flashpair.Criterion.__init__(self, **COMMON)

        with pytest.raises(TypeError, match=r"must call super\(\).__init__\(num_classes, embedding_size, normalize"):
            type("Own", (base,), {"__init__": grandparents})()


@pytest.mark.parametrize(
    "name, value, words",
    [
        (
            "regularizer",
            lambda s, *a: 0.5,
            "regularizer of Own must return None or a floating-point tensor .*float 0.5",
        ),
        ("regularizer", lambda s, *a: torch.ones(N), r"regularizer of Own must .*got float32 \(12,\)"),
        ("penalty_of", lambda s, *a: 0.5, "penalty_of of Own must return None or Penalty"),
        ("penalty_of", lambda s, *a: Penalty(torch.ones(()), 3), "penalty_of of Own must return None or Penalty"),
        ("preparation", (False, lambda x: x[:3]), r"preparation of Own must return floating-point rows \(12, D\)"),
        ("preparation", (False, lambda x: None), "preparation of Own must return floating-point rows .*NoneType"),
        ("rows", lambda s, *a: whole(s, s.pairs_of(*a)), "rows of Own must return a tuple of RowLosses and the pairs"),
    ],
)
def test_other_methods(name, value, words):
    with pytest.raises(TypeError, match=words):
        own(**{name: value})(*batch())


@pytest.mark.parametrize(
    "reductions, error, words",
    [
        ((), ValueError, "at least one Reduction, got none"),
        (("sum",), TypeError, r"reductions\[0\] must be a Reduction, got str 'sum'"),
        (([Reduction("sum", "all")],), TypeError, r"reductions\[0\] must be a Reduction, got list of 1"),
        ((Reduction("sum", "all", offset="a"),), TypeError, "offset of .* must be a number or a tensor, got str 'a'"),
        ((Reduction("sum", "all", offset=torch.ones(3)),), ValueError, r"must have shape \(\) or \(12,\), got float32"),
        ((Reduction("sum", "all", lower=torch.ones(3)),), ValueError, r"lower of reductions\[0\] must have shape"),
        ((Reduction("sum", "all", scale=None),), TypeError, "scale of .* must be a number or a tensor, got NoneType"),
        (
            (Reduction("sum", "all", offset=torch.ones(N, device="meta")),),
            ValueError,
            r"offset of reductions\[0\] must be on the device of embeddings, cpu",
        ),
    ],
)
@pytest.mark.parametrize("impl", ["reference", "auto"])
def test_what_reduce_takes(reductions, error, words, impl):
    criterion = own(lambda s, p: p.reduce(*reductions))
    criterion.impl = impl
    with pytest.raises(error, match=words):
        criterion(*batch())


def test_a_reduction_that_was_set_to_another_word():
    criterion = own()
    criterion.reduction = "average"
    with pytest.raises(ValueError, match=r"reduction must be one of mean, sum, .* got 'average'"):
        criterion(*batch())


def by_frequency(s, pairs):
    """Rows weighted by how common their class is among all references."""
    same = (pairs.labels[:, None] == pairs.ref_labels[None, :]).sum(1)
    losses = pairs.reduce(Reduction("logsumexp", "negatives"))[0] * same / pairs.ref_labels.shape[0]
    return RowLosses(losses, every(losses), losses.shape[0])


def test_labels_of_references_in_pieces_are_those_of_all():
    x, labels = batch()
    y, y_labels = torch.randn(50, 6, generator=torch.Generator().manual_seed(1)), torch.arange(50) % 7
    criterion = own(by_frequency)
    stream = flashpair.StreamedReferences(y, y_labels, block=8)
    torch.testing.assert_close(
        criterion(x, labels, ref_emb=stream), criterion(x, labels, ref_emb=y, ref_labels=y_labels)
    )
    memory = flashpair.CrossBatchMemory(criterion, 6, 40)
    for first in (0, 12, 24):
        memory(y[first : first + 12], y_labels[first : first + 12])
    found = memory(x, labels)
    unit = torch.nn.functional.normalize(torch.cat([x, memory.memory[:28]]))
    every_label = torch.cat([labels, memory.labels[:28]])
    z = (unit[:N] @ unit.T).masked_fill(labels[:, None] == every_label, -torch.inf)
    share = (labels[:, None] == every_label).sum(1) / 40
    torch.testing.assert_close(found, (z.logsumexp(1) * share).mean())


@pytest.mark.parametrize("attribute", ["y", "refs"])
def test_rows_of_references_in_pieces_are_not_to_be_had(attribute):
    def rows(s, pairs):
        return RowLosses(getattr(pairs, attribute).sum(1), every(sums(pairs)), N)

    for way in (against_memory, against_stream):
        with pytest.raises(AttributeError, match=rf"pairs\.{attribute} is not available for references in chunks"):
            way(own(rows), *batch())


METHODS = {
    "forward": lambda self, embeddings, labels: embeddings.sum(),
    "_loss": lambda self, *a: a[0].sum(),
    "_by_rows": lambda self, *a: a[0].sum(),
    "rows": lambda self, *a: (whole(self, self.pairs_of(*a)), None),
    "pairs_of": lambda self, x, *a: flashpair.Criterion.pairs_of(self, 2 * x, *a),
    "prepared": lambda self, x, y: (2 * x, y, True),
}


@pytest.mark.parametrize("name", METHODS)
def test_what_a_memory_or_a_stream_would_not_call_is_refused(name):
    criterion = own(**{name: METHODS[name]})
    x, labels = batch()
    with pytest.raises(TypeError, match=f"Own overrides {name}, which CrossBatchMemory does not call"):
        flashpair.CrossBatchMemory(criterion, 6, 32)
    changed = own()
    vars(changed)[name] = METHODS[name].__get__(changed)
    with pytest.raises(TypeError, match=f"Own overrides {name}, which CrossBatchMemory does not call"):
        flashpair.CrossBatchMemory(changed, 6, 32)
    if name != "forward":
        with pytest.raises(TypeError, match=f"Own overrides {name}, which StreamedReferences does not call"):
            against_stream(criterion, x, labels)
    if name not in ("pairs_of", "prepared"):
        with pytest.raises(TypeError, match=f"Own overrides {name}, which pair_weights does not call"):
            flashpair.pair_weights(criterion, x, labels)


def test_what_is_not_refused_is_called():
    """A preparation, a penalty and a `forward` that calls the parent's."""

    class Own(flashpair.MultiSimilarityLoss):
        @property
        def preparation(self):
            return True, None

        def penalty_of(self, x, labels, y, ref_labels, drawn=None):
            return Penalty(x.square().sum(), torch.full_like(x[0, 0], x.shape[0]))

        def forward(self, *a, **k):
            return 2 * super().forward(*a, **k)

    x, labels = batch()
    plain, stream = flashpair.MultiSimilarityLoss(), flashpair.StreamedReferences(x, labels)
    wanted = 2 * (plain(x, labels, ref_emb=stream) + x.square().sum() / N)
    torch.testing.assert_close(Own()(x, labels, ref_emb=stream), wanted)
