"""One training of one network on some classes, judged on others."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ...losses.base import Criterion
from ...metrics import retrieval
from ...samplers import MPerClassSampler
from .data import Data
from .losses import Candidate
from .networks import Standardized
from .protocol import Protocol

OWN_RATE = "own_learning_rate"  # of a loss's own weights
EMBEDDED = 2048  # samples at a time


class Trained(NamedTuple):
    """The best state of a training: its network, the epoch (0: untrained), its validation MAP@R."""

    network: nn.Module
    epoch: int
    map_at_r: float


def places_of(data: Data, classes: Sequence[int]) -> Tensor:
    """Which samples are of these classes."""
    return torch.isin(data.labels, torch.tensor(classes)).nonzero()[:, 0]


@torch.no_grad()
def embed(network: nn.Module, data: Data, places: Tensor) -> Tensor:
    """Embeddings (len(places), E) on the CPU, with the network in evaluation mode."""
    network.eval()
    return torch.cat([network(data.of(some)).cpu() for some in places.split(EMBEDDED)])


def made(candidate: Candidate, values: Mapping[str, float], classes: int, embedding_size: int) -> Criterion:
    """The criterion of these hyper-parameters."""
    given = {name: value for name, value in values.items() if name != OWN_RATE}
    sizes = {"num_classes": classes, "embedding_size": embedding_size} if candidate.of_classes else {}
    return candidate.make(**given, **sizes)


def samples_of_a_class(batch_size: int, wanted: int, classes: int) -> int:
    """`wanted`, or the next larger number with which a batch needs no more classes than there are.

    Raises:
        ValueError: there is no class.
    """
    for m in range(min(wanted, batch_size), batch_size + 1):
        if batch_size % m == 0 and batch_size // m <= classes:
            return m
    raise ValueError(f"batch_size {batch_size} needs at least one class, got {classes}")


def train(
    data: Data, trained: Sequence[int], validated: Sequence[int], candidate: Candidate, values: Mapping[str, float],
    protocol: Protocol, make: Callable[[Sequence[int], int], nn.Module], seed: int,
    tick: Callable[[int], object] = lambda epoch: None,
) -> Trained:  # fmt: skip
    """Trains on some classes until validation on others has stopped improving.

    Args:
        trained, validated: classes. values: the candidate's hyper-parameters.
        make: makes a network from a sample's shape and an embedding size, with torch's generator.
        seed: for weights and batches.
        tick: is called after each epoch.
    """
    places, judged = places_of(data, trained), places_of(data, validated)
    number = torch.full((int(data.labels.max()) + 1,), -1)
    number[list(trained)] = torch.arange(len(trained))
    labels = number[data.labels[places]]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = Standardized(make(data.samples.shape[1:], protocol.embedding_size), data.of(places)).to(data.device)
        criterion = made(candidate, values, len(trained), protocol.embedding_size).to(data.device)
        m = samples_of_a_class(protocol.batch_size, protocol.per_class, len(trained))
        batches = MPerClassSampler(
            labels, m, protocol.batch_size, batches=protocol.iterations, seed=seed, num_replicas=1, rank=0
        )
        optimizer = torch.optim.Adam(network.parameters(), lr=protocol.learning_rate)
        if own := list(criterion.parameters()):
            optimizer.add_param_group({"params": own, "lr": values[OWN_RATE]})

        def validation() -> float:
            found = embed(network, data, judged)
            if not found.isfinite().all():
                return -1.0
            return retrieval(found, data.labels[judged], recall_at=()).map_at_r

        best = Trained(copy.deepcopy(network), 0, validation())
        for epoch in range(1, protocol.max_epochs + 1):
            network.train()
            for batch in batches:
                loss = criterion(network(data.of(places[batch])), labels[batch].to(data.device))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            tick(epoch)
            if epoch % protocol.evaluate_every == 0 or epoch == protocol.max_epochs:
                score = validation()
                if score > best.map_at_r:
                    best = Trained(copy.deepcopy(network), epoch, score)
                if score < 0 or epoch - best.epoch > protocol.patience:  # after an overflow the numbers stay NaN
                    break
    return best
