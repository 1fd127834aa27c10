"""The CUDA kernel's own source, run on the CPU (tests/support/cuda_on_host), against the dense float64 reference.

Blocks of 64 threads, so that one pass of a product is 256 columns. A row count is a number of multiprocessors here: the
kernel for 1, 2, 4, 8 or 16 rows a block is the first that needs no more blocks than there are.
"""

from __future__ import annotations

import pytest
import torch
from helpers import FORMULAS, assert_as_good_as, assert_parity, batch, loss_and_gradients

from flashpair import LiftedStructureLoss, MultiSimilarityLoss, NPairsLoss, Reduction, row_reduce
from flashpair.backends import extension
from flashpair.backends.cuda import onchip

pytestmark = pytest.mark.skipif(not extension.emulated(), reason="no compiler to build the emulated kernel with")


# Every count of rows at its edges; quads of rows and columns; passes of 256 columns in either product (N, or D);
# inner axes with and without a share for every group of threads.
EDGES = [(n, 5, 4) for n in (0, 1, 2, 3, 4, 5)] + [(n, 9, 32) for n in (31, 32, 33, 63, 64, 65)]
EDGES += [(7, d, 7) for d in (1, 3, 4, 255, 256, 257)] + [(17, 131, 2), (32, 64, 2), (48, 33, 3)]
EDGES += [(255, 3, 16), (256, 3, 16), (260, 5, 17)]


@pytest.mark.parametrize(("n", "d", "processors"), EDGES)
def test_edges_of_blocks_and_passes(n, d, processors, chip):
    chip(processors)
    x, labels = batch(n, d, 4, torch.float64, seed=n)
    assert_parity(MultiSimilarityLoss, "onchip", x, labels)


@pytest.mark.parametrize(
    ("n", "m", "processors"), [(0, 5, 8), (5, 0, 8), (1, 1, 2), (3, 40, 12), (40, 3, 12), (9, 300, 20)]
)
def test_edges_of_rectangles(n, m, processors, chip):
    chip(processors)
    x, labels = batch(n, 6, 4, torch.float64)
    y, ref_labels = batch(m, 6, 4, torch.float64, seed=1)
    for name in ("MultiSimilarityLoss", "NPairsLoss", "GeneralizedLiftedStructureLoss(distance='euclidean')"):
        assert_parity(FORMULAS[name], "onchip", x, labels, y, ref_labels)


@pytest.mark.parametrize("rows", onchip.BLOCK_ROWS)
def test_every_kernel(rows, chip):
    chip(-(-40 // rows))
    assert onchip.block_rows(40, 40, 12, 8, False, onchip.limits(0)) == rows
    x, labels = batch(40, 12, 4, torch.float64)
    assert_parity(MultiSimilarityLoss, "onchip", x, labels)
    x = x.float()
    found = loss_and_gradients(MultiSimilarityLoss, "onchip", x, labels)
    truth = loss_and_gradients(MultiSimilarityLoss, "reference", x.double(), labels)
    eager = loss_and_gradients(MultiSimilarityLoss, "reference", x, labels)
    for f, e, t in zip(found, eager, truth, strict=True):
        assert_as_good_as(f, e, t)


@pytest.mark.parametrize("m", [6, 60, 300])
@pytest.mark.parametrize("d", [37, 100, 257])
def test_both_ends_see_the_same_bits(d, m, chip):
    """References that are an anchor's one positive again, under other labels, stand exactly at its window's edge.

    They have no weight; a last bit that differs between the anchor's and the reference's side would give them one.
    """
    chip(40)
    generator = torch.Generator().manual_seed(d + m)
    for _ in range(3):
        x, y = torch.randn(1, d, generator=generator), torch.randn(m, d, generator=generator)
        y[-1] += x[0]  # a harder negative than the positive, so that something is mined
        y[: m // 2] = y[0]
        labels, ref_labels = torch.tensor([0]), torch.arange(m)
        loss, _, dy = loss_and_gradients(MultiSimilarityLoss, "onchip", x, labels, y, ref_labels, epsilon=0.0)
        assert loss > 0 and dy[0].any() and dy[-1].any()
        assert not dy[1 : m // 2].any()


def test_refusals_say_why(chip):
    x, labels = batch(12, 5, 3, torch.float32)

    def refused(criterion, why, *arguments, **more):
        with pytest.raises(RuntimeError, match=why):
            criterion(*(arguments or (x, labels)), **more)

    chip(2)
    many, ids = batch(33, 5, 3, torch.float32)
    refused(MultiSimilarityLoss(impl="onchip"), r"N = 33 is over 32: 2 multiprocessors with 16 rows each", many, ids)
    y = many.requires_grad_()
    refused(MultiSimilarityLoss(impl="onchip"), r"N \+ M = 45 is over 32", x, labels, ref_emb=y, ref_labels=ids)
    chip(12, shared=200)
    refused(
        MultiSimilarityLoss(impl="onchip"),
        r"1 rows of 12 similarities and of D = 8 take 252 bytes",
        x[:11],
        labels[:11],
    )
    chip(12, cooperative=0)
    refused(MultiSimilarityLoss(impl="onchip"), "no cooperative launches")
    chip(12)
    learned = torch.nn.Parameter(torch.tensor(2.0))
    refused(MultiSimilarityLoss(alpha=learned, impl="onchip"), "numbers as hyper-parameters, not tensors")
    refused(
        NPairsLoss(l2_weight=0.1, reduction="none", impl="onchip"), "only to a scalar loss, and reduction is 'none'"
    )
    refused(LiftedStructureLoss(impl="onchip"), "this criterion does not declare such a row formula")
    with pytest.raises(RuntimeError, match="whole criteria, not row reductions"):
        row_reduce(x, labels, Reduction("max", "negatives"), impl="onchip")


@pytest.mark.parametrize("rows", onchip.BLOCK_ROWS)
def test_python_and_cpp_agree_on_a_blocks_memory(rows, chip):
    chip(-(-50 // rows))
    for number, itemsize in ((0, 8), (1, 4)):
        launch = extension.onchip().Launch(
            0, (50, 50, 37, number, True), (rows, 0, 0, 1, 0, 0, 0), (-2.0, 50.0, 0.0, 0.0, 0.0), False
        )
        exact = onchip.Limits(-(-50 // rows), launch.shared, True)
        assert onchip.block_rows(50, 50, 37, itemsize, False, exact) == rows
        assert isinstance(onchip.block_rows(50, 50, 37, itemsize, False, exact._replace(shared=launch.shared - 1)), str)
        assert launch.blocks == exact.processors


def test_a_smaller_batch_leaves_room_for_a_larger_one(chip):
    """A kernel's shared memory is set once for all: 16 rows of 656 similarities take 53 KB, of 260 they take 21."""
    x, labels = batch(656, 3, 4, torch.float32)
    chip(41)
    large = MultiSimilarityLoss(impl="onchip")(x, labels)
    chip(17)
    MultiSimilarityLoss(impl="onchip")(x[:260], labels[:260])
    chip(41)
    assert torch.equal(MultiSimilarityLoss(impl="onchip")(x, labels), large)


def test_largest_batch():
    h200 = onchip.Limits(132, 227 * 1024, True)
    assert onchip.largest_batch(128, h200) == 2112  # sixteen rows on each of 132 multiprocessors
    assert onchip.largest_batch(1024, h200) == 2076
    assert onchip.largest_batch(128, onchip.Limits(132, 99 * 1024, True)) == 1156
