"""What every loss gets alike."""

from __future__ import annotations

from dataclasses import dataclass, fields

from ...core import checks

SAMPLERS = ("tpe", "gp")


@dataclass(frozen=True)
class Protocol:
    """The settings of a comparison. Defaults are those of Musgrave et al. (2020), with three exceptions: networks are
    trained from scratch here, with Adam and an end to a training that goes on improving; settings are searched for with
    optuna instead of Ax; and losses of classes get batches as all others do, not of one sample a class.

    Args:
        trials: hyper-parameter settings that are tried for a loss.
        repeats: trainings with the best of them, each of one model a fold.
        sampler: optuna's ``"tpe"`` (tree-structured Parzen estimator) or ``"gp"`` (Gaussian process).
        folds: partitions of the training classes, each of which is validated on once.
        embedding_size: of a model; concatenated, that times `folds`.
        batch_size: samples of a step. per_class: of a class, which divides them; more where there are too few classes
            for that.
        iterations: steps of an epoch. evaluate_every: epochs between validations.
        patience: epochs without a better validation MAP@R after which a training ends. max_epochs: after which it
            ends anyway.
        learning_rate: of Adam, for the network. A loss's own weights have theirs searched.
        seed: of weights, batches and the search.

    Raises:
        TypeError, ValueError: a setting out of range, named.
    """

    trials: int = 50
    repeats: int = 10
    sampler: str = "tpe"
    folds: int = 4
    embedding_size: int = 128
    batch_size: int = 32
    per_class: int = 4
    iterations: int = 100
    evaluate_every: int = 2
    patience: int = 9
    max_epochs: int = 100
    learning_rate: float = 3e-4
    seed: int = 0

    def __post_init__(self) -> None:
        checks.word(self.sampler, SAMPLERS, "sampler")
        checks.plain_number(self.learning_rate, "learning_rate", above=0.0)
        for field in fields(self):
            if field.name not in ("sampler", "learning_rate"):
                least = {"folds": 2, "seed": 0}.get(field.name, 1)
                checks.integer(getattr(self, field.name), field.name, at_least=least)
        if self.batch_size % self.per_class:
            raise ValueError(f"per_class must divide batch_size = {self.batch_size}, got {self.per_class}")
