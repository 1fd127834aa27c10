"""The CUDA kernel under sanitizers: no data race, and without any one of its barriers, one; no access out of bounds.

support/cuda_on_host tells ThreadSanitizer what CUDA promises: block and grid barriers order memory, shuffles do not.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess

import emulated
import pytest
import torch
from helpers import CRITERIA, assert_same, batch

from flashpair.core.problem import AVERAGINGS
from flashpair.core.row_formula import FORMULAS

BARRIERS = [
    f"{path.name}:{k}"
    for path in sorted((emulated.ROOT / "csrc/cuda").iterdir())
    for k, line in enumerate(path.read_text().splitlines(), 1)
    if "__syncthreads();" in line or "grid.sync();" in line
]
SETTINGS = {"CUDA_ON_HOST_PROCESSORS": "32", "TSAN_OPTIONS": "halt_on_error=1"}
RACE_FOUND = 66  # ThreadSanitizer's exit status
EUCLIDEAN = "GeneralizedLiftedStructureLoss(distance='euclidean')"


def program(sanitizer):
    if not emulated.compiler():
        pytest.skip("no compiler")
    try:
        return emulated.sanitized(sanitizer)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"the compiler has no -fsanitize={sanitizer}: {error}")


def launch(sanitizer, criterion, x, labels, y=None, ref_labels=None, *, rows, skip="", path=None):
    formula = criterion.row_formula()
    code = [
        x.shape[0], (x if y is None else y).shape[0], x.shape[1], rows, FORMULAS.index(formula.name),
        AVERAGINGS.index(criterion.reduction), y is None, criterion.normalize, criterion.distance == "euclidean",
        formula.one_pair, formula.epsilon is not None, y is not None,
    ]  # fmt: skip
    numbers = [n for t in (labels, ref_labels, x, y) if t is not None for n in t.flatten().tolist()]
    words = [*map(int, code), *formula.scales, *formula.shifts, formula.epsilon or 0.0, *numbers]
    return subprocess.run(
        [path or program(sanitizer)],
        input=" ".join(map(repr, words)),
        env={
            **os.environ,
            "CUDA_ON_HOST_SKIP": skip,
            "CUDA_ON_HOST_PROCESSORS": "32",
            "TSAN_OPTIONS": "halt_on_error=1",
        },
        capture_output=True,
        text=True,
        timeout=300,
    )


def problem(references):
    x, labels = batch(11, 6, 3, torch.float64)
    y, ref_labels = batch(9, 6, 3, torch.float64, seed=1)
    step = torch.randn(3, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64) / 100
    x[2:5], y[2:5] = x[:3] + step, x[:3] - step  # close pairs, whose gradient takes steps of its own
    return (x, labels, y, ref_labels) if references else (x, labels)


@pytest.mark.parametrize("sanitizer", ["thread", "address,undefined"])
@pytest.mark.parametrize("references", [False, True], ids=["square", "references"])
@pytest.mark.parametrize("name", ["MultiSimilarityLoss", EUCLIDEAN, "NPairsLoss", "NPairsLoss('all_pairs')"])
@pytest.mark.parametrize("rows", [1, 4, 16])
def test_right_and_clean(rows, name, references, sanitizer):
    criterion, given = CRITERIA[name](impl="reference"), problem(references)
    done = launch(sanitizer, criterion, *given, rows=rows)
    assert done.returncode == 0, done.stderr[:4000]
    leaves = [t.requires_grad_() for t in given if t.is_floating_point()]
    more = dict(zip(("ref_emb", "ref_labels"), given[2:], strict=False))
    loss = criterion(*given[:2], **more)
    truth = [loss.detach().reshape(1), *(g.flatten() for g in torch.autograd.grad(loss, leaves))]
    assert_same(torch.tensor([float(word) for word in done.stdout.split()], dtype=torch.float64), torch.cat(truth))


def test_the_kernel_has_barriers():
    assert len(BARRIERS) >= 7


@pytest.mark.parametrize("barrier", BARRIERS)
def test_every_barrier_is_missed(barrier):
    """A problem that needs them all: distances, references with a gradient, two warps, groups that add up in turn. What
    comes first is seen: a race, or a read of what the other threads have yet to write, which signals."""
    done = launch("thread", CRITERIA[EUCLIDEAN](), *problem(True), rows=4, skip=barrier)
    assert done.returncode == RACE_FOUND and ("data race" in done.stderr or ": FPE" in done.stderr), done.stdout


def test_memory_that_nobody_wrote_is_missed(tmp_path):
    """A block that owns references has no anchors of its own: what it would weigh pairs by, it may not even look at."""
    if not emulated.compiler():
        pytest.skip("no compiler")
    for folder in ("csrc/cuda", "csrc/small_batch", "tests/support/cuda_on_host"):
        shutil.copytree(emulated.ROOT / folder, tmp_path / folder)
    for name, guard in (
        ("csrc/cuda/onchip.cu", "if (owns_anchors && r < count) weight"),
        ("csrc/small_batch/losses.h", "if (side == NO_PAIR) return 0;"),
    ):
        source = (tmp_path / name).read_text()
        assert source.count(guard) == 1
        (tmp_path / name).write_text(source.replace(guard, "weight" if "weight" in guard else ""))
    path = emulated.build("launch", emulated.LAUNCH, root=tmp_path)
    done = launch("", CRITERIA["MultiSimilarityLoss"](), *problem(True), rows=4, path=path)
    assert done.returncode == -signal.SIGFPE, done.stdout
