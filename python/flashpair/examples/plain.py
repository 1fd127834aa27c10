"""A plain training loop: a DataLoader whose batches have several samples of each class, and a loss of the batch.

python -m flashpair.examples.plain
"""

from __future__ import annotations

import torch
from torch.utils.data import DataLoader, TensorDataset

import flashpair
from flashpair.samplers import MPerClassSampler

from .setting import convolutional, precision_at_10, turned_digits

EPOCHS, BATCHES, BATCH, PER_CLASS = 4, 25, 320, 8


def main() -> None:
    data = turned_digits()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    network = convolutional().to(device)
    # A sample's positives are the others of its class: drawn at random, most of a batch would have none.
    sampler = MPerClassSampler(data.labels, PER_CLASS, BATCH, batches=BATCHES)
    loader = DataLoader(
        TensorDataset(data.images, data.labels), batch_sampler=sampler, num_workers=1, persistent_workers=True
    )
    criterion = flashpair.MultiSimilarityLoss(beta=10)
    optimizer = torch.optim.Adam(network.parameters(), lr=2e-3)

    def retrieval() -> float:
        network.eval()
        with torch.no_grad():
            return precision_at_10(network(data.unseen_images.to(device)), data.unseen_labels.to(device))

    print(f"precision at 10 before: {retrieval():.4f}")
    for epoch in range(EPOCHS):
        network.train()
        for step, (images, labels) in enumerate(loader, epoch * BATCHES):
            loss = criterion(network(images.to(device)), labels.to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if step % BATCHES == 0 or step == EPOCHS * BATCHES - 1:
                print(f"step {step}: loss {loss.item():.4g}", flush=True)
    print(f"precision at 10 after: {retrieval():.4f}")


if __name__ == "__main__":
    main()
