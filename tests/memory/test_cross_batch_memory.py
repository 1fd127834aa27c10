"""CrossBatchMemory: values and gradients against the dense oracle, plain PyTorch and pytorch-metric-learning."""

from __future__ import annotations

import cross_batch_memory_cases
import pytest
import torch
from conftest import needs_extension
from cross_batch_memory_cases import SIZE, D, Oracle, assert_equal_states, batches, both, step
from helpers import CRITERIA, REFERENCE_CRITERIA, assert_as_good_as, assert_same, assert_same_bits, relative
from pytorch_metric_learning import losses, miners

import flashpair
from flashpair import CrossBatchMemory
from flashpair.backends import extension
from flashpair.memory import queue

pytestmark = needs_extension
segment = cross_batch_memory_cases.segment
# Of equal pairs the hardest has the gradient, and which that is is rounding; so is the angle of equal vectors.
NO_DUPLICATES = [name for name in REFERENCE_CRITERIA if "hard" in name or name == "TupletMarginLoss"]


@pytest.mark.parametrize("name", REFERENCE_CRITERIA)
def test_every_criterion_over_many_batches(name, segment):
    memory, oracle = both(CRITERIA[name])
    learned = list(memory.criterion.parameters())
    changed, before = 0, None
    for x, labels in batches():
        if (
            name not in NO_DUPLICATES and len(x) > 3 and before is not None
        ):  # duplicates of what came before are real pairs
            x[:2], labels[:2] = before[0][-2:], before[1][-2:]
        before = (x, labels) if len(x) > 1 else before
        truth = step(oracle, x, labels, learned)
        found = step(memory, x, labels, learned)
        for f, t in zip(found, truth, strict=True):
            assert_same(f, t)
        changed += bool(len(x)) and found[1].abs().max() > 0
        assert len(memory) == len(oracle.rows)
    assert changed > 5, "losses with gradients were compared"


@pytest.mark.parametrize("reduction", ["none", "sum", "mean_valid", "nonzero"])
@pytest.mark.parametrize("name", ["MultiSimilarityLoss", "ContrastiveLoss", "NPairsLoss", "MarginLoss", "SupConLoss"])
def test_every_reduction(name, reduction, segment):
    memory, oracle = both(CRITERIA[name], reduction=reduction)
    for x, labels in batches():
        for f, t in zip(step(memory, x, labels), step(oracle, x, labels), strict=True):
            assert_same(f, t)


@pytest.mark.parametrize("name", REFERENCE_CRITERIA)
def test_the_first_call_is_the_plain_criterion(name):
    memory, _ = both(CRITERIA[name])
    learned = list(memory.criterion.parameters())
    x, labels = next(batches((17,)))
    for f, t in zip(step(memory, x, labels, learned), step(memory.criterion, x, labels, learned), strict=True):
        assert_same(f, t)


def ntxent(x, labels, memory, memory_labels, temperature):
    """In plain PyTorch, of what NT-Xent says: a softmax of each positive among the negatives."""
    x = torch.nn.functional.normalize(x)
    logits = x @ torch.cat([x, memory]).T / temperature
    same = labels[:, None] == torch.cat([labels, memory_labels])[None]
    negatives = logits.masked_fill(same, -torch.inf)
    positives = same & ~torch.eye(*same.shape, dtype=torch.bool)
    terms = torch.logaddexp(logits, negatives.logsumexp(1, keepdim=True)) - logits
    return terms[positives].mean(), x.detach()


def test_in_plain_pytorch(segment):
    memory, kept = CrossBatchMemory(flashpair.NTXentLoss(0.2), D, SIZE, dtype=torch.float64), None
    rows, names = torch.zeros(0, D, dtype=torch.float64), torch.zeros(0, dtype=torch.int64)
    for x, labels in batches((7, 9, 12, 6, 9)):
        keep = slice(max(0, len(rows) + len(x) - SIZE), None)
        rows, names = rows[keep], names[keep]
        a = x.clone().requires_grad_()
        loss, kept = ntxent(a, labels, rows, names, 0.2)
        (g,) = torch.autograd.grad(loss * 1.7, a)
        b = x.clone().requires_grad_()
        found = memory(b, labels)
        assert_same(found.detach(), loss.detach())
        assert_same(torch.autograd.grad(found * 1.7, b)[0], g)
        rows, names = torch.cat([rows, kept]), torch.cat([names, labels])


