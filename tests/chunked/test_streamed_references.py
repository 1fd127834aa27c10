"""References read a block at a time: against all of them in one piece, from every kind of source, in bounded memory."""

from __future__ import annotations

import numpy as np
import peaks
import pytest
import torch
from conftest import needs_extension
from helpers import REFERENCE_CRITERIA, assert_as_good_as, assert_same, batch, gradients
from torch import nn

import flashpair
from flashpair import StreamedReferences

pytestmark = needs_extension
M = 91


@pytest.fixture(scope="module")
def problem():
    x, labels = batch(37, 8, 4, torch.float64)
    y, ref_labels = batch(M, 8, 4, torch.float64, seed=1)
    return x, labels, y, ref_labels


def _results(criterion, x, labels, **references):
    """Row losses, their gradient, and the parameters', under random upstream gradients."""
    a = x.clone().requires_grad_()
    rows = criterion(a, labels, **references)
    return [rows.detach(), *gradients((rows,), [a, *criterion.parameters()])]


@pytest.mark.parametrize("block", [1, 20, M - 1, M, M + 5])
@pytest.mark.parametrize("name", REFERENCE_CRITERIA)
def test_every_row_of_the_table(name, block, problem):
    x, labels, y, ref_labels = problem
    criterion = REFERENCE_CRITERIA[name](reduction="none").double()
    stream = StreamedReferences(y, ref_labels, block=block)
    truth = _results(REFERENCE_CRITERIA[name](reduction="none", impl="reference").double(), x, labels, ref_emb=y,
                     ref_labels=ref_labels)  # fmt: skip
    for f, t in zip(_results(criterion, x, labels, ref_emb=stream), truth, strict=True):
        assert_same(f, t)


@pytest.mark.parametrize("reduction", ["mean", "sum", "mean_valid", "nonzero"])
def test_reductions_and_learned_numbers(reduction, problem):
    x, labels, y, ref_labels = problem
    found = []
    for impl in ("auto", "reference"):
        criterion = flashpair.NTXentLoss(reduction=reduction, impl=impl)
        criterion.temperature = nn.Parameter(torch.tensor(0.3, dtype=torch.float64))
        refs = (
            {"ref_emb": StreamedReferences(y, ref_labels, block=16)}
            if impl == "auto"
            else {"ref_emb": y, "ref_labels": ref_labels}
        )
        found.append(_results(criterion, x, labels, **refs))
    assert found[0][2].abs() > 0
    for f, t in zip(*found, strict=True):
        assert_same(f, t)


def _on_disk(y, path, dtype):
    np.save(path, y.numpy().astype(dtype))
    return np.load(path, mmap_mode="r")


def _sources(y, path):
    parts = list(y.split(20))
    whole = _on_disk(torch.cat([y[:3], y]), path / "longer.npy", np.float64)
    raw = np.memmap(path / "raw", np.float64, "w+", shape=tuple(y.shape))
    raw[:] = y.numpy()
    raw.flush()
    return {
        "tensor": y,
        "strided tensor": torch.stack([y, y], 2)[:, :, 1],
        "array": y.numpy(),
        "npy on disk": _on_disk(y, path / "bank.npy", np.float64),
        "raw file": np.memmap(path / "raw", np.float64, "r", shape=tuple(y.shape)),
        "part of a file": whole[3:],
        "columns of a file": _on_disk(torch.cat([y, y], 1), path / "wide.npy", np.float64)[:, : y.shape[1]],
        "list": parts,
        "function": lambda: iter(parts),
    }


@pytest.mark.parametrize("kind", ["tensor", "strided tensor", "array", "npy on disk", "raw file", "part of a file",
                                  "columns of a file", "list", "function"])  # fmt: skip
