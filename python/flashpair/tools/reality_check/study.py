"""The study: for every loss, the search for its best hyper-parameters, the trainings with them, and the test.

Results are written to disk after each fold. A run that was killed continues where it stopped, and finds the same
numbers as a run that was not killed, because each training and each choice of hyper-parameters depends only on its own
seed and on finished trials.
"""

from __future__ import annotations

import hashlib
import os
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch
from filelock import FileLock, Timeout
from torch import Tensor, nn

from ...core.extras import extra
from ...metrics import retrieval
from .data import Data, partitions, usable
from .losses import Candidate, Range, candidate
from .networks import Standardized, network
from .protocol import Protocol
from .record import claim, embedded, opened, read, seed_of, source_of, write
from .training import OWN_RATE, Trained, embed, made, places_of, train

UNTRAINED = "untrained"
KINDS = ("separated", "concatenated")
METRICS = ("precision_at_1", "r_precision", "map_at_r")
MakeNetwork = Callable[[Sequence[int], int], nn.Module]


class Outcome(NamedTuple):
    """A loss in a comparison.

    Attributes:
        name: the loss's, or ``"untrained"``.
        values: the best hyper-parameters.
        validation: their MAP@R, the mean over folds.
        trials: how many settings were tried.
        separated: for each metric one number (0 to 1) for each repeat: the mean over the folds' models, on the test
            classes.
        concatenated: the same with the normalised embeddings of all models side by side.
    """

    name: str
    values: dict[str, float]
    validation: float
    trials: int
    separated: dict[str, list[float]]
    concatenated: dict[str, list[float]]


class Progress:
    """Reports the progress of a run. This base class reports nothing.

    `level` is one of ``"losses"``, ``"settings"`` (trials, then repeats), ``"folds"`` or ``"epochs"``.
    """

    def at(self, level: str, done: int, of: int, what: str = "") -> None:
        pass


def run(
    data: Data, losses: Sequence[str], protocol: Protocol, out: Path, make: MakeNetwork = network,
    progress: Progress | None = None,
) -> list[Outcome]:  # fmt: skip
    """Compares losses by class-disjoint cross-validation and a test on other classes (Musgrave et al., 2020).

    The first half of the classes is trained and validated on, the second half is tested on.

    Args:
        data: samples and labels for training, validation and test.
        losses: names that `candidate` knows.
        protocol: the settings that all losses share.
        out: a folder for all results. Results of the same data and protocol in it are not computed again. (`trials` and
            `repeats` may differ: they can be raised.)
        make: makes a network from a sample's shape and an embedding size.
        progress: its `at` is called as the run goes on.

    Returns:
        The untrained networks' outcome, and each loss's.

    Raises:
        ValueError: an unknown loss, data of too few classes, a device that does not exist, a folder of another run, or
            a broken file in it.
        ImportError: optuna is not installed.

    Examples:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from flashpair.tools.reality_check import Data, Protocol, run
        >>> labels = torch.arange(8).repeat_interleave(4)
        >>> data = Data("made up", torch.eye(8)[labels] + 0.1 * torch.rand(32, 8), labels)
        >>> small = Protocol(trials=1, repeats=1, folds=2, embedding_size=4, batch_size=8, iterations=1, max_epochs=1)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     outcomes = run(data, ["nt_xent"], small, Path(folder))
        >>> [outcome.name for outcome in outcomes]
        ['untrained', 'nt_xent']
        >>> list(outcomes[1].values), len(outcomes[1].separated["map_at_r"])
        (['temperature'], 1)
    """
    with extra("reality-check", "reality-check"):  # fail now, not after the first trainings
        import_module("optuna")

    progress = progress or Progress()
    known = {UNTRAINED: None, **{name: candidate(name) for name in losses}}
    usable(data.device)
    _enough(data, protocol)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"out must be a folder, or none yet that can be made, got {str(out)!r}: {error}") from error
    try:
        with FileLock(out / "lock", timeout=0):
            claim(out / "settings.json", _settings(data, protocol, make))
            studies = [_Study(name, loss, data, protocol, out, make, progress) for name, loss in known.items()]
            outcomes = []
            for done, study in enumerate(studies):
                progress.at("losses", done, len(studies), study.name)
                outcomes.append(study.outcome())
            progress.at("losses", len(studies), len(studies))
            return outcomes
    except Timeout:
        raise ValueError(f"another process is at work in {out}; wait for it, or give another folder") from None


