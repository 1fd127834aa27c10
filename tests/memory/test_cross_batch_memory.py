"""CrossBatchMemory: a batch against itself and the entries before it, as a dense oracle has it that keeps a list."""

from __future__ import annotations

import copy
import io
import json
import pickle

import peaks
import pytest
import torch
from conftest import needs_extension
from helpers import CRITERIA, REFERENCE_CRITERIA, assert_as_good_as, assert_same, assert_same_bits, relative
from pytorch_metric_learning import losses, miners
from torch.utils.checkpoint import checkpoint

import flashpair
from bench.studies import memory_bank
from flashpair import CrossBatchMemory, screening
from flashpair.backends import extension
from flashpair.backends.cpu import screened
from flashpair.backends.cpu.screened import rounded
from flashpair.backends.reference import ReferencePairs
from flashpair.chunked import reduce as pieces
from flashpair.core.class_pairs import ClassPairs
from flashpair.core.similarity import dense_pairs, l2_normalize, nan_unless_finite
from flashpair.memory import queue

pytestmark = needs_extension
D, SIZE, CLASSES = 6, 23, 4
RAGGED = (7, 9, 1, 6, 9, 12, 23, 3, 0, 5, 8)  # not filled, filled by parts of a batch, all of it displaced, and on
# Of equal pairs the hardest has the gradient, and which that is is rounding; so is the angle of equal vectors.
NO_DUPLICATES = [name for name in REFERENCE_CRITERIA if "hard" in name or name == "TupletMarginLoss"]


@pytest.fixture(params=["small segments", "one segment", "screened"])
def segment(request, monkeypatch):
    monkeypatch.setattr(queue, "SEGMENT", 64 if request.param == "one segment" else 4)
    if request.param == "screened":
        screen_everything(monkeypatch)


def screen_everything(monkeypatch):
    monkeypatch.setattr(screened, "WORTH_PAIRS", -1)
    monkeypatch.setattr(screened, "WORTH_DEPTH", 1)


