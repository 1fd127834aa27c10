"""Tensors of other devices and other kinds of memory: the right number, or an error that says which; never a crash.

The meta device stands for a GPU: its tensors have no memory that a kernel for CPU tensors could read.
"""

from __future__ import annotations

import copy
import pickle
import re
import subprocess
import sys

import pytest
import torch
from conftest import needs_extension
from helpers import CRITERIA, batch, made

import flashpair
from flashpair import Bound, Reduction
from flashpair.core.problem import address

X, LABELS = batch(24, 8, 4, torch.float32)
CLASS_LOSSES = (
    "NormalizedSoftmaxLoss", "CosFaceLoss", "ArcFaceLoss", "SphereFaceLoss", "ProxyNCALoss", "ProxyAnchorLoss",
    "SoftTripleLoss",
)  # fmt: skip
UNDER_ANOTHER_DEFAULT = {  # what runs, each line for itself, with the default device changed after x and l are made
    "losses": "[c(x.clone().requires_grad_(), l).backward() for c in criteria]",
    "mined": "f.BinomialDevianceLoss(epsilon=0.1)(x.requires_grad_(), l).backward(); f.MinedPairLoss()(x, l)",
    "references": "f.MultiSimilarityLoss()(x, l, ref_emb=f.References(x, l))",
    "learned": "f.NTXentLoss(torch.nn.Parameter(torch.tensor(0.1, device='cpu')))(x, l).backward()",
    "large": "f.MultiSimilarityLoss()(x.repeat(20, 1).requires_grad_(), l.repeat(20)).backward()",
    "row_reduce": "f.row_reduce(x, l, f.Reduction('max', 'negatives'), f.Reduction('count', 'all', lower=0.0))",
    "nearest": "f.nearest(x, 3), f.nearest(x, 3, ref_emb=x, distance='euclidean')",
    "retrieval": "f.metrics.retrieval(x, l), f.metrics.knn_accuracy(x, l)",
    "identification": "f.metrics.identification(x, l, x, l)",
    "samplers": "next(iter(f.samplers.MPerClassSampler(l, 4, 16))), next(iter(f.samplers.NPairsSampler(l, 4)))",
    "HardClassSampler": "next(iter(f.samplers.HardClassSampler(l, lambda i: x[i], 4)))",
    "miners": "f.miners.BatchHardMiner()(x, l), f.miners.MultiSimilarityMiner()(x, l)",
}


@pytest.mark.parametrize("name", UNDER_ANOTHER_DEFAULT)
def test_another_default_device(name):
    head = (
        "import torch, flashpair as f; from flashpair.losses.registry import CRITERIA\n"
        "x, l = torch.randn(60, 16), torch.arange(60) // 4; criteria = [make() for make in CRITERIA.values()]\n"
        "criteria = [c.of_width(16) if hasattr(c, 'of_width') else c for c in criteria]\n"
        "torch.set_default_device('meta')\n"
    )
    done = subprocess.run([sys.executable, "-c", head + UNDER_ANOTHER_DEFAULT[name]], capture_output=True, text=True)
    assert done.returncode == 0, f"exit {done.returncode}: {done.stderr[-600:]}"


@pytest.mark.parametrize("name", CLASS_LOSSES)
def test_class_weights_on_another_device(name):
    criterion = getattr(flashpair, name)(6, 8)
    with pytest.raises(ValueError, match=rf"{name}.weight must be on the device of embeddings, cpu, got .* on meta"):
        criterion.to("meta")(X, LABELS)
    with pytest.raises(ValueError, match=rf"{name}.weight must be on the device of embeddings, meta, got .* on cpu"):
        getattr(flashpair, name)(6, 8)(X.to("meta"), LABELS.to("meta"))


@pytest.mark.parametrize("learned", [torch.nn.Parameter, lambda t: t])
def test_a_hyper_parameter_on_another_device(learned):
    criterion = flashpair.NTXentLoss(learned(torch.tensor(0.1, device="meta")))
    with pytest.raises(ValueError, match=r"NTXentLoss.temperature must be on the device of embeddings, cpu, got"):
        criterion(X, LABELS)


@pytest.mark.parametrize("name", CRITERIA)
def test_meta_tensors_give_a_meta_loss_or_a_named_error(name):
    criterion = made(name, 8).to("meta")
    x = X.to("meta").requires_grad_()
    try:
        loss = criterion(x, LABELS.to("meta"))
    except RuntimeError as error:
        assert "max_positives must be given for meta tensors" in str(error)
        return
    loss.backward()
    assert loss.device.type == x.grad.device.type == "meta" and x.grad.shape == x.shape