def test_every_source(kind, problem, tmp_path):
    x, labels, y, ref_labels = problem
    source = _sources(y, tmp_path)[kind]
    block = None if kind in ("list", "function") else 13
    criterion = flashpair.MultiSimilarityLoss(reduction="none")
    truth = _results(flashpair.MultiSimilarityLoss(reduction="none", impl="reference"), x, labels, ref_emb=y,
                     ref_labels=ref_labels)  # fmt: skip
    found = _results(criterion, x, labels, ref_emb=StreamedReferences(source, ref_labels, block=block))
    for f, t in zip(found, truth, strict=True):
        assert_same(f, t)


def test_half_precision_on_disk_is_computed_in_float32(problem, tmp_path):
    x, labels, y, ref_labels = problem
    bank = _on_disk(y, tmp_path / "bank.npy", np.float16)
    criterion = flashpair.MultiSimilarityLoss()
    loss = criterion(x.float(), labels, ref_emb=StreamedReferences(bank, ref_labels, block=30))
    whole = criterion(x.float(), labels, ref_emb=torch.from_numpy(np.array(bank)).float(), ref_labels=ref_labels)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, whole)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(criterion(x.float(), labels, ref_emb=StreamedReferences(bank, ref_labels, block=30)), loss)


@pytest.mark.parametrize("make", [flashpair.SupConLoss, flashpair.MultiSimilarityLoss, flashpair.HistogramLoss])
def test_float32_over_many_blocks_is_as_good_as_dense_code(make):
    x, labels = batch(40, 24, 4, torch.float64)
    y, ref_labels = batch(3000, 24, 60, torch.float64, seed=1)
    truth = _results(make(impl="reference"), x, labels, ref_emb=y, ref_labels=ref_labels)
    eager = _results(make(impl="reference"), x.float(), labels, ref_emb=y.float(), ref_labels=ref_labels)
    found = _results(make(), x.float(), labels, ref_emb=StreamedReferences(y.float(), ref_labels, block=30))
    for f, e, t in zip(found, eager, truth, strict=True):
        assert_as_good_as(f, e, t)


def test_nothing_of_a_kind(problem):
    x, labels, y, ref_labels = problem
    for n, m in ((0, M), (37, 0), (0, 0)):
        criterion = flashpair.NCALoss(reduction="none")
        stream = StreamedReferences(y[:m], ref_labels[:m], block=20)
        truth = _results(flashpair.NCALoss(reduction="none", impl="reference"), x[:n], labels[:n], ref_emb=y[:m],
                         ref_labels=ref_labels[:m])  # fmt: skip
        for f, t in zip(_results(criterion, x[:n], labels[:n], ref_emb=stream), truth, strict=True):
            assert_same(f, t)


def test_a_nan_in_any_block_is_a_nan(problem):
    x, labels, y, ref_labels = problem
    y = y.clone()
    y[70, 3] = torch.nan
    loss = flashpair.MultiSimilarityLoss()(x, labels, ref_emb=StreamedReferences(y, ref_labels, block=20))
    assert loss.isnan()


def test_a_nan_among_references_is_a_nan_where_no_row_has_a_loss(problem):
    x, labels, y, ref_labels = problem
    y = y.clone()
    y[70, 3] = torch.nan
    stream = StreamedReferences(y, torch.zeros_like(ref_labels), block=20)
    for criterion in (flashpair.GeneralizedLiftedStructureLoss(), flashpair.TripletMarginLoss()):
        assert criterion(x, torch.zeros_like(labels), ref_emb=stream).isnan()


def test_a_class_in_many_blocks_and_equal_extremes(problem):
    """Of equal nearest references the first in the caller's order has the gradient, in whatever block it is."""
    x, labels, y, ref_labels = problem
    x, y = x[:8], y[torch.tensor([5, 1, 7, 5, 2, 7, 1, 5])]
    ref_labels = torch.tensor([9, 9, 9, 9, 3, 9, 9, 9])
    labels = torch.full((8,), 3)
    found, truth = [], []
    for impl, out in (("auto", found), ("reference", truth)):
        for block in (1, 2, 8):
            criterion = flashpair.TripletMarginLoss(1.0, triplets="hard", reduction="sum", impl=impl)
            refs = {"ref_emb": y, "ref_labels": ref_labels}
            refs = {"ref_emb": StreamedReferences(y, ref_labels, block=block)} if impl == "auto" else refs
            out.append(_results(criterion, x, labels, **refs))
    for f, t in zip(found, truth, strict=True):
        for a, b in zip(f, t, strict=True):
            assert_same(a, b)


