"""The reality-check protocol: who is trained on what, what is kept of it, and that a killed run loses nothing."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from filelock import FileLock
from golden import load as oracle
from PIL import Image
from sklearn.datasets import load_digits
from torch import nn

import flashpair
from flashpair.metrics import confidence_interval, retrieval
from flashpair.tools.reality_check import (
    LOSSES,
    Data,
    Protocol,
    candidate,
    load,
    partitions,
    report,
    run,
    study,
    training,
)
from flashpair.tools.reality_check.study import METRICS, Progress

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = Protocol(
    trials=3,
    repeats=2,
    embedding_size=6,
    batch_size=16,
    iterations=6,
    evaluate_every=1,
    patience=1,
    max_epochs=4,
    learning_rate=1e-3,
)


def features(classes=18, each=12, seed=0):
    """Classes that differ in four of sixteen features, under noise in all: a network that learns which finds them."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(classes).repeat_interleave(each)
    centres = torch.zeros(classes, 16)
    centres[:, :4] = 2 * torch.randn(classes, 4, generator=generator)
    noise = torch.randn(len(labels), 16, generator=generator) * torch.tensor([1.0] * 4 + [3.0] * 12)
    return Data("made", centres[labels] + noise, labels)


class Trainings(Progress):
    """Counts trainings, and stops the run in the middle of the n-th."""

    def __init__(self, stop=None):
        self.begun, self.stop, self.losses = 0, stop, []

    def at(self, level, done, of, what=""):
        self.losses += [what] if level == "losses" else []
        if level == "epochs" and done == 1:
            self.begun += 1
            if self.begun == self.stop:
                raise KeyboardInterrupt


def test_oracle_split():
    golden = oracle()["metrics"]["cv_split"]
    tested, folds = partitions(golden["num_classes"], len(golden["folds"]))
    assert [tested[0], tested[-1]] == golden["test"]
    for validated, expected in zip(folds, golden["folds"], strict=True):
        assert [validated[0], validated[-1]] == expected["val"]
        assert sum(map(len, folds)) - len(validated) == expected["train_count"]
    tested, folds = partitions(23)
    assert sorted([*tested, *itertools.chain(*folds)]) == list(range(23))