@needs_extension
class TestAddresses:
    def test_of_another_device(self):
        with pytest.raises(RuntimeError, match="a kernel for cpu tensors must not read a tensor on meta"):
            address(X.to("meta"))
        with pytest.raises(RuntimeError, match="a kernel for cuda tensors must not read a tensor on cpu"):
            address(X, "cuda")

    def test_of_other_memory(self):
        for t in (X.t(), X[:, ::2], X[:1].expand(4, 8), torch._neg_view(X)):
            with pytest.raises(RuntimeError, match="a kernel needs a contiguous tensor"):
                address(t)

    def test_of_none(self):
        assert address(None) == 0 and address(X) == X.data_ptr() and address(X[:0]) == X[:0].data_ptr()

    def test_of_a_fake(self):
        from torch._subclasses.fake_tensor import FakeTensorMode

        mode = FakeTensorMode()
        with pytest.raises(RuntimeError, match=r"a kernel needs a tensor with memory, got a FakeTensor"):
            flashpair.MultiSimilarityLoss()(X, mode.from_tensor(LABELS))
        loss = flashpair.MultiSimilarityLoss()(mode.from_tensor(X), mode.from_tensor(LABELS))
        assert loss.shape == () and type(loss).__name__ == "FakeTensor"
        criterion = flashpair.ArcFaceLoss(30, X.shape[1])  # whose labels are looked at where they have values
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            assert criterion(mode.from_tensor(X), mode.from_tensor(LABELS)).shape == ()


class Subclass(torch.Tensor):
    pass


def _inference(t):
    with torch.inference_mode():
        return t.clone()


MEMORIES = {
    "negative bit": lambda t: torch._neg_view(-t),
    "transposed": lambda t: t.t().contiguous().t(),
    "strided": lambda t: torch.stack([t, t.flip(0)], -1)[..., 0],
    "offset": lambda t: torch.cat([t.flip(0), t])[t.shape[0] :],
    "subclass": lambda t: t.as_subclass(Subclass),
    "inference mode": _inference,
}


@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("name", CRITERIA)
def test_other_memory_has_the_same_loss(name, memory):
    torch.manual_seed(0)
    criterion, change, x = made(name, 8, reduction="sum"), MEMORIES[memory], X.double()
    leaf, given = x.clone().requires_grad_(), change(x.clone())
    loss = criterion(leaf, LABELS)
    torch.testing.assert_close(criterion(leaf, change(LABELS)).detach().as_subclass(torch.Tensor), loss.detach())
    torch.testing.assert_close(criterion(given, LABELS).detach().as_subclass(torch.Tensor), loss.detach())
    if memory != "inference mode":
        given = given.detach().requires_grad_()
        torch.testing.assert_close(
            torch.autograd.grad(criterion(given, LABELS), given)[0].as_subclass(torch.Tensor),
            torch.autograd.grad(loss, leaf)[0],
        )
    if criterion.takes_references:
        refs = criterion(leaf, LABELS, ref_emb=x.flip(0), ref_labels=LABELS.flip(0))
        found = criterion(leaf, LABELS, ref_emb=change(x.flip(0)), ref_labels=change(LABELS.flip(0)))
        torch.testing.assert_close(found.as_subclass(torch.Tensor), refs)
        torch.autograd.grad(found, leaf)


@pytest.mark.parametrize("impl", ["reference", pytest.param("tiled", marks=needs_extension)])
@pytest.mark.parametrize("memory", ["negative bit", "strided"])
def test_upstream_gradients_and_vectors_of_other_memory(impl, memory):
    change, generator = MEMORIES[memory], torch.Generator().manual_seed(0)
    up, offset = (torch.randn(24, generator=generator) for _ in range(2))
    for criterion in (flashpair.MultiSimilarityLoss(reduction="none", impl=impl), flashpair.TripletMarginLoss(
        triplets="hard", reduction="none", impl=impl)):  # fmt: skip
        leaf = X.clone().requires_grad_()
        loss = criterion(leaf, LABELS)
        right, found = (
            torch.autograd.grad(loss, leaf, g, retain_graph=True)[0] for g in (up, change(up.clone()).detach())
        )
        torch.testing.assert_close(found, right)

    def rows(o):
        return flashpair.row_reduce(
            X, LABELS, Reduction("sum", "negatives", "softplus", offset=o),
            Reduction("count", "all", lower=o), impl=impl,
        )  # fmt: skip

    for found, right in zip(rows(change(offset.clone())), rows(offset), strict=True):
        torch.testing.assert_close(found, right)