PML = {
    "NTXent": (flashpair.NTXentLoss(0.3), losses.NTXentLoss(0.3), None),
    "Contrastive": (flashpair.ContrastiveLoss(), losses.ContrastiveLoss(), None),
    "MultiSimilarity": (
        flashpair.MultiSimilarityLoss(2, 50, 0.5, epsilon=0.1), losses.MultiSimilarityLoss(2, 50, 0.5),
        miners.MultiSimilarityMiner(0.1),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PML)
def test_values_of_pytorch_metric_learning(name, segment):
    ours, theirs, miner = PML[name]
    memory = CrossBatchMemory(ours, D, SIZE, dtype=torch.float64)
    library = losses.CrossBatchMemory(theirs, D, SIZE, miner)
    library.embedding_memory = library.embedding_memory.double()
    for k, (x, labels) in enumerate(batches((7, 9, 12, 6, 9, 12, 12))):
        found, truth = step(memory, x, labels), step(library, x, labels)
        assert_same(found[0], truth[0])
        if k == 0 and name == "Contrastive":  # whose pairs have the same weight from both of their ends
            assert_same(found[1], 2 * truth[1])  # the library takes the references for constants
        elif k == 0:
            assert relative(found[1], truth[1]) > 0.1


def test_enqueue_and_evaluation(segment):
    memory, oracle = both(CRITERIA["MultiSimilarityLoss"])
    for k, (x, labels) in enumerate(batches((7, 9, 12, 6, 9, 12, 12, 5))):
        enqueue = k % 3 != 2
        memory.train(enqueue)
        before = memory.state_dict()
        for f, t in zip(step(memory, x, labels), step(oracle, x, labels, enqueue=enqueue), strict=True):
            assert_same(f, t)
        if not enqueue:
            assert_equal_states(memory.state_dict(), before)
        truth = step(oracle, x[:3], labels[:3], enqueue=False)
        for f, t in zip(step(memory, x[:3], labels[:3], enqueue=False), truth, strict=True):
            assert_same(f, t)
    memory.eval()
    count = memory.queue.count
    with torch.no_grad():
        loss = memory(x, labels, enqueue=True)
    assert memory.queue.count == count + len(x) and not loss.requires_grad


def test_backward_sees_the_memory_that_forward_saw(segment):
    """Also where other batches have come between, and the entries are gone."""
    memory, oracle = both(CRITERIA["MultiSimilarityLoss"])
    waiting = []
    for x, labels in batches():
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        waiting.append((memory(a, labels), a, oracle(b, labels), b))
    for loss, a, truth, b in waiting:
        assert_same(torch.autograd.grad(loss, a)[0], torch.autograd.grad(truth, b)[0])


def test_the_gradient_is_of_the_batch_alone():
    memory = CrossBatchMemory(flashpair.NTXentLoss(), D, SIZE)
    earlier = []
    for x, labels in batches((6, 6, 6), dtype=torch.float32):
        earlier.append(x.requires_grad_())
        loss = memory(x, labels)
    loss.backward()
    assert earlier[0].grad is None and earlier[1].grad is None and earlier[2].grad.abs().max() > 0
    assert all(not t.requires_grad for s in memory.queue.held() for t in s)


def test_float32_is_as_good_as_dense_code():
    make = CRITERIA["NTXentLoss"]
    memory = CrossBatchMemory(make(), D, SIZE)
    eager, oracle = Oracle(make(), SIZE), Oracle(make(), SIZE)
    eager.rows = eager.rows.float()
    for x, labels in batches(dtype=torch.float32):
        if not len(x):
            continue
        found, plain, truth = (step(m, a, labels) for m, a in ((memory, x), (eager, x), (oracle, x.double())))
        for f, p, t in zip(found, plain, truth, strict=True):
            assert_as_good_as(f, p, t)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_autocast(dtype):
    """Embeddings of 16 bits are what float32 of the same numbers is; so is a network under autocast."""
    memory, plain = (CrossBatchMemory(flashpair.MultiSimilarityLoss(), D, SIZE) for _ in range(2))
    for x, labels in batches(dtype=dtype):
        with torch.autocast("cpu", torch.bfloat16):
            found = step(memory, x, labels)
        truth = step(plain, x.float(), labels)
        assert found[0].dtype == torch.float32 and found[1].dtype == dtype
        assert torch.equal(found[0], truth[0]) and torch.equal(found[1], truth[1].to(dtype))


def test_a_memory_of_another_dtype_rounds_what_it_holds():
    memory, oracle = CrossBatchMemory(flashpair.NTXentLoss(), D, SIZE, dtype=torch.bfloat16).double(), None
    assert memory.dtype == torch.float64, "casts with the module"
    memory = CrossBatchMemory(flashpair.NTXentLoss(), D, SIZE, dtype=torch.bfloat16)
    oracle = Oracle(memory.criterion, SIZE)
    for x, labels in batches((9, 9, 9, 9)):
        for f, t in zip(step(memory, x, labels), step(oracle, x, labels), strict=True):
            assert_same(f, t)
        oracle.rows = oracle.rows.bfloat16().double()
    assert memory.state_dict()["memory"].dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["MultiSimilarityLoss", "NTXentLoss", "TripletMarginLoss(triplets='hard')"])