def _enough(data: Data, protocol: Protocol) -> None:
    """Raises ValueError if some part of the data has no two samples of a class."""
    sizes = data.labels.bincount()
    tested, folds = partitions(len(sizes), protocol.folds)
    for what, classes in (("the test", tested), *((f"fold {f}", classes) for f, classes in enumerate(folds))):
        if sizes[list(classes)].max() < 2:
            raise ValueError(f"labels must have two samples of some class of each part, got none in {what}")


def _settings(data: Data, protocol: Protocol, make: MakeNetwork) -> dict[str, Any]:
    varied = ("trials", "repeats")
    return {
        "data": data.title, "samples": data.fingerprint(), "network": "own" if make is network else source_of(make),
        "protocol": {name: value for name, value in asdict(protocol).items() if name not in varied},
    }  # fmt: skip


class _Study:
    """The study of one loss, or of untrained networks if `loss` is None."""

    def __init__(
        self, name: str, loss: Candidate | None, data: Data, protocol: Protocol, out: Path, make: MakeNetwork,
        progress: Progress,
    ) -> None:  # fmt: skip
        self.name, self.loss, self.data, self.protocol = name, loss, data, protocol
        self.make, self.progress = make, progress
        self.tested, self.folds = partitions(int(data.labels.max()) + 1, protocol.folds)
        digest = f"-{hashlib.sha256(name.encode()).hexdigest()[:8]}" if ":" in name else ""
        self.folder = out / (re.sub(r"[^\w.-]+", "_", name) + digest)
        self.space: dict[str, Range] = dict(loss.space) if loss else {}
        if loss is not None:
            middle = {key: (r.low * r.high) ** 0.5 if r.log else (r.low + r.high) / 2 for key, r in self.space.items()}
            try:
                criterion = made(loss, middle, len(self.folds[0]), protocol.embedding_size)
            except TypeError as error:
                raise ValueError(f"{name} cannot be made of {', '.join(self.space) or 'nothing'}: {error}") from error
            if any(True for _ in criterion.parameters()):
                self.space[OWN_RATE] = Range(1e-3, 1.0, log=True)
            kept = {
                "name": name, "source": source_of(loss.make) if ":" in name else "",
                "space": {key: list(searched) for key, searched in self.space.items()},
            }  # fmt: skip
            claim(self.folder / "loss.json", kept)

    def outcome(self) -> Outcome:
        values, validation, trials = self.search() if self.loss else ({}, 0.0, 0)
        repeats = []
        for repeat in range(self.protocol.repeats):
            self.progress.at("settings", repeat, self.protocol.repeats, "repeat")
            repeats.append(self.repeat(repeat, values))
        self.progress.at("settings", self.protocol.repeats, self.protocol.repeats, "repeat")
        kinds = ({m: [r[kind][m] for r in repeats] for m in METRICS} for kind in KINDS)
        return Outcome(self.name, values, validation, trials, *kinds)

    def search(self) -> tuple[dict[str, float], float, int]:
        """The best hyper-parameters, their validation MAP@R, and how many were tried."""
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.folder.mkdir(parents=True, exist_ok=True)
        study = opened(self.folder / "trials.db", self.name)
        for left in study.get_trials(states=(optuna.trial.TrialState.RUNNING,)):  # by a run that was killed
            study.tell(left.number, state=optuna.trial.TrialState.FAIL)
        ranges: dict[str, optuna.distributions.BaseDistribution] = {
            key: optuna.distributions.FloatDistribution(r.low, r.high, log=r.log) for key, r in self.space.items()
        }
        wanted = self.protocol.trials if ranges else 1
        kinds = {"tpe": optuna.samplers.TPESampler, "gp": optuna.samplers.GPSampler}
        complete = (optuna.trial.TrialState.COMPLETE,)
        while (done := len(study.get_trials(deepcopy=False, states=complete))) < wanted:
            self.progress.at("settings", done, wanted, "trial")
            study.sampler = kinds[self.protocol.sampler](seed=seed_of(self.protocol.seed, self.name, done))
            trial = study.ask(ranges)
            study.tell(trial, self.validated(done, trial.params))
        finished = study.get_trials(states=complete)[:wanted]
        best = max(finished, key=lambda trial: (trial.value, -trial.number))
        assert best.value is not None
        return best.params, best.value, len(finished)

    def validated(self, trial: int, values: Mapping[str, float]) -> float:
        """MAP@R of a trial, the mean over the folds."""
        scores = []
        for fold in range(len(self.folds)):
            file = self.folder / "trials" / f"{trial}-fold-{fold}.json"
            kept = read(file, "values", "map_at_r")
            if kept is None or kept["values"] != values:
                best = self.trained(fold, values, ("trial", trial))
                kept = {"values": values, "map_at_r": max(best.map_at_r, 0.0), "epoch": best.epoch}
                write(file, kept)
            scores.append(kept["map_at_r"])
        return statistics.fmean(scores)

    def repeat(self, repeat: int, values: Mapping[str, float]) -> dict[str, Any]:
        """The test metrics of one model a fold, trained with the best hyper-parameters."""
        file = self.folder / "repeats" / f"{repeat}.json"
        kept = read(file, "values", *KINDS)
        parts = [self.folder / "repeats" / f"{repeat}-fold-{fold}.pt" for fold in range(len(self.folds))]
        if kept is not None and kept["values"] == values:
            for part in parts:
                part.unlink(missing_ok=True)
            return dict(kept)
        tested = places_of(self.data, self.tested)
        labels = self.data.labels[tested]
        embeddings = []
        for fold, part in enumerate(parts):
            stored = embedded(part)
            if stored is None or stored["values"] != values:
                best = self.trained(fold, values, ("repeat", repeat)).network
                stored = {"values": values, "embeddings": embed(best, self.data, tested)}
                part.parent.mkdir(parents=True, exist_ok=True)
                torch.save(stored, part.with_suffix(".part"))
                os.replace(part.with_suffix(".part"), part)
            embeddings.append(torch.nn.functional.normalize(stored["embeddings"], dim=1))
        each = [_judged(one, labels) for one in embeddings]
        found = {
            "values": dict(values),
            "separated": {m: statistics.fmean(one[m] for one in each) for m in METRICS},
            "concatenated": _judged(torch.cat(embeddings, dim=1), labels),
        }
        write(file, found)
        for part in parts:
            part.unlink()
        return found

    def trained(self, fold: int, values: Mapping[str, float], of: tuple[str, int]) -> Trained:
        """A fold's best network, or an untrained one."""
        folds, protocol = self.folds, self.protocol
        self.progress.at("folds", fold, len(folds), "fold")
        seed = seed_of(protocol.seed, self.name, *of, fold)
        learned = [c for other, classes in enumerate(folds) if other != fold for c in classes]
        if self.loss is None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                untrained = self.make(self.data.samples.shape[1:], protocol.embedding_size)
            scaled = Standardized(untrained, self.data.of(places_of(self.data, learned)))
            return Trained(scaled.to(self.data.device), 0, 0.0)
        best = train(
            self.data, learned, folds[fold], self.loss, values, protocol, self.make, seed,
            lambda epoch: self.progress.at("epochs", epoch, protocol.max_epochs, "epoch"),
        )  # fmt: skip
        self.progress.at("folds", fold + 1, len(folds), "fold")
        return best


def _judged(embeddings: Tensor, labels: Tensor) -> dict[str, float]:
    found = retrieval(embeddings, labels, recall_at=())._asdict()
    return {m: found[m] for m in METRICS}