def test_progress_is_told_of_every_block(problem):
    x, labels, y, ref_labels = problem
    seen = []
    criterion = flashpair.MultiSimilarityLoss()
    refs = StreamedReferences(y, ref_labels, block=40, progress=lambda done, total: seen.append((done, total)))
    criterion(x.clone().requires_grad_(), labels, ref_emb=refs).backward()
    assert seen == [(1, 3), (2, 3), (3, 3)] * 4  # positives, negatives, positives, and backward
    bar = StreamedReferences(list(y.split(40)), ref_labels, progress=True)
    torch.testing.assert_close(
        criterion(x, labels, ref_emb=bar), criterion(x, labels, ref_emb=y, ref_labels=ref_labels)
    )


def test_same_bits_and_untouched_inputs(problem):
    x, labels, y, ref_labels = problem
    before = y.clone(), ref_labels.clone(), x.clone()
    criterion = flashpair.MultiSimilarityLoss(reduction="none")
    first, *others = (
        _results(criterion, x, labels, ref_emb=StreamedReferences(y, ref_labels, block=20)) for _ in range(5)
    )
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(before, (y, ref_labels, x), strict=True))


FILE = """
import numpy as np
from flashpair import StreamedReferences
path, (n, m, d, block) = sys.argv[1], map(int, sys.argv[2:])
torch.set_num_threads(2)
bank = np.memmap(path, np.float32, "w+", shape=(m, d))
for first in range(0, m, block):
    bank[first : first + block] = torch.randn(block, d).numpy()
bank.flush()
bank = np.memmap(path, np.float32, "r", shape=(m, d))
x, labels = torch.randn(n, d), torch.arange(n) // 4
refs = StreamedReferences(bank, torch.arange(m) % 1000, block=block)
criterion = flashpair.NTXentLoss()
def step():
    criterion(x.clone().requires_grad_(), labels, ref_emb=refs).backward()
step()
print(peak_of(step).extra)
"""


@peaks.only_linux
def test_memory_of_a_file_is_that_of_blocks(tmp_path):
    """Beside the anchors' own: some blocks, whatever M is."""
    n, d, size = 64, 64, 8192
    block, most = 4 * size * d, 64 * size
    small, large = (peaks.printed(FILE, tmp_path / f"bank{m}", n, m, d, size)[0] for m in (4 * size, most))
    bound = 8 * block + 2**21
    assert small < bound, (small, block)
    assert large < bound < most * d * 4 / 3, (large, block)


def test_what_cannot_be(problem):
    x, labels, y, ref_labels = problem
    for source, error, match in (
        ((part for part in [y]), TypeError, "readable more than once"),
        (7, TypeError, "must be an array, a tensor, an iterable or a function"),
        (y[0], ValueError, r"shape \(M, D\)"),
        (y[:5], ValueError, r"like source"),
    ):
        with pytest.raises(error, match=match):
            StreamedReferences(source, ref_labels)
    with pytest.raises(TypeError, match="labels must be an integer tensor"):
        StreamedReferences(y, ref_labels.float())
    with pytest.raises(ValueError, match="block must be at least 1"):
        StreamedReferences(y, ref_labels, block=0)
    stream, criterion = StreamedReferences(y, ref_labels), flashpair.MultiSimilarityLoss()
    with pytest.raises(ValueError, match="ref_labels must be None"):
        criterion(x, labels, ref_emb=stream, ref_labels=ref_labels)
    with pytest.raises(ValueError, match="within a batch"):
        flashpair.LiftedStructureLoss()(x, labels, ref_emb=stream)
    with pytest.raises(ValueError, match="ref_emb must be one tensor, because"):
        flashpair.NPairsLoss(l2_weight=0.1)(x, labels, ref_emb=stream)
    for impl in ("reference", "screened"):
        with pytest.raises(
            RuntimeError, match=f"'tiled' and 'fused' take references in chunks: impl='{impl}' cannot run"
        ):
            flashpair.MultiSimilarityLoss(impl=impl)(x, labels, ref_emb=stream)
    with pytest.raises(ValueError, match="must give"):
        criterion(x[:, :4], labels, ref_emb=stream)
    for short in (list(y[:50].split(20)), list(torch.cat([y, y]).split(20))):
        with pytest.raises(ValueError, match="must give"):
            criterion(x, labels, ref_emb=StreamedReferences(short, ref_labels))


