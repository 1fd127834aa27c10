"""fully_shard (FSDP2): the network's parameters are spread over the ranks, a loss's own proxies are whole on each.

torchrun --nproc-per-node 2 -m flashpair.examples.fsdp
"""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.fsdp import fully_shard

import flashpair
from flashpair.distributed import gather

from .setting import digits, precision_at_10, started

STEPS, BATCH = 40, 256  # of all ranks together


def main() -> None:
    with started() as process:
        data = digits(process.device)
        torch.manual_seed(0)  # before both are made: every rank has to begin with the same proxies
        network = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 32)).to(process.device)
        criterion = gather(flashpair.ProxyAnchorLoss(num_classes=10, embedding_size=32).to(process.device))
        if process.world > 1:
            for module in (network[0], network[2], network):
                fully_shard(module)
        # The proxies are not sharded and need no DDP: gather() gives every rank their whole gradient, and so they stay
        # the same on all. A group of their own, because the optimizer cannot update sharded and whole parameters in one
        # go; and after fully_shard, which replaces parameters.
        optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
        optimizer.add_param_group({"params": criterion.parameters(), "lr": 1e-2})

        def retrieval() -> float:
            with torch.no_grad():  # on every rank, because a forward pass gathers parameters
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
