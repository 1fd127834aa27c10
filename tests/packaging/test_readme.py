"""The README's Python blocks run as they stand, with stand-ins for what a reader has: data, encoders, an optimizer."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import numpy
import pytest
import torch
import torch.distributed as dist
from conftest import needs_extension
from torch.utils.data import DataLoader, TensorDataset

import flashpair

pytestmark = needs_extension
README = (Path(__file__).resolve().parents[2] / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
CLASSES, D = 64, 128


def _reader():
    torch.manual_seed(0)
    n, encoder = 4 * CLASSES, torch.nn.Linear(16, D)
    labels, images = torch.arange(n) // 4, torch.randn(n, 16)
    return {
        "torch": torch, "numpy": numpy, "flashpair": flashpair, "DataLoader": DataLoader,
        "criterion": flashpair.MultiSimilarityLoss(), "optimizer": torch.optim.SGD(encoder.parameters(), 0.1),
        "embeddings": torch.randn(n, D, requires_grad=True), "labels": labels, "document_labels": labels,
        "bank": torch.randn(100, D), "bank_labels": torch.arange(100) // 5,
        "encoder": encoder, "network": encoder, "query_encoder": encoder, "document_encoder": copy.deepcopy(encoder),
        "images": images, "queries": images, "documents": torch.randn(n, 16), "batches": [(images, labels)] * 2,
        "dataset": TensorDataset(images, labels),
    }  # fmt: skip


@pytest.fixture
def alone():
    """A group of one process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("block", BLOCKS, ids=lambda text: text.strip().splitlines()[0][:40])
def test_block(block, alone, tmp_path, monkeypatch):
    if "pytorch_metric_learning" in block:
        pytest.importorskip("pytorch_metric_learning")
    monkeypatch.chdir(tmp_path)
    numpy.save("bank.npy", torch.randn(100, D).numpy())
    smaller = block.replace("1_000_000", "1_000")
    exec(compile(smaller, "README.md", "exec"), _reader())


def test_the_blocks_are_found():
    assert len(BLOCKS) >= 9 and any("CrossBatchMemory" in block for block in BLOCKS)