def _leaf(criterion, x, labels, stream):
    leaf = x.clone().requires_grad_()
    return criterion(leaf, labels, ref_emb=stream), leaf


def test_second_derivatives_are_refused(problem):
    x, labels, y, ref_labels = problem
    stream = StreamedReferences(y, ref_labels, block=20)
    loss, leaf = _leaf(flashpair.SupConLoss(), x, labels, stream)
    with pytest.raises(RuntimeError, match="in one tensor, on one process"):
        torch.autograd.grad(loss, leaf, create_graph=True)


def test_a_transform_of_ones_own(problem):
    x, labels, y, ref_labels = problem
    flashpair.register_transform("streamed_bell", lambda t: torch.exp(-t * t))

    class Own(flashpair.Criterion):
        def __init__(self, **common):
            super().__init__(**{"normalize": True, "reduction": "none", "impl": "auto", **common})

        def row_losses(self, pairs):
            (row,) = pairs.reduce(flashpair.Reduction("sum", "negatives", "streamed_bell", scale=2.0))
            return flashpair.RowLosses(row, pairs.num_negatives() > 0, row.shape[0])

    truth = _results(Own(impl="reference"), x, labels, ref_emb=y, ref_labels=ref_labels)
    found = _results(Own(), x, labels, ref_emb=StreamedReferences(y, ref_labels, block=20))
    for f, t in zip(found, truth, strict=True):
        assert_same(f, t)


@pytest.mark.parametrize("kind", ["replaced", "removed", "written to privately", "reversed", "big-endian"])
def test_the_array_that_was_given_counts(kind, problem, tmp_path):
    x, labels, y, ref_labels = problem
    path, other = tmp_path / "bank.npy", tmp_path / "other.npy"
    bank = _on_disk(y, path, np.float64)
    if kind == "replaced":
        np.save(other, 2 + y.numpy())
        other.replace(path)
    elif kind == "removed":
        path.unlink()
    elif kind == "written to privately":
        bank = np.load(path, mmap_mode="c")
        bank[:] = bank[::-1].copy()
    elif kind == "reversed":
        bank = bank[::-1]
    else:
        np.save(other, y.numpy().astype(">f8"))
        bank = np.load(other, mmap_mode="r")
    held = torch.from_numpy(np.array(bank).astype(np.float64))
    criterion = flashpair.MultiSimilarityLoss(reduction="none")
    stream = StreamedReferences(bank, ref_labels, block=13)
    truth = _results(criterion, x, labels, ref_emb=held, ref_labels=ref_labels)
    for _ in range(2):  # reading discards nothing
        for f, t in zip(_results(criterion, x, labels, ref_emb=stream), truth, strict=True):
            assert_same(f, t)