def batches(sizes=RAGGED, d=D, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(CLASSES, d, generator=generator, dtype=torch.float64)
    for n in sizes:
        labels = torch.randint(CLASSES, (n,), generator=generator) * 7 - 5
        x = centres[(labels + 5) // 7] + torch.randn(n, d, generator=generator, dtype=torch.float64)
        yield x.to(dtype), labels


class DensePairs(ReferencePairs):
    """Anchors (N, D) against themselves, each but for itself, and constants (M, D)."""

    def __init__(self, x, labels, memory, memory_labels, distance):
        z = dense_pairs(x, torch.cat([x, memory]), distance)
        super().__init__(
            z, labels, torch.cat([labels, memory_labels]), square=False, nonfinite=nan_unless_finite(x, memory)
        )
        other = ~torch.eye(*z.shape, dtype=torch.bool)
        self.masks = {side: mask & other for side, mask in self.masks.items()}
        self.embeddings, self.square = x, True

    def class_pairs(self):
        """By hand: of each class the first anchor and the first reference that is another."""
        anchors, positives = [], []
        for c in self.labels.unique():
            i = int((self.labels == c).nonzero()[0])
            others = self.masks["positives"][i].nonzero()
            if len(others):
                anchors.append(i)
                positives.append(int(others[0]))
        place = torch.arange(len(anchors))
        long = {"dtype": torch.int64}
        return ClassPairs(
            torch.tensor(anchors, **long), torch.tensor(positives, **long), place, torch.tensor(len(anchors))
        )


class Oracle:
    """The same as a CrossBatchMemory with a list of all that has come."""

    def __init__(self, criterion, size, d=D):
        self.criterion, self.size = criterion, size
        self.rows, self.labels = torch.zeros(0, d, dtype=torch.float64), torch.zeros(0, dtype=torch.int64)

    def __call__(self, x, labels, enqueue=True):
        unit, prepare = self.criterion.preparation
        own = prepare(x) if prepare is not None else l2_normalize(x) if unit else x
        keep = min(len(self.rows), self.size - len(x) if enqueue else self.size)
        memory, memory_labels = self.rows[len(self.rows) - keep :], self.labels[len(self.rows) - keep :]
        pairs = DensePairs(own, labels, memory, memory_labels, self.criterion.distance)
        loss = self.criterion.of_chunks(x, labels, pairs)
        if enqueue:
            self.rows, self.labels = torch.cat([memory, own.detach()]), torch.cat([memory_labels, labels])
        return loss


def step(loss_of, x, labels, more=(), **options):
    """Loss and gradients of x and of the criterion's parameters, under an upstream gradient that is not 1."""
    a = x.clone().requires_grad_()
    loss = loss_of(a, labels, **options)
    upstream = torch.randn(loss.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    found = torch.autograd.grad(loss, [a, *more], upstream.to(loss.dtype), allow_unused=True)
    return [loss.detach(), *(torch.zeros_like(a) if g is None else g for g in found)]


def both(make, size=SIZE, **options):
    memory = CrossBatchMemory(make(**options).double(), D, size, dtype=torch.float64)
    return memory, Oracle(memory.criterion, size)


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


def assert_equal_states(found, truth):
    assert found.keys() == truth.keys()
    for name in truth:
        same = torch.equal if isinstance(truth[name], torch.Tensor) else lambda a, b: a == b
        assert same(found[name], truth[name]), name


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
    monkeypatch.setattr(queue, "SEGMENT", 16)
    memory, oracle = both(CRITERIA[name], impl="fused")
    for x, labels in batches((9, 9, 9, 9)):
        for f, t in zip(step(memory, x, labels), step(oracle, x, labels), strict=True):
            assert_same(f, t)


def test_same_bits(segment):
    def run():
        memory = CrossBatchMemory(flashpair.MultiSimilarityLoss(), D, 300)
        return [t for x, labels in batches((90,) * 5, dtype=torch.float32) for t in step(memory, x, labels)]

    assert_same_bits(run, (1, 2, 3))


TIGHT = ["MultiSimilarityLoss", "ContrastiveLoss(0.9, 0.2, 'cosine')", "TripletMarginLoss(triplets='hard')"]
TIGHT += ["BinomialDevianceLoss(epsilon=0.1)", "ContrastiveLoss"]


@pytest.mark.parametrize("listed", [pieces.LIVE_PAIRS_PER_ROW, 0], ids=["listed", "lists too short"])
@pytest.mark.parametrize("name", TIGHT)
def test_screened_where_few_pairs_live(name, listed, monkeypatch):
    """Classes so tight that most pairs are dead: what lives is listed in forward and looked up in backward."""
    screen_everything(monkeypatch)
    monkeypatch.setattr(queue, "SEGMENT", 300)
    monkeypatch.setattr(pieces, "LIVE_PAIRS_PER_ROW", listed)
    memory = CrossBatchMemory(CRITERIA[name](), 32, 700, dtype=torch.float64)
    oracle = Oracle(memory.criterion, 700, 32)
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(60, 32, generator=generator, dtype=torch.float64)
    for _ in range(6):
        labels = torch.randint(60, (180,), generator=generator)
        x = centres[labels] + 0.7 * torch.randn(180, 32, generator=generator, dtype=torch.float64)
        with screening() as seen:
            found = step(memory, x, labels)
        assert seen.tiles > 0
        for f, t in zip(found, step(oracle, x, labels), strict=True):
            assert_same(f, t)
    assert seen.tiles > 2 and seen.whole < seen.tiles
    if "hard" not in name:
        assert 0 < seen.live < seen.pairs / 4


def test_a_named_schedule_is_not_screened(monkeypatch):
    screen_everything(monkeypatch)
    with screening() as seen:
        memory = CrossBatchMemory(flashpair.MultiSimilarityLoss(impl="tiled"), D, SIZE)
        for x, labels in batches(dtype=torch.float32):
            memory(x, labels)
    assert seen.tiles == 0


def test_segments_that_stay_are_rounded_once(monkeypatch):
    screen_everything(monkeypatch)
    monkeypatch.setattr(queue, "SEGMENT", 50)
    memory, kept = CrossBatchMemory(flashpair.MultiSimilarityLoss(), D, 400), []
    for x, labels in batches((20,) * 30, dtype=torch.float32):
        memory(x, labels)
        kept.append([rounded(s.rows) for s in memory.queue.segments])
    same = [a is b and len(a) == 1 for a, b in zip(kept[-1], kept[-2], strict=True)]
    assert sum(same) >= 6


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


def test_bench(tmp_path, capsys):
    options = "--sizes 300,700 --batches 16 --repeats 1 --threads 1"
    memory_bank.main([*options.split(), "--out", str(tmp_path)])
    (file,) = tmp_path.iterdir()
    cases = json.loads(file.read_text())["cases"]
    assert [(c["m"], c["n"]) for c in cases] == [(300, 16), (700, 16)]
    assert all(t["median"] > 0 for c in cases for t in c["times"].values())
    assert capsys.readouterr().out.count("| floor |") == 2


def test_reset():
    memory = CrossBatchMemory(flashpair.NTXentLoss(), D, SIZE, dtype=torch.float64)
    for x, labels in batches((9, 9, 9)):
        first = step(memory, x, labels)
    memory.reset()
    assert len(memory) == 0 and memory.dtype == torch.float64
    found, truth = step(memory, x, labels), step(memory.criterion, x, labels)
    assert_same(found[0], truth[0])
    assert not torch.equal(first[0], truth[0])


def test_what_a_batch_makes_anew_is_bounded_by_segments(monkeypatch):
    """However many segments there are, at most those that it meets at either end."""
    monkeypatch.setattr(queue, "SEGMENT", 50)
    memory = CrossBatchMemory(flashpair.NTXentLoss(), D, 1000)
    for k, (x, labels) in enumerate(batches((30,) * 80, dtype=torch.float32)):
        before = [s.rows.data_ptr() for s in memory.queue.segments]
        memory(x, labels)
        after = [s.rows.data_ptr() for s in memory.queue.segments]
        assert sum(a != b for a, b in zip(after, before, strict=True)) <= 3, k
    assert len(memory) == 1000 and len(after) == 20


FULL = """
impl, (d, n, size) = sys.argv[1], map(int, sys.argv[2:])
torch.set_num_threads(2)
memory = flashpair.CrossBatchMemory(flashpair.MultiSimilarityLoss(impl=impl), d, size)
def step():
    x = torch.randn(n, d, requires_grad=True)
    memory(x, torch.randint(1000, (n,))).backward()
step()
empty = resident()
for _ in range(size // 4096 + 1):
    memory.queue.make_place(4096)
    labels, order = torch.sort(torch.randint(1000, (4096,)))
    memory.queue.enter(torch.nn.functional.normalize(torch.randn(4096, d)), labels, order)
print(resident() - empty)
def steps():
    for _ in range(3):
        step()
print(peak_of(steps).extra)
assert len(memory) == size
"""


@peaks.only_linux
@pytest.mark.parametrize("impl", ["tiled", "auto"])
def test_a_step_takes_a_few_segments_beside_the_memory(impl):
    """Of the memory's size, 200,000 rows, nothing: no matrix (410 MB), no copy (26 MB); but what screening keeps."""
    d, n, size = 32, 512, 200_000
    entries, extra = peaks.printed(FULL, impl, d, n, size)
    row = 4 * d + 16
    assert 0.9 * size * row < entries < 1.5 * size * row
    limit = 8 * queue.SEGMENT * row + 12 * n * row + 64 * 8 * (n + queue.SEGMENT) + 8 * 4 * 512**2
    assert limit < size * 4 * d
    if impl == "auto":  # coordinates in int8 and two numbers a row, and lists of live pairs
        limit += size * (d + 16) + size * 8 * pieces.LIVE_PAIRS_PER_ROW
    assert limit < 4 * n * size / 8 and extra <= limit, f"{extra:,} bytes over {limit:,}"


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
