"""DistributedDataParallel: each rank embeds its share of the batch, and the loss is that of the whole batch.

torchrun --nproc-per-node 2 -m flashpair.examples.ddp
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import flashpair
from flashpair.distributed import gather

from .setting import digits, precision_at_10, started

STEPS, BATCH = 40, 256  # of all ranks together


def main() -> None:
    with started() as process:
        data = digits(process.device)
        torch.manual_seed(0)
        network: nn.Module = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 32)).to(process.device)
        if process.world > 1:
            network = DistributedDataParallel(network)
        # Without gather() a rank would see the pairs of its own share only: with R ranks, one pair in R.
        criterion = gather(flashpair.MultiSimilarityLoss())
        optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9)

        def retrieval() -> float:
            with torch.no_grad():
                return precision_at_10(network(data.unseen_images), data.unseen_labels)

        process.say(f"precision at 10 before: {retrieval():.4f}")
        generator = torch.Generator().manual_seed(1)  # the same on every rank, so that they agree who takes which
        for step in range(STEPS):
            drawn = torch.randperm(len(data.images), generator=generator)[:BATCH].to(process.device)
            mine = drawn[process.rank :: process.world]
            loss = criterion(network(data.images[mine]), data.labels[mine])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if step % 10 == 0 or step == STEPS - 1:
                process.say(f"step {step}: loss {loss.item():.4g}")  # of the whole batch, the same on every rank
        process.say(f"precision at 10 after: {retrieval():.4f}")


if __name__ == "__main__":
    main()