def test_a_file_that_was_cut_and_numbers_that_are_none(problem, tmp_path):
    x, labels, y, ref_labels = problem
    bank = _on_disk(y.repeat(1, 16), tmp_path / "bank.npy", np.float64)
    stream = StreamedReferences(bank, ref_labels, block=13)
    with open(tmp_path / "bank.npy", "r+b") as file:
        file.truncate(5000)
    with pytest.raises(ValueError, match="source must not shrink: its file was cut to"):
        flashpair.NTXentLoss()(x.repeat(1, 16), labels, ref_emb=stream)
    for bad in (y.int(), y.numpy().astype(bool), y.numpy().astype(object), y.numpy().astype(np.complex64)):
        with pytest.raises(TypeError, match="source must have a floating dtype"):
            StreamedReferences(bad, ref_labels)
    with pytest.raises(TypeError, match="source must give floating-point tensors"):
        flashpair.NTXentLoss()(x, labels, ref_emb=StreamedReferences([y.numpy()], ref_labels))


def test_labels_are_a_copy(problem):
    _, _, y, ref_labels = problem
    mine = ref_labels.clone()
    stream = StreamedReferences(y, mine)
    mine.zero_()
    assert torch.equal(stream.labels, ref_labels)


@pytest.mark.parametrize("kind", ["file", "array", "tensor", "loader that shuffles", "two rows changed places"])
@pytest.mark.parametrize("name", ["NTXentLoss", "MultiSimilarityLoss"])
def test_rows_that_change_within_a_call_are_an_error(kind, name, problem, tmp_path):
    x, labels, y, ref_labels = problem
    bank = {"file": lambda: _on_disk(y, tmp_path / "bank.npy", np.float64), "tensor": y.clone}.get(
        kind, lambda: y.numpy().copy()
    )()
    if kind == "file":
        bank = np.load(tmp_path / "bank.npy", mmap_mode="r+")
    if kind == "loader that shuffles":
        generator = torch.Generator().manual_seed(0)
        bank = torch.utils.data.DataLoader(y, batch_size=20, shuffle=True, generator=generator)
    stream, leaf = StreamedReferences(bank, ref_labels, block=20), x.clone().requires_grad_()
    with pytest.raises(ValueError, match=r"source must give the same rows each time, and rows \d+ to \d+ have changed"):
        loss = getattr(flashpair, name)()(leaf, labels, ref_emb=stream)
        if kind == "two rows changed places":
            bank[[3, 7]] = bank[[7, 3]]
        elif kind != "loader that shuffles":
            bank[45, 0] += 1
        loss.backward()
    if kind != "loader that shuffles":  # between two calls the source may change
        truth = _results(flashpair.NTXentLoss(), x, labels, ref_emb=torch.as_tensor(bank), ref_labels=ref_labels)
        found = _results(flashpair.NTXentLoss(), x, labels, ref_emb=stream)
        for f, t in zip(found, truth, strict=True):
            assert_same(f, t)


def test_sources_without_plain_rows_are_refused(problem):
    class Table:
        """Has a shape, and slices that are no arrays, as tables and sparse matrices."""

        shape = (len(problem[2]), problem[2].shape[1])

        def __getitem__(self, at):
            return {"embedding": at}

    x, labels, y, ref_labels = problem
    for source, error, match in (
        (y.to_sparse(), TypeError, "source must be a dense tensor that has values, got float64 sparse_coo"),
        (y.to("meta"), TypeError, "source must be a dense tensor that has values, got .* on meta"),
        ("bank.npy", TypeError, "source must be an array, a tensor, an iterable or a function, got str"),
        ({"bank": y}, TypeError, "source must be an array, a tensor, an iterable or a function, got dict"),
        (Table(), TypeError, "source must be an array whose slices are arrays .*, got Table"),
        (np.ma.masked_array(y.numpy(), mask=y.numpy() > 1), ValueError, "source must have no masked entries"),
    ):
        with pytest.raises(error, match=match):
            flashpair.NTXentLoss()(x, labels, ref_emb=StreamedReferences(source, ref_labels))
    with pytest.raises(TypeError, match="labels must be a dense tensor"):
        StreamedReferences(y, ref_labels.to_sparse())
    with pytest.raises(TypeError, match=r"labels must be an integer tensor .* torch\.as_tensor makes a tensor of it"):
        StreamedReferences(y, ref_labels.numpy())
