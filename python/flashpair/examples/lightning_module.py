"""A LightningModule: the loss in its training step, retrieval of unseen classes as its validation.

torchrun --nproc-per-node 2 -m flashpair.examples.lightning_module
"""

from __future__ import annotations

import os

import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import flashpair
from flashpair.core.extras import extra
from flashpair.distributed import gather
from flashpair.samplers import MPerClassSampler

from .setting import convolutional, leave, precision_at_10, turned_digits

with extra("examples", "this example"):
    import lightning.pytorch as pl

EPOCHS, BATCHES, BATCH, PER_CLASS = 4, 25, 320, 8


class Embedder(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.network = convolutional()
        self.data = turned_digits()
        self.found: list[tuple[Tensor, Tensor]] = []
        # Without gather() a process would see the pairs of its own share only. It looks for the process group when it
        # is called, so this is not too early; alone it changes nothing.
        self.criterion = gather(flashpair.MultiSimilarityLoss(beta=10))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=2e-3)

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        share = BATCH // self.trainer.world_size
        self.sampler = MPerClassSampler(self.data.labels, PER_CLASS, share, batches=BATCHES)
        return DataLoader(TensorDataset(self.data.images, self.data.labels), batch_sampler=self.sampler)

    def on_train_epoch_start(self) -> None:
        # So that a training that goes on does so with its batches. Trainer tells samplers of single samples alone.
        self.sampler.set_epoch(self.current_epoch)

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        images, labels = batch
        loss = self.criterion(self.network(images), labels)
        if self.global_step % BATCHES == 0 or self.global_step == EPOCHS * BATCHES - 1:
            self.print(f"step {self.global_step}: loss {loss.item():.4g}")  # of the whole batch, the same on every rank
        return loss

    def val_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(TensorDataset(self.data.unseen_images, self.data.unseen_labels), batch_size=256)

    def validation_step(self, batch: list[Tensor], index: int) -> None:
        images, labels = batch
        self.found.append((self.network(images), labels))

    def on_validation_epoch_end(self) -> None:
        embeddings, labels = map(torch.cat, zip(*self.found, strict=True))
        self.found.clear()
        self.log("precision at 10", precision_at_10(embeddings, labels), sync_dist=True)


def main() -> None:
    pl.seed_everything(0, verbose=False)
    world = int(os.environ.get("WORLD_SIZE", "1"))
    trainer = pl.Trainer(
        accelerator="auto",
        devices=world,
        strategy="ddp" if world > 1 else "auto",
        max_epochs=EPOCHS,
        use_distributed_sampler=False,  # MPerClassSampler shares batches out, and each rank retrieves among all
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = Embedder()

    def retrieval() -> float:
        return trainer.validate(module, verbose=False)[0]["precision at 10"]

    module.print(f"precision at 10 before: {retrieval():.4f}")
    trainer.fit(module)
    module.print(f"precision at 10 after: {retrieval():.4f}")
    if world > 1:
        leave()


if __name__ == "__main__":
    main()