def test_digits():
    data, digits = load("digits"), load_digits()
    assert data.samples.shape == (8 * int((digits.target < 8).sum()), 1, 8, 8)
    assert data.labels.bincount().tolist() == [n for n in np.bincount(digits.target)[:8] for _ in range(8)]
    first = torch.tensor(digits.images[0]).float() / 16
    for turn in range(8):
        moved = data.samples[turn, 0]
        image = torch.rot90(first, turn % 4)
        whole = torch.nn.functional.pad(image.flip(1) if turn > 3 else image, (1, 1, 1, 1))
        windows = [whole[r : r + 8, c : c + 8] for r in range(3) for c in range(3)]
        assert any(torch.equal(moved, window) for window in windows)
    tested, folds = partitions(64)
    assert [{label // 8 for label in classes} for classes in (*folds, tested)] == [{0}, {1}, {2}, {3}, {4, 5, 6, 7}]


def test_arrays(tmp_path):
    x = np.arange(24, dtype=np.float64).reshape(6, 4)
    np.savez(tmp_path / "a.npz", features=x, labels=np.array(["b", "a", "c", "a", "b", "c"]))
    data = load(str(tmp_path / "a.npz"))
    assert data.samples.dtype == torch.float32
    assert torch.equal(data.of(torch.tensor([1])), torch.tensor([[4.0, 5.0, 6.0, 7.0]]))
    assert data.labels.tolist() == [1, 0, 2, 0, 1, 2]
    np.savez(tmp_path / "b.npz", features=np.full((2, 3, 5, 5), 255, np.uint8), labels=np.array([7, -2]))
    data = load(str(tmp_path / "b.npz"))
    assert data.of(torch.tensor([0])).unique().tolist() == [1.0]
    assert data.labels.tolist() == [1, 0]
    for arrays, words in [
        ({"x": x}, "must have the arrays features and labels, got x"),
        ({"features": x, "labels": np.zeros(5)}, "labels \\(N,\\), got \\(6, 4\\) and \\(5,\\)"),
        ({"features": x * np.nan, "labels": np.zeros(6)}, "finite"),
    ]:
        np.savez(tmp_path / "c.npz", **arrays)
        with pytest.raises(ValueError, match=words):
            load(str(tmp_path / "c.npz"))


def test_folder_of_images(tmp_path):
    """The middle square, scaled; classes by name; folders in folders; files that are no images are left."""
    for name, colour in (("zebra", (255, 0, 0)), ("ant", (0, 255, 0))):
        (tmp_path / name / "deep").mkdir(parents=True)
        wide = Image.new("RGB", (40, 20), (9, 9, 9))
        wide.paste(colour, (10, 0, 30, 20))
        wide.save(tmp_path / name / "1.png")
        Image.new("L", (30, 30), 128).save(tmp_path / name / "deep" / "2.PNG")
        (tmp_path / name / "notes.txt").write_text("none")
    (tmp_path / "empty").mkdir()
    told = []
    data = load(str(tmp_path), image_size=10, tick=lambda done, of: told.append((done, of)))
    assert told == [(k, 4) for k in range(1, 5)]
    assert data.labels.tolist() == [0, 0, 1, 1]
    assert data.samples.shape == (4, 3, 10, 10)
    inner = data.samples[:, :, 1:-1, 1:-1].flatten(2)
    assert [sample[:, 0].tolist() for sample in inner] == [[0, 255, 0], [128] * 3, [255, 0, 0], [128] * 3]
    assert (inner == inner[:, :, :1]).all()
    with pytest.raises(ValueError, match="a folder of images for each class"):
        load(str(tmp_path / "empty"))
    with pytest.raises(ValueError, match="data must be digits"):
        load(str(tmp_path / "nowhere"))


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


def command(tmp_path, *more):
    data = features()
    np.savez(tmp_path / "data.npz", features=data.samples.numpy(), labels=data.labels.numpy())
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in vars(SMALL).items()]
    return [
        sys.executable, "-m", "flashpair", "reality-check", "--data", str(tmp_path / "data.npz"), "--losses",
        "contrastive,nt_xent", "--out", str(tmp_path / "out"), *flags, *more,
    ]  # fmt: skip


@pytest.mark.slow
def test_command_survives_a_kill(tmp_path):
    """Killed as the system kills, it goes on; table, numbers and picture are what `run` finds."""
    kept = tmp_path / "out" / "nt_xent" / "trials"
    process = subprocess.Popen(command(tmp_path), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not kept.is_dir():
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    environment = os.environ | {"COLUMNS": "200"}
    done = subprocess.run(command(tmp_path), capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    _, contrastive, nt_xent = run(features_of(tmp_path), ["contrastive", "nt_xent"], SMALL, tmp_path / "expected")
    document = json.loads((tmp_path / "out" / "results.json").read_text())
    assert document["protocol"] == vars(SMALL)
    found = {loss["name"]: loss for loss in document["losses"]}
    assert list(found) == ["untrained", "contrastive", "nt_xent"]
    for outcome in (contrastive, nt_xent):
        assert found[outcome.name]["values"] == outcome.values
        assert found[outcome.name]["concatenated"] == outcome.concatenated
        for metric in METRICS:
            interval = confidence_interval(outcome.separated[metric])
            assert found[outcome.name]["intervals"]["separated"][metric] == interval._asdict()
            shown = confidence_interval([100 * score for score in outcome.separated[metric]])
            assert f"{shown.mean:.2f} ± {shown.half_width:.2f}" in done.stdout
    assert (tmp_path / "out" / "results.png").read_bytes().startswith(b"\x89PNG")


def features_of(tmp_path):
    return load(str(tmp_path / "data.npz"))


def test_one_repeat_has_no_interval():
    one = study.Outcome("one", {}, 0.5, 1, *({m: [0.25] for m in METRICS} for _ in range(2)))
    document = report.document([one], features(), SMALL)
    interval = document["losses"][0]["intervals"]["separated"]["map_at_r"]
    assert interval == {"mean": 0.25, "half_width": None}
    assert str(report.percent([0.25])) == "25.00"


def test_command_refuses(tmp_path):
    for more, words in [(("--losses", "no"), "a loss is"), (("--network", "no"), "must be FILE.py:Name")]:
        done = subprocess.run(command(tmp_path, *more), capture_output=True, text=True, timeout=60)
        assert done.returncode == 2
        assert words in done.stderr and "Traceback" not in done.stderr
