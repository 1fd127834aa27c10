"""What metrics and samplers are given that is nearly what they take: taken, or refused by name."""

from __future__ import annotations

import numpy as np
import pytest
import torch

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
    for labels in (*kinds, list(LABELS), tuple(numbers), LABELS.to(torch.int16)):
        assert list(make(labels)) == expected


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
@pytest.mark.parametrize(
    "labels", [list("abca"), np.array(list("abca")), Column(np.array(["a", None])), None, [[1], [1, 2]]]
)
def test_samplers_name_labels_that_are_no_integers(make, labels):
    with pytest.raises(TypeError, match="labels must be integers, a tensor or a sequence of shape"):
        make(labels)
