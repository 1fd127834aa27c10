"""A retrieval model: a query's embedding finds its document's, of other features; large batches by GradCache.

torchrun --nproc-per-node 2 -m flashpair.examples.two_towers
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import flashpair
from flashpair.distributed import gather

from .setting import Process, started

STEPS, BATCH, MICRO_BATCH = 40, 1024, 64  # a batch of all ranks together, a micro-batch of each
PAIRS, UNSEEN = 8192, 1024


def pairs(process: Process) -> tuple[Tensor, Tensor]:
    """Queries (PAIRS, 48) and their documents (PAIRS, 96), noisy views of the same 16 hidden numbers."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    hidden = random(PAIRS, 16)
    queries = torch.tanh(hidden @ random(16, 48) / 4) + 0.3 * random(PAIRS, 48)
    documents = torch.tanh(hidden @ random(16, 96) / 4) + 0.3 * random(PAIRS, 96)
    return queries.to(process.device), documents.to(process.device)


def tower(process: Process, width: int) -> nn.Module:
    network = nn.Sequential(nn.Linear(width, 256), nn.ReLU(), nn.Linear(256, 32)).to(process.device)
    return DistributedDataParallel(network) if process.world > 1 else network


def main() -> None:
    with started() as process:
        queries, documents = pairs(process)
        torch.manual_seed(0)
        query_encoder, document_encoder = tower(process, 48), tower(process, 96)
        # Every rank's queries meet every rank's documents. GradCache calls the criterion once a step, with all of the
        # rank's embeddings, so gather() communicates once a step, too.
        criterion = gather(flashpair.NTXentLoss(temperature=0.1))
        cache = flashpair.GradCache(query_encoder, criterion, micro_batch=MICRO_BATCH, ref_encoder=document_encoder)
        parameters = [*query_encoder.parameters(), *document_encoder.parameters()]
        optimizer = torch.optim.Adam(parameters, lr=2e-3)

        def recall_at_1() -> float:
            """How many unseen queries find their document before all other unseen ones."""
            numbers = torch.arange(UNSEEN, device=process.device)
            with torch.no_grad():
                found, of = query_encoder(queries[:UNSEEN]), document_encoder(documents[:UNSEEN])
            return flashpair.metrics.retrieval(found, numbers, of, numbers, recall_at=(1,)).recall[1]

        process.say(f"recall at 1 before: {recall_at_1():.4f}")
        generator = torch.Generator().manual_seed(1)  # the same on every rank, so that they agree who takes which
        for step in range(STEPS):
            drawn = UNSEEN + torch.randperm(PAIRS - UNSEEN, generator=generator)[:BATCH].to(process.device)
            mine = drawn[process.rank :: process.world]
            optimizer.zero_grad()
            # A pair's number is its label: the one positive of a query is its document.
            loss = cache(queries[mine], mine, ref_inputs=documents[mine], ref_labels=mine)  # it has called backward
            optimizer.step()
            if step % 10 == 0 or step == STEPS - 1:
                process.say(f"step {step}: loss {loss.item():.4g}")  # of the whole batch, the same on every rank
        process.say(f"recall at 1 after: {recall_at_1():.4f}")


if __name__ == "__main__":
    main()