@pytest.mark.parametrize("distance", ["dot", "euclidean"])
def test_neighbours_of_other_memory(distance):
    right = flashpair.nearest(X, 5, ref_emb=X, distance=distance).indices
    for change in MEMORIES.values():
        found = flashpair.nearest(change(X.clone()), 5, ref_emb=change(X.clone()), distance=distance).indices
        assert torch.equal(found.as_subclass(torch.Tensor), right)


UNREADABLE = {
    "sparse": lambda t: t.to_sparse(),
    "csr": lambda t: t[:, None].expand(-1, 3).to_sparse_csr() if t.dim() == 1 else t.to_sparse_csr(),
    "mkldnn": lambda t: t.float().to_mkldnn(),
    "nested": lambda t: torch.nested.nested_tensor([t[0], t[1]]) if t.dim() > 1 else t.to_sparse(),
}


@pytest.mark.parametrize("kind", UNREADABLE)
def test_memory_that_is_no_rows_is_refused(kind):
    with pytest.raises(TypeError, match="embeddings must be a dense tensor, got float32"):
        flashpair.MultiSimilarityLoss()(UNREADABLE[kind](X), LABELS)
    with pytest.raises(TypeError, match="ref_emb must be a dense tensor, got float32"):
        flashpair.nearest(X, 1, ref_emb=UNREADABLE[kind](X))
    if kind != "mkldnn":
        with pytest.raises(TypeError, match="labels must be a dense tensor, got int64"):
            flashpair.MultiSimilarityLoss()(X, UNREADABLE[kind](LABELS))


VECTORS = {
    "offset elsewhere": (
        "offset",
        torch.zeros(24, device="meta"),
        ValueError,
        "must be on the device of embeddings, cpu",
    ),
    "scale elsewhere": ("scale", torch.ones((), device="meta"), ValueError, "must be on the device of embeddings, cpu"),
    "lower elsewhere": (
        "lower",
        torch.zeros(24, device="meta"),
        ValueError,
        "must be on the device of embeddings, cpu",
    ),
    "complex": ("lower", torch.zeros(24) + 1j, TypeError, "must be a real tensor .* got complex64"),
    "bool": ("upper", torch.zeros(24, dtype=torch.bool), TypeError, "must be a real tensor .* got bool"),
    "another length": ("offset", torch.zeros(23), ValueError, r"must have shape \(\) or \(24,\), got float32 \(23,\)"),
    "sparse": ("offset", torch.ones(24).to_sparse(), TypeError, "must be a dense tensor"),
    "NaN scale": ("scale", float("nan"), ValueError, "must be a number or a tensor .* got NaN"),
    "NaN bound": ("lower", float("nan"), ValueError, "must be a number or a tensor .* got NaN"),
    "a word": ("upper", "0", TypeError, "must be a number or a tensor .* got str '0'"),
    "a list": ("offset", [0.0] * 24, TypeError, "must be a number or a tensor .* got list of 24"),
    "bool scale": ("scale", True, TypeError, "must be a number or a tensor .* got bool True"),
    "a bound to a word": ("lower", Bound("min"), TypeError, "must be bound to a Reduction, got str 'min'"),
}


@pytest.mark.parametrize("name", VECTORS)
def test_vectors_of_reductions(name):
    slot, value, error, words = VECTORS[name]
    with pytest.raises(error, match=f"{slot} of reductions\\[1\\] {words}"):
        flashpair.row_reduce(X, LABELS, Reduction("max", "all"), Reduction("sum", "negatives", **{slot: value}))


def test_integer_scales_and_bounds_are_numbers():
    right = flashpair.row_reduce(X, LABELS, Reduction("sum", "all", scale=2.0, lower=torch.zeros(24)))
    for scale in (2, torch.tensor(2)):
        found = flashpair.row_reduce(X, LABELS, Reduction("sum", "all", scale=scale, lower=torch.zeros(24).int()))
        torch.testing.assert_close(found[0], right[0])


def test_copies_of_criteria():
    for criterion in (flashpair.MultiSimilarityLoss(), flashpair.ProxyAnchorLoss(6, 8)):
        for twin in (copy.deepcopy(criterion), pickle.loads(pickle.dumps(criterion))):
            assert torch.equal(twin(X, LABELS), criterion(X, LABELS))
    weight = torch.randn(6, 8)
    criterion = flashpair.NormalizedSoftmaxLoss(6, 8)
    found = torch.func.functional_call(criterion, {"weight": weight}, (X, LABELS))
    criterion.weight.data.copy_(weight)
    assert torch.equal(found, criterion(X, LABELS))


def test_functorch_is_refused_by_name():
    with pytest.raises(RuntimeError, match=r"autograd.Function with functorch transforms"):
        torch.func.grad(lambda x: flashpair.MultiSimilarityLoss()(x, LABELS))(X)


