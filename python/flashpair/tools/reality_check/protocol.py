"""The settings that all losses of a comparison share."""

from __future__ import annotations

from dataclasses import dataclass, fields

from ...core import checks

SAMPLERS = ("tpe", "gp")


@dataclass(frozen=True)
class Protocol:
    """The settings of a comparison, the same for every loss (Musgrave et al., 2020).

    Defaults are the paper's, with three exceptions: networks are trained from scratch here, with Adam and a limit on
    epochs; hyper-parameters are searched with optuna instead of Ax; and losses against class weights get batches of the
    same kind as all others, not one sample a class.

    Args:
        trials: hyper-parameter settings to try for a loss.
        repeats: trainings with the best of them, each of one model for each fold.
        sampler: optuna's ``"tpe"`` (tree-structured Parzen estimator) or ``"gp"`` (Gaussian process).
        folds: parts of the training classes, each used once for validation; at least 2.
        embedding_size: of a model; concatenated embeddings have `folds` times as many columns.
        batch_size: samples of a step.
        per_class: samples of a class in a batch, a divisor of `batch_size`; more where there are too few classes.
        iterations: steps of an epoch.
        evaluate_every: epochs between validations.
        patience: epochs without a better validation MAP@R after which training stops.
        max_epochs: epochs after which it stops anyway.
        learning_rate: of Adam, for the network, above 0. The rate of a loss's own weights is searched for.
        seed: of weights, batches and the search, at least 0.

    Raises:
        TypeError: a setting of a wrong type, named.
        ValueError: a setting out of its range, named.

    Examples:
        >>> from flashpair.tools.reality_check import Protocol
        >>> Protocol(trials=5, batch_size=64).iterations
        100
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
