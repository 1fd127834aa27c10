"""The Python blocks of the README and of the pages in docs/ run as they stand, each by itself, with stand-ins for what
a reader has: data, encoders, an optimizer."""

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
ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCKS = [
    (page.relative_to(ROOT).as_posix(), block)
    for page in PAGES
    for block in re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
]
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


@pytest.mark.parametrize("page, block", BLOCKS, ids=lambda text: text.strip().splitlines()[0][:40])
def test_block(page, block, alone, tmp_path, monkeypatch):
    if "pytorch_metric_learning" in block:
        pytest.importorskip("pytorch_metric_learning")
    monkeypatch.chdir(tmp_path)
    numpy.save("bank.npy", torch.randn(100, D).numpy())
    smaller = block.replace("1_000_000", "1_000")
    exec(compile(smaller, page, "exec"), _reader())


def test_the_blocks_are_found():
    of_readme = [block for page, block in BLOCKS if page == "README.md"]
    assert len(of_readme) >= 5 and any("GradCache" in block for block in of_readme)
    assert any("CrossBatchMemory" in block for page, block in BLOCKS if page == "docs/memory.md")
    assert any("register_transform" in block for page, block in BLOCKS if page == "docs/your-own-loss.md")
