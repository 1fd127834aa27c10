"""What metrics and samplers are given that is nearly what they take: taken, or refused by name."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import flashpair
from flashpair import metrics
from flashpair.samplers import HardClassSampler, MPerClassSampler, NPairsSampler

LABELS = torch.arange(12) % 4
X = torch.nn.functional.one_hot(LABELS, 6).float() + 0.1 * torch.randn(
    12, 6, generator=torch.Generator().manual_seed(0)
)
GALLERY = (X[:8], LABELS[:8] + 1)


def test_one_number_is_some():
    assert metrics.retrieval(X, LABELS, recall_at=2) == metrics.retrieval(X, LABELS, recall_at=(2,))
    assert metrics.verification_rate(X, LABELS, negatives=2) == metrics.verification_rate(X, LABELS, negatives=[2])
    one, some = (metrics.identification(X, LABELS, *GALLERY, false_alarm_rates=r) for r in (0.5, [0.5]))
    assert one == some and list(one.open_set) == [0.5]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: metrics.retrieval(X, LABELS, recall_at="1"), "recall_at must be a sequence of ints, or one, got str"),
        (lambda: metrics.retrieval(X, LABELS, recall_at=None), "recall_at must be a sequence of ints, or one"),
        (lambda: metrics.retrieval(X, LABELS, recall_at=1.5), "recall_at must be an int, got float 1.5"),
        (lambda: metrics.retrieval(X, LABELS, recall_at=True), "recall_at must be an int, got bool True"),
        (lambda: metrics.retrieval(X, LABELS, recall_at=0), "recall_at must be at least 1, got 0"),
        (lambda: metrics.verification_rate(X, LABELS, negatives=None), "negatives must be a sequence of ints, or one"),
        (
            lambda: metrics.identification(X, LABELS, *GALLERY, false_alarm_rates="1"),
            "false_alarm_rates must be a sequence of numbers, or one",
        ),
        (lambda: metrics.clustering_scores([0, 1], LABELS), "labels must be an integer tensor"),
        (lambda: metrics.clustering_scores(LABELS, [0, 1]), "clusters must be an integer tensor"),
        (lambda: metrics.clustering_scores(torch.tensor(1), LABELS), "labels must be an integer tensor of shape"),
        (lambda: metrics.confidence_interval(1.0), "runs must be a sequence of numbers, got 1.0"),
        (lambda: metrics.knn_accuracy(X, LABELS, k=12), "k must be at most 11, the number of references, got 12"),
        (lambda: metrics.knn_labels(X, X, LABELS, k=0), "k must be at least 1, got 0"),
    ],
)
def test_what_is_not_taken_is_named(call, words):
    with pytest.raises((TypeError, ValueError), match=words):
        call()


class Column:
    """As pandas has them: its own index, so that a place in it is not a row."""

    def __init__(self, values):
        self.values = values

    def to_numpy(self):
        return np.asarray(self.values)


MAKERS = {
    "per class": lambda labels: MPerClassSampler(labels, 2, 8),
    "pairs": lambda labels: NPairsSampler(labels, 3),
    "hard": lambda labels: HardClassSampler(labels, lambda places: X[places], 2),
}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_samplers_take_labels_of_any_kind(make):
    expected = list(make(LABELS))
    numbers = LABELS.numpy()
    kinds = (LABELS.tolist(), numbers, numbers.astype(">i4"), Column(numbers), Column(numbers.astype(">i8")))
    for labels in (*kinds, list(LABELS), tuple(numbers), numbers.astype(object), LABELS.to(torch.int16)):
        assert list(make(labels)) == expected


def test_numbers_of_numpy_are_numbers():
    one = metrics.retrieval(X, LABELS, recall_at=(1, 2))
    assert metrics.retrieval(X, LABELS, recall_at=np.array([1, 2])) == one
    assert metrics.retrieval(X, LABELS, recall_at=np.int64(2)).recall == {2: one.recall[2]}
    assert metrics.verification_rate(X, LABELS, negatives=np.int32(2)) == metrics.verification_rate(
        X, LABELS, negatives=2
    )
    rates = (np.float32(0.5), np.float64(0.5), 0.5)
    found = [metrics.identification(X, LABELS, *GALLERY, false_alarm_rates=rate) for rate in rates]
    assert found[0] == found[1] == found[2]
    assert metrics.knn_accuracy(X, LABELS, k=np.int64(3)) == metrics.knn_accuracy(X, LABELS, k=3)
    assert flashpair.NTXentLoss(np.float32(0.5)).temperature == 0.5
    assert torch.equal(flashpair.nearest(X, np.int64(2)).indices, flashpair.nearest(X, 2).indices)


NUMPY = LABELS.numpy()
TEXT = np.array(list("abcabcabcabc"))
# Labels that no call takes, and how the error says to mend them.
UNTAKEN = {
    "text": (
        list(TEXT.tolist()),
        r"str 'a'; turn text into numbers first: numpy.unique\(values, return_inverse=True\)",
    ),
    "text array": (TEXT, "dtype <U1 .*; turn text into numbers first: numpy.unique"),
    "objects": (TEXT.astype(object), r"dtype object .*; values.astype\(int\) or values.astype"),
    "column": (Column(NUMPY), r"torch.tensor\(values.to_numpy\(\)\) makes a tensor of it"),
    "list": (LABELS.tolist(), "list of 12, the first of them int 0; torch.as_tensor makes a tensor of it"),
    "tensors": (list(LABELS), r"the first of them int64 \(\) on cpu; torch.stack makes one tensor of them"),
    "array": (NUMPY, "dtype int64 .*; torch.as_tensor makes a tensor of it"),
    "big-endian": (NUMPY.astype(">i8"), "dtype >i8 .*; .*this machine's byte order"),
    "floats": (LABELS.float(), r"got float32 \(12,\) on cpu; .*s.to\(torch.int64\) if they are whole numbers"),
}
CALLS = {
    "criterion": lambda labels: flashpair.NTXentLoss()(X, labels),
    "references": lambda labels: flashpair.NTXentLoss()(X, LABELS, ref_emb=X, ref_labels=labels),
    "References": lambda labels: flashpair.References(X, labels),
    "stream": lambda labels: flashpair.StreamedReferences(X, labels),
    "memory": lambda labels: flashpair.CrossBatchMemory(flashpair.NTXentLoss(), 6, 20)(X, labels),
    "row_reduce": lambda labels: flashpair.row_reduce(X, labels, flashpair.Reduction("sum", "all")),
    "miner": lambda labels: flashpair.miners.MultiSimilarityMiner()(X, labels),
    "retrieval": lambda labels: metrics.retrieval(X, labels),
    "gallery": lambda labels: metrics.identification(X, LABELS, X, labels),
    "clusters": lambda labels: metrics.clustering_scores(LABELS, labels),
    "classes": lambda labels: metrics.clustering_scores(labels, LABELS),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("kind", UNTAKEN)
def test_labels_that_are_no_tensor_of_integers_and_how_to_mend_them(kind, call):
    labels, words = UNTAKEN[kind]
    if call in ("clusters", "classes"):
        pytest.importorskip("sklearn")
    with pytest.raises(TypeError, match=f"(labels|clusters) must be an integer tensor of shape .*{words}"):
        CALLS[call](labels)


def test_columns_and_swapped_arguments():
    with pytest.raises(ValueError, match=r"labels must have shape .* got int64 \(12, 1\) on cpu; labels.squeeze\(1\)"):
        flashpair.NTXentLoss()(X, LABELS[:, None])
    with pytest.raises(TypeError, match=r"got int64 \(12,\) on cpu; embeddings come first, then labels"):
        flashpair.NTXentLoss()(LABELS, X)
    with pytest.raises(ValueError, match=r"labels must be a tensor of shape \(12,\) like inputs, .*torch.as_tensor"):
        flashpair.GradCache(torch.nn.Linear(6, 3), flashpair.NTXentLoss(), micro_batch=4)(X, NUMPY)
    with pytest.raises(TypeError, match=r"inputs must be a tensor .*, got numpy ndarray .*; torch.as_tensor makes"):
        flashpair.GradCache(torch.nn.Linear(6, 3), flashpair.NTXentLoss(), micro_batch=4)(X.numpy(), LABELS)
    stream = flashpair.StreamedReferences(list(X.numpy()), LABELS)
    with pytest.raises(TypeError, match=r"source must give .* got numpy ndarray .*; torch.as_tensor makes a tensor"):
        flashpair.NTXentLoss()(X, LABELS, ref_emb=stream)


@pytest.mark.parametrize(
    "call, words",
    [
        (
            lambda: metrics.retrieval(X[:0], LABELS[:0]),
            "embeddings must have two rows or more, got 0 queries and 0 references",
        ),
        (
            lambda: metrics.retrieval(X, LABELS, X[:0], LABELS[:0]),
            "embeddings and ref_emb must not be empty, got 12 queries and 0",
        ),
        (lambda: flashpair.nearest(X[:0], 2), "k must be at most 0, the number of references, got 2"),
        (lambda: flashpair.nearest(X, 1.5), "k must be an int, got float 1.5"),
        (lambda: MPerClassSampler(LABELS[:0], 2, 4), "labels must have 2 classes .* got 0"),
    ],
)
def test_nothing_is_named(call, words):
    with pytest.raises((TypeError, ValueError), match=words):
        call()


@pytest.mark.parametrize(
    "embed, words",
    [
        (lambda places: X.numpy(), r"embed must return floating-point embeddings \(8, D\) .*numpy.*; torch.as_tensor"),
        (lambda places: None, r"embed must return floating-point embeddings \(8, D\) of as many places, got NoneType"),
        (lambda places: X[places][:3], r"embed must return embeddings \(8, D\), D > 0, got float32 \(3, 6\)"),
        (lambda places: X[places][:, 0], r"embed must return embeddings \(8, D\), D > 0, got float32 \(8,\)"),
    ],
)
def test_what_embed_returns_is_looked_at(embed, words):
    with pytest.raises((TypeError, ValueError), match=words):
        list(HardClassSampler(LABELS, embed, 2))


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
@pytest.mark.parametrize(
    "labels", [list("abca"), np.array(list("abca")), Column(np.array(["a", None])), None, [[1], [1, 2]]]
)
def test_samplers_name_labels_that_are_no_integers(make, labels):
    with pytest.raises(TypeError, match="labels must be integers, a tensor or a sequence of shape"):
        make(labels)
