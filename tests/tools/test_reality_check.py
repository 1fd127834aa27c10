"""The reality-check protocol: who is trained on what, what is kept of it, and that a killed run loses nothing."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
from filelock import FileLock
from golden import load as oracle
from reality_check_cases import SMALL, Trainings, features
from torch import nn

import flashpair
from flashpair.metrics import retrieval
from flashpair.tools.reality_check import (
    LOSSES,
    Data,
    Protocol,
    candidate,
    partitions,
    run,
    study,
    training,
)
from flashpair.tools.reality_check.study import METRICS

pytestmark = pytest.mark.usefixtures("one_thread")


def test_oracle_split():
    golden = oracle()["metrics"]["cv_split"]
    tested, folds = partitions(golden["num_classes"], len(golden["folds"]))
    assert [tested[0], tested[-1]] == golden["test"]
    for validated, expected in zip(folds, golden["folds"], strict=True):
        assert [validated[0], validated[-1]] == expected["val"]
        assert sum(map(len, folds)) - len(validated) == expected["train_count"]
    tested, folds = partitions(23)
    assert sorted([*tested, *itertools.chain(*folds)]) == list(range(23))


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("end", [0, 1])
def test_losses_are_made_of_both_ends_of_their_space(name, end):
    loss = candidate(name)
    values = {key: bounds[end] for key, bounds in loss.space.items()}
    criterion = training.made(loss, values, 5, 8)
    x = torch.randn(20, 8, generator=torch.Generator().manual_seed(1), requires_grad=True)
    value = criterion(x, torch.arange(20) % 5)
    value.backward()
    assert value.isfinite() and x.grad.isfinite().all()
    assert loss.of_classes == isinstance(criterion, flashpair.ClassCriterion)


def test_batches_of_few_classes():
    assert training.samples_of_a_class(32, 4, 8) == 4
    assert training.samples_of_a_class(32, 4, 7) == 8
    assert training.samples_of_a_class(32, 1, 100) == 1
    assert training.samples_of_a_class(32, 40, 2) == 32
    with pytest.raises(ValueError, match="needs at least one class, got 0"):
        training.samples_of_a_class(32, 4, 0)


def test_the_best_epoch_is_kept(monkeypatch):
    """Validation scores by epoch that are made up; what is returned is the network of the best one."""
    data, seen = features(), []
    scores = iter([0.1, 0.5, 0.4, 0.6, 0.6, 0.55, 0.2, 0.9])
    embedded = training.embed

    def judged(network, data, places):
        seen.append(embedded(network, data, places))
        return seen[-1]

    monkeypatch.setattr(training, "embed", judged)
    fake = lambda *given, **options: type("Found", (), {"map_at_r": next(scores)})  # noqa: E731
    monkeypatch.setattr(training, "retrieval", fake)
    protocol = Protocol(iterations=3, evaluate_every=2, patience=4, max_epochs=50, batch_size=8, embedding_size=4)
    found = training.train(
        data, range(4), range(4, 8), candidate("contrastive"), {"pos_margin": 0.0, "neg_margin": 1.0}, protocol,
        study.network, 3,
    )  # fmt: skip
    assert (found.epoch, found.map_at_r) == (6, 0.6)
    assert len(seen) == 7, "12 is more than 4 epochs after 6"
    assert torch.equal(embedded(found.network, data, training.places_of(data, range(4, 8))), seen[3])


def test_a_training_sees_its_classes_alone(monkeypatch):
    """Validation and test samples are NaN to it: no mean, no batch may hold one."""
    data = features()
    trained, validated = [0, 2, 5, 7], [1, 3]
    poisoned = Data("made", data.samples.clone(), data.labels)
    poisoned.samples[~torch.isin(data.labels, torch.tensor([*trained, *validated]))] = torch.nan
    values = {"own_learning_rate": 0.01, "temperature": 0.1}
    for given in (data, poisoned):
        found = training.train(
            given, trained, validated, candidate("normalized_softmax"), values, SMALL, study.network, 0
        )
        again = training.embed(found.network, given, training.places_of(given, validated))
        labels = data.labels[training.places_of(given, validated)]
        assert retrieval(again, labels).map_at_r == found.map_at_r
        if given is data:
            first = again
    assert torch.equal(first, again)


@pytest.mark.parametrize("sampler", ["tpe", "gp"])
def test_a_killed_run_loses_nothing(sampler, tmp_path):
    """Stopped again and again, amid trials and repeats, it comes to the numbers of a run that was left alone."""
    data = features()
    protocol = Protocol(**{**vars(SMALL), "sampler": sampler, "trials": 12 if sampler == "gp" else 3})
    alone = Trainings()
    expected = run(data, ["contrastive", "proxy_anchor"], protocol, tmp_path / "alone", progress=alone)
    wanted = 2 * 4 * (protocol.trials + protocol.repeats)
    assert alone.begun == wanted
    begun = stops = 0
    for stop in (1, 7, 9, 13) if sampler == "tpe" else (45,):
        progress = Trainings(stop)
        with pytest.raises(KeyboardInterrupt):
            run(data, ["contrastive", "proxy_anchor"], protocol, tmp_path / "killed", progress=progress)
        begun, stops = begun + progress.begun, stops + 1
    progress = Trainings()
    assert run(data, ["contrastive", "proxy_anchor"], protocol, tmp_path / "killed", progress=progress) == expected
    assert begun + progress.begun == wanted + stops, "no finished training is done again"
    assert progress.losses[:3] == ["untrained", "contrastive", "proxy_anchor"]
    untrained, *others = expected
    assert all(min(o.separated["map_at_r"]) > max(untrained.separated["map_at_r"]) for o in others)
    assert not list((tmp_path / "killed").rglob("*.pt"))


def test_more_trials_and_repeats_go_on(tmp_path):
    data, names = features(), ["contrastive"]
    more = Protocol(**{**vars(SMALL), "trials": 4, "repeats": 3})
    _, few = run(data, names, SMALL, tmp_path)
    progress = Trainings()
    _, many = run(data, names, more, tmp_path, progress=progress)
    assert many.trials == 4
    assert many.validation >= few.validation
    repeats = 3 - (2 if many.values == few.values else 0)
    assert progress.begun == 4 * (1 + repeats)
    _, again = run(data, names, SMALL, tmp_path)
    assert again == few
    best = [json.loads(f.read_text()) for f in (tmp_path / "contrastive" / "trials").iterdir()]
    by_values = {}
    for fold in best:
        by_values.setdefault(str(fold["values"]), []).append(fold["map_at_r"])
    assert many.validation == pytest.approx(max(sum(scores) / 4 for scores in by_values.values()), abs=1e-12)
    for other in (features(seed=1), data):
        changed = SMALL if other is not data else Protocol(**{**vars(SMALL), "patience": 2})
        with pytest.raises(ValueError, match=r"results of another run, with other (samples|protocol); give"):
            run(other, names, changed, tmp_path)


class Pick(nn.Module):
    """Features from `first` on."""

    def __init__(self, first):
        super().__init__()
        self.first = first

    def forward(self, x):
        return x[:, self.first : self.first + 4]


def test_separated_and_concatenated(monkeypatch, tmp_path):
    """Of models that are known: the f-th fold's picks features from f on."""
    data, folds = features(), []

    def trained(given, learned, validated, *rest):
        folds.append(partitions(18)[1].index(validated))
        assert sorted([*learned, *validated]) == list(range(9))
        return training.Trained(Pick(3 * folds[-1]), 2, 0.5)

    monkeypatch.setattr(study, "train", trained)
    protocol = Protocol(**{**vars(SMALL), "trials": 1, "repeats": 1})
    _, found = run(data, ["nt_xent"], protocol, tmp_path)
    assert folds == [0, 1, 2, 3] * 2
    assert found.validation == 0.5
    tested = data.labels >= 9
    x, labels = data.samples[tested], data.labels[tested]
    each = [torch.nn.functional.normalize(x[:, 3 * f : 3 * f + 4], dim=1) for f in range(4)]
    joined = retrieval(torch.cat(each, 1), labels)
    for metric in METRICS:
        mean = sum(getattr(retrieval(one, labels), metric) for one in each) / 4
        assert found.separated[metric] == [pytest.approx(mean, abs=1e-12)]
        assert found.concatenated[metric] == [getattr(joined, metric)]


