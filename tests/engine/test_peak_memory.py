"""The headline: never an N x M tensor. A fresh process's peak is within a formula linear in (N + M) D."""

from __future__ import annotations

import peaks
import pytest
from conftest import needs_extension

from flashpair.core import positives

pytestmark = [needs_extension, peaks.only_linux]

SCRIPT = """
n, m, d, criterion = int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), eval("flashpair." + sys.argv[4])
torch.set_num_threads(2)
def step(n, m):
    labels = torch.arange(n) // 4
    x = torch.randn(n, d)
    more = {"ref_emb": torch.randn(m, d), "ref_labels": torch.arange(m) // 4} if m else {}
    x.requires_grad_()
    yield
    loss = criterion(x, labels, **more)
    yield
    loss.backward()
    yield
list(step(600, 700 if m else 0))          # code, threads and tile buffers are there before anything is counted
steps = step(n, m)
next(steps)
for phase in ("forward", "backward"):
    print(peak_of(lambda: next(steps)).extra)
"""

LOSSES = [
    "MultiSimilarityLoss(impl='tiled')",
    "MultiSimilarityLoss(impl='screened')",
    "LiftedStructureLoss(impl='tiled')",
    "NPairsLoss('all_pairs', impl='tiled')",
    "TripletMarginLoss(impl='tiled')",
    "TripletMarginLoss(impl='screened')",
    "AngularLoss(impl='tiled')",
    "CircleLoss(impl='tiled')",
]


def bound(n: int, m: int, d: int) -> int:
    """Bytes of float32: a dozen copies of the embeddings (normalised, sorted, their gradients), 64 numbers a row for
    row values and live pairs (32 of 8 bytes), and two threads' two tiles of 512 x 512 twice over."""
    return 12 * 4 * (n + m) * d + 64 * 8 * (n + m) + 8 * 4 * 512**2


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(("n", "m", "d"), [(12000, 0, 64), (2048, 48000, 32)], ids=["square", "references"])
def test_peak_by_formula(loss, n, m, d):
    if m and loss.startswith(("Lifted", "Angular")):
        pytest.skip("defined within a batch")
    found = peaks.printed(SCRIPT, n, m, d, loss)
    pairs = 4 * n * (m or n)
    assert bound(n, m, d) < pairs / 3, "the sizes must tell the formula from a dense matrix"
    for phase, peak in zip(("forward", "backward"), found, strict=True):
        assert peak <= bound(n, m, d), f"{phase}: {peak:,} bytes over {bound(n, m, d):,}"


FEW_CLASSES = """
n, criterion = int(sys.argv[1]), eval("flashpair." + sys.argv[2])
torch.set_num_threads(2)
def step(n):
    x = torch.randn(n, 32, requires_grad=True)
    criterion(x, torch.arange(n) % 2).backward()
step(300)
assert "torch._dynamo" not in sys.modules  # 150 MB
print(peak_of(lambda: step(n)).extra)
"""


@pytest.mark.parametrize("loss", ["TripletMarginLoss()", "AngularLoss(form='hinge')"])
def test_positives_by_the_thousand(loss):
    """Of two classes each row has N / 2 positives, and a triplet loss some twenty numbers for each: a block of them
    is there at a time."""
    n, d, numbers = 1600, 32, 24
    room = bound(n, 0, d) + numbers * 4 * 2 * positives.PLACES * n
    assert room < numbers * 4 * n * (n / 2) / 2
    (peak,) = peaks.printed(FEW_CLASSES, n, loss)
    assert peak <= room, f"{peak:,} bytes over {room:,}"


CLASSES = """
from flashpair.chunked import class_weights
from flashpair.losses import soft_triple
class_weights.CHUNK_BYTES, c, d, b = (int(a) for a in sys.argv[1:5])
torch.set_num_threads(2)
make = eval("lambda c: flashpair." + sys.argv[5])
def step(criterion, labels):
    x = torch.randn(b, d, requires_grad=True)
    criterion(x, labels).backward()
step(make(3000), torch.arange(b) % 3000)
criterion, labels = make(c), torch.arange(b) * 7 % c
print(peak_of(lambda: step(criterion, labels)).extra)
"""


@pytest.mark.parametrize("loss", ["ArcFaceLoss(c, d)", "ProxyAnchorLoss(c, d)", "SoftTripleLoss(c, d, 1)"])
def test_many_classes_cost_their_gradient(loss):
    """Beside the weights: their gradient, sixteen chunks of weights and similarities, and a batch."""
    chunk, c, d, b = 2**21, 300_000, 64, 64
    gradient, (peak,) = 4 * c * d, peaks.printed(CLASSES, chunk, c, d, b, loss)
    limit = gradient + 16 * chunk + bound(b, 0, d)
    assert limit < 2 * gradient and peak <= limit, f"{peak:,} bytes over {limit:,}"