def test_a_worker_forked_after_threads_ran():
    """A DataLoader's workers, for which torch sets one thread, compute in a process whose parent has used them."""
    code = (
        "import torch, flashpair as f; torch.set_num_threads(2)\n"
        "x, l = torch.randn(3000, 64), torch.arange(3000) // 4; c = f.MultiSimilarityLoss(); want = c(x, l)\n"
        "class Losses(torch.utils.data.Dataset):\n"
        "    __len__ = lambda self: 2\n"
        "    __getitem__ = lambda self, i: c(x, l)\n"
        "for got in torch.utils.data.DataLoader(Losses(), num_workers=1, multiprocessing_context='fork', timeout=60):\n"
        "    assert torch.equal(got[0], want)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stderr[-600:]


def test_what_is_no_tensor_is_named_in_one_line():
    import numpy as np

    class Series:  # what of a pandas Series is looked at, which is no requirement of the tests
        dtype, shape = np.dtype("int64"), (24,)

        def to_numpy(self):
            return LABELS.numpy()

        def __repr__(self):
            return "0    0\n1    0\n"

    criterion, array = flashpair.MultiSimilarityLoss(), X.numpy()
    cases = {
        "got test_devices Series of dtype int64 and shape (24,); torch.tensor(values.to_numpy())": (X, Series()),
        "got list of 24, the first of them str 'cat'; turn text into numbers first: numpy.unique(": (X, ["cat"] * 24),
        "got numpy ndarray of dtype <U3 and shape (24,); turn text into numbers": (X, np.array(["cat"] * 24)),
        "got list of 24, the first of them int": (X, LABELS.tolist()),
        "got numpy ndarray of dtype >f4 and shape (24, 8); torch.from_numpy needs this machine's byte order": (
            array.astype(">f4"), LABELS),
        "got list of 24, the first of them numpy ndarray of dtype float32": (list(array), LABELS),
        "got list of 2, the first of them float32 (24, 8) on cpu; pass one tensor of a loader's batch": (
            [X, LABELS], LABELS),
        "got NoneType None": (None, LABELS),
        "got uint64 (24,) on cpu": (X, LABELS.to(torch.uint64)),
    }  # fmt: skip
    for words, given in cases.items():
        with pytest.raises(TypeError, match=re.escape(words)) as error:
            criterion(*given)
        assert "\n" not in str(error.value) and len(str(error.value)) < 260
    assert torch.equal(criterion(X, LABELS.to(torch.uint16)), criterion(X, LABELS))


def test_types_of_devices_that_autocast_does_not_know():
    """torch.autocast("meta") raises: memories, streams and backward passes of meta tensors do not ask for it."""
    from flashpair.core.similarity import autocasts, no_autocast

    with no_autocast("meta"), no_autocast("cpu"):
        assert not autocasts("meta") and not autocasts("cpu")
    with torch.autocast("cpu", torch.bfloat16):
        assert autocasts("cpu")
        with no_autocast("cpu"):
            assert not autocasts("cpu")
    x, labels = X.to("meta").requires_grad_(), LABELS.to("meta")
    criterion = flashpair.SoftTripleLoss(6, 8, 2).to("meta")
    (gradient,) = torch.autograd.grad(criterion(x, labels), x, create_graph=True)
    assert gradient.device.type == "meta" and gradient.shape == x.shape
    for call in (
        lambda: flashpair.CrossBatchMemory(flashpair.NTXentLoss(), 8, 32)(x, labels),
        lambda: flashpair.NTXentLoss()(x, labels, ref_emb=flashpair.StreamedReferences(X, LABELS)),
    ):
        with pytest.raises((RuntimeError, ValueError), match="only 'tiled' and 'fused' take references in chunks"):
            call()


def test_the_batches_of_check_are_made_on_the_cpu():
    """Under another default device, whose generator they would not go with."""
    from flashpair.tools import check

    wanted = check.batch(12, 5, 3, torch.float64)
    with torch.device("meta"):
        found = check.batch(12, 5, 3, torch.float64)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("make", [flashpair.NTXentLoss, lambda: flashpair.ArcFaceLoss(6, 8)], ids=["pairs", "classes"])
def test_a_compiled_loss_under_autocast_goes_back_without_it(make):
    criterion = make()
    x = X.clone().requires_grad_()
    compiled = torch.compile(criterion, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16):
        losses = compiled(x, LABELS), criterion(x, LABELS)
    gradients = [torch.autograd.grad(loss, x)[0] for loss in losses]
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(*gradients)