def test_fused(name, monkeypatch):
    monkeypatch.setattr(queue, "RUN_ROWS", 16)
    memory, oracle = both(CRITERIA[name], impl="fused")
    for x, labels in batches((9, 9, 9, 9)):
        for f, t in zip(step(memory, x, labels), step(oracle, x, labels), strict=True):
            assert_same(f, t)


def test_same_bits(segment):
    def run():
        memory = CrossBatchMemory(flashpair.MultiSimilarityLoss(), D, 300)
        return [t for x, labels in batches((90,) * 5, dtype=torch.float32) for t in step(memory, x, labels)]

    assert_same_bits(run, (1, 2, 3))


def test_evaluated_in_inference_mode_then_trained(segment):
    memory, oracle = both(CRITERIA["MultiSimilarityLoss"])
    for k, (x, labels) in enumerate(batches((7, 9, 12, 6, 9, 12))):
        if k % 2:
            with torch.inference_mode():
                assert_same(memory(x, labels).clone(), oracle(x, labels).clone())
            oracle.rows, oracle.labels = oracle.rows.clone(), oracle.labels.clone()
            continue
        for f, t in zip(step(memory, x, labels), step(oracle, x, labels), strict=True):
            assert_same(f, t)


def test_under_torch_compile():
    memory, plain = (CrossBatchMemory(flashpair.MultiSimilarityLoss(), D, SIZE) for _ in range(2))
    compiled = torch.compile(lambda a, labels: memory(2 * a, labels))
    for x, labels in batches((7, 9, 12), dtype=torch.float32):
        found, truth = step(compiled, x, labels), step(lambda a, labels: plain(2 * a, labels), x, labels)
        for f, t in zip(found, truth, strict=True):
            assert torch.allclose(f, t, rtol=1e-5, atol=1e-7)
    assert len(memory) == SIZE


def test_without_the_extension_it_says_why(monkeypatch):
    monkeypatch.setattr(extension, "load", lambda: "built without a compiler")
    from flashpair.engine import dispatch

    monkeypatch.setattr(dispatch.extension, "load", lambda: "built without a compiler")
    memory = CrossBatchMemory(flashpair.NTXentLoss(), D, SIZE)
    with pytest.raises(RuntimeError, match="built without a compiler"):
        memory(*next(batches()))
    assert len(memory) == 0


def test_what_it_refuses():
    x, labels = next(batches())
    memory = CrossBatchMemory(flashpair.NTXentLoss(), D, SIZE)
    with pytest.raises(TypeError, match=r"criterion must be a .* got NTXentLoss"):
        CrossBatchMemory(losses.NTXentLoss(), D, SIZE)
    with pytest.raises(ValueError, match="criterion must take references, and LiftedStructureLoss is defined within"):
        CrossBatchMemory(flashpair.LiftedStructureLoss(), D, SIZE)
    with pytest.raises(ValueError, match="criterion must take references, and ArcFaceLoss"):
        CrossBatchMemory(flashpair.ArcFaceLoss(3, D), D, SIZE)
    with pytest.raises(ValueError, match="criterion must have no penalty on references"):
        CrossBatchMemory(flashpair.NPairsLoss(l2_weight=0.1), D, SIZE)
    for name in ("embedding_size", "memory_size"):
        with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
            CrossBatchMemory(flashpair.NTXentLoss(), **{"embedding_size": D, "memory_size": SIZE, name: 0})
    with pytest.raises(TypeError, match="dtype must be float16"):
        CrossBatchMemory(flashpair.NTXentLoss(), D, SIZE, dtype=torch.int8)
    with pytest.raises(ValueError, match="embeddings must have embedding_size = 6 columns, got float64"):
        memory(x[:, 1:], labels)
    with pytest.raises(TypeError, match="labels must be an integer tensor"):
        memory(x, labels.float())
    with pytest.raises(TypeError, match="enqueue must be a bool"):
        memory(x, labels, enqueue=1)
    with pytest.raises(ValueError, match="embeddings must be at most memory_size = 5 rows, got float64"):
        CrossBatchMemory(flashpair.NTXentLoss(), D, 5)(x, labels)
    with pytest.raises(RuntimeError, match="only 'tiled' and 'fused' take references in chunks"):
        CrossBatchMemory(flashpair.NTXentLoss(impl="reference"), D, SIZE)(x, labels)
    assert len(memory) == 0