OWN = """
import flashpair

class Own(flashpair.MultiSimilarityLoss):
    search_space = {"alpha": (1.0, 4.0), "beta": (10.0, 50.0, True)}

class Plain(flashpair.NTXentLoss):
    pass

class Bad(flashpair.NTXentLoss):
    search_space = {"temperature": (0.0, 1.0, True)}

class Misspelt(flashpair.NTXentLoss):
    search_space = {"temprature": (0.1, 1.0)}
"""


def test_a_loss_of_ones_own(tmp_path):
    path = tmp_path / "own.py"
    path.write_text(OWN)
    _, own, plain = run(features(), [f"{path}:Own", f"{path}:Plain"], SMALL, tmp_path / "out")
    assert 1 <= own.values["alpha"] <= 4 and 10 <= own.values["beta"] <= 50
    assert (own.trials, plain.trials, plain.values) == (3, 1, {})
    with pytest.raises(ValueError, match="Misspelt cannot be made of temprature"):
        run(features(), ["contrastive", f"{path}:Misspelt"], SMALL, tmp_path / "other", progress=Trainings(1))
    path.write_text(OWN.replace("NTXentLoss", "SupConLoss"))
    with pytest.raises(ValueError, match="results of another run, with other source"):
        run(features(), [f"{path}:Plain"], SMALL, tmp_path / "out")
    for name, words in [
        (f"{path}:Bad", "search_space of .* must map names"),
        (f"{path}:Missing", "has no Missing"),
        ("contrastiv", "a loss is FILE.py:Name, module:Name or one of angular"),
    ]:
        with pytest.raises(ValueError, match=words):
            candidate(name)


def test_what_cannot_be(tmp_path):
    lone = features(each=1)
    lone.labels[0] = 1
    for data, words in [
        (features(15), "at least 16 classes for 4 folds, got 15"),
        (lone, "two samples of some class of each part, got none in the test"),
    ]:
        with pytest.raises(ValueError, match=words):
            run(data, ["contrastive"], SMALL, tmp_path)
    with FileLock(tmp_path / "lock"), pytest.raises(ValueError, match="another process is at work in"):
        run(features(), ["contrastive"], SMALL, tmp_path)
    for changed, words in [
        ({"trials": 0}, "trials must be at least 1"),
        ({"sampler": "grid"}, "sampler must be one"),
        ({"per_class": 5}, "per_class must divide batch_size = 32"),
    ]:
        with pytest.raises(ValueError, match=words):
            Protocol(**changed)
