"""CrossBatchMemory's queue: saved, loaded, reset, recomputed, and what may not enter it."""

from __future__ import annotations

import copy
import io
import pickle

import cross_batch_memory_cases
import pytest
import torch
from conftest import needs_extension
from cross_batch_memory_cases import RAGGED, SIZE, D, Oracle, assert_equal_states, batches, both, step
from helpers import CRITERIA, assert_same
from torch.utils.checkpoint import checkpoint

import flashpair
from flashpair import CrossBatchMemory

pytestmark = needs_extension
segment = cross_batch_memory_cases.segment


def saved(memory):
    """Through a file, as training scripts do it, into a memory that has seen other things."""
    file = io.BytesIO()
    torch.save(memory.state_dict(), file)
    file.seek(0)
    again = CrossBatchMemory(type(memory.criterion)(), D, SIZE, dtype=memory.dtype)
    for x, labels in batches((9, 9, 9), seed=5):
        again(x, labels)
    again.load_state_dict(torch.load(file, weights_only=True))
    return again


@pytest.mark.parametrize("again", [saved, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
@pytest.mark.parametrize("after", [0, 1, 3, 6, len(RAGGED)])
def test_goes_on_from_a_state_with_the_same_bits(after, again, segment):
    memory = CrossBatchMemory(flashpair.MultiSimilarityLoss(), D, SIZE)
    every = [*batches(dtype=torch.float32), *batches((5, 9, 9, 4), seed=1, dtype=torch.float32)]
    for x, labels in every[:after]:
        memory(x, labels)
    other = again(memory)
    for x, labels in every[after:]:
        for options in ({"enqueue": False}, {}):
            found, truth = step(other, x, labels, **options), step(memory, x, labels, **options)
            assert all(torch.equal(f, t) for f, t in zip(found, truth, strict=True))
    assert_equal_states(other.state_dict(), memory.state_dict())


def test_state_is_the_entries_in_order():
    memory = CrossBatchMemory(flashpair.NTXentLoss(), D, SIZE, dtype=torch.float64)
    oracle = Oracle(memory.criterion, SIZE)
    for x, labels in batches():
        memory(x, labels)
        oracle(x, labels)
        state = memory.state_dict()
        held = state["_extra_state"]["held"]
        assert state["memory"].shape == (SIZE, D) and state["labels"].shape == (SIZE,) and held == len(memory)
        assert torch.equal(state["labels"][:held], oracle.labels)
        assert_same(state["memory"][:held], oracle.rows)
        older = {**state, "memory": state["memory"][:held], "labels": state["labels"][:held]}
        older["_extra_state"] = {k: v for k, v in state["_extra_state"].items() if k != "held"}
        again = CrossBatchMemory(flashpair.NTXentLoss(), D, SIZE, dtype=torch.float64)
        again.load_state_dict(older)
        assert_equal_states(again.state_dict(), state)


def test_states_that_are_no_memory_of_this_shape():
    memory = CrossBatchMemory(flashpair.NTXentLoss(), D, SIZE)
    for x, labels in batches((9, 9, 9)):
        memory(x, labels)
    state = memory.state_dict()
    with pytest.raises(RuntimeError, match="at most memory_size = 9 rows of embedding_size = 6, got float32"):
        CrossBatchMemory(flashpair.NTXentLoss(), D, 9).load_state_dict(state)
    with pytest.raises(RuntimeError, match="embedding_size = 7"):
        CrossBatchMemory(flashpair.NTXentLoss(), D + 1, SIZE).load_state_dict(state)
    del state["memory"]
    with pytest.raises(RuntimeError, match=r'Missing key.*"memory"'):
        CrossBatchMemory(flashpair.NTXentLoss(), D, SIZE).load_state_dict(state)


def test_reset():
    memory = CrossBatchMemory(flashpair.NTXentLoss(), D, SIZE, dtype=torch.float64)
    for x, labels in batches((9, 9, 9)):
        first = step(memory, x, labels)
    memory.reset()
    assert len(memory) == 0 and memory.dtype == torch.float64
    found, truth = step(memory, x, labels), step(memory.criterion, x, labels)
    assert_same(found[0], truth[0])
    assert not torch.equal(first[0], truth[0])


def test_repr_and_parameters():
    memory = CrossBatchMemory(flashpair.MarginLoss(learn_beta=True), D, SIZE)
    assert "embedding_size=6, memory_size=23 (0 held), dtype=torch.float32" in repr(memory)
    assert [name for name, _ in memory.named_parameters()] == ["criterion.beta"]
    for x, labels in batches((9, 9, 9), dtype=torch.float32):
        memory(x, labels).backward()
    assert memory.criterion.beta.grad.abs() > 0
    assert "memory_size=23 (full)" in repr(memory)


def test_a_call_that_raises_changes_nothing(segment, monkeypatch):
    memory, oracle = both(CRITERIA["MultiSimilarityLoss"])
    for x, labels in batches():
        before = memory.state_dict()
        with monkeypatch.context() as patched:
            patched.setattr(memory.criterion, "of_chunks", lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                memory(x, labels)
        assert_equal_states(memory.state_dict(), before)
        assert_same(memory(x, labels), oracle(x, labels))


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputed_it_sees_what_it_saw(reentrant, segment):
    memory, plain = (CrossBatchMemory(flashpair.NTXentLoss(), D, SIZE) for _ in range(2))
    for x, labels in batches((7, 9, 12, 6, 9), dtype=torch.float32):
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        checkpoint(memory, a, labels, use_reentrant=reentrant).backward()
        plain(b, labels).backward()
        assert torch.equal(a.grad, b.grad)
        assert_equal_states(memory.state_dict(), plain.state_dict())
    loss = checkpoint(memory, a, labels, use_reentrant=reentrant)
    memory(x.flip(0), labels)
    with pytest.raises(RuntimeError, match="can recompute a call of CrossBatchMemory only until the next call"):
        loss.backward()


def test_rows_that_are_not_finite_do_not_enter(segment):
    memory, oracle = both(CRITERIA["NTXentLoss"])
    for k, (x, labels) in enumerate(batches((7, 9, 5, 6, 3))):
        if k == 2:
            bad = x.clone()
            bad[1, 0], bad[3, 2] = torch.nan, torch.inf
            assert memory(bad, labels).isnan()
            kept = torch.tensor([0, 2, 4])
            oracle.rows, oracle.labels = oracle.rows[-18:], oracle.labels[-18:]
            oracle(x[kept], labels[kept])
            assert len(memory) == len(oracle.rows)
            continue
        for f, t in zip(step(memory, x, labels), step(oracle, x, labels), strict=True):
            assert_same(f, t)


@pytest.mark.parametrize("late", [False, True], ids=["in a segment", "in the last batch"])
@pytest.mark.parametrize("way", ["a state", "a dtype that does not hold them"])
def test_entries_that_are_no_longer_finite_go(way, late, segment):
    """An older version's state may hold NaN; a cast may make infinities."""
    common = {"normalize": False, "distance": "euclidean", "pos_margin": 0.0, "neg_margin": 1.0}
    made, clean = (CrossBatchMemory(flashpair.ContrastiveLoss(**common), D, SIZE) for _ in range(2))
    for k, (x, labels) in enumerate(batches((7, 9, 5), dtype=torch.float32)):
        bad = torch.zeros(len(x), dtype=torch.bool)
        bad[[1, 3]] = (k == 2) if late else (k == 0)
        made(torch.where(bad[:, None], 1e6, x), labels)
        clean(x[~bad], labels[~bad])
    if way == "a state":
        state = made.state_dict()
        state["memory"] = torch.where(state["memory"] == 1e6, torch.nan, state["memory"])
        made.load_state_dict(state)
    else:
        made, clean = made.half(), clean.half()
    assert len(made) == len(clean) == 19
    for x, labels in batches((4, 6, 11, 9), seed=5, dtype=torch.float32):
        for f, t in zip(step(made, x, labels), step(clean, x, labels), strict=True):
            assert f.isfinite().all()
            torch.testing.assert_close(f, t)
        assert torch.equal(made.memory[: len(clean)], clean.memory[: len(clean)])


def test_distributed_checkpoint_loads_in_place(tmp_path):
    import torch.distributed.checkpoint as dcp

    memory, fresh = (CrossBatchMemory(flashpair.NTXentLoss(), D, SIZE) for _ in range(2))
    for x, labels in batches((7, 9), dtype=torch.float32):
        memory(x, labels)
    dcp.save({"model": memory.state_dict()}, checkpoint_id=tmp_path)
    state = {"model": fresh.state_dict()}
    dcp.load(state, checkpoint_id=tmp_path)
    fresh.load_state_dict(state["model"])
    assert len(fresh) == 16
    assert_equal_states(fresh.state_dict(), memory.state_dict())
