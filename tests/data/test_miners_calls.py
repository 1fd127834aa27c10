"""What every miner does with a call: blocks, dtypes, batches with nothing to mine, refusals, memory, one's own."""

from __future__ import annotations

import math

import peaks
import pytest
import torch
from helpers import batch
from miner_cases import EVERY, TRIPLET_KINDS, listed, with_references

import flashpair
from flashpair import miners
from flashpair.miners import base


@pytest.mark.parametrize("name", EVERY)
def test_block_by_block(monkeypatch, name):
    """One row, three rows and all rows at a time; a positive pair at a time, too."""
    x, labels = batch(53, 6, 5, torch.float64)
    whole = EVERY[name]()(x, labels)
    assert len(whole[0]) > 5 and len(list(EVERY[name]().blocks(x, labels))) == 1
    for rows in (1, 3, 52, 53):
        monkeypatch.setattr(base, "BLOCK_BYTES", rows * 53 * 8 + 7)
        blocks = list(EVERY[name]().blocks(x, labels))
        assert len(blocks) >= math.ceil(53 / rows)
        assert all(map(torch.equal, map(torch.cat, zip(*blocks, strict=True)), whole))
        assert all(map(torch.equal, EVERY[name]()(x, labels), whole))
        if name in TRIPLET_KINDS:
            assert all(len(set(map(tuple, listed(b.a, b.p)))) <= rows for b in blocks), "positive pairs of a chunk"


@pytest.mark.parametrize("references", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", EVERY)
def test_sixteen_bits_are_computed_in_float32(name, dtype, references):
    args = [t.to(dtype) if t.is_floating_point() else t for t in with_references(references)]
    wide = [t.float() if t.is_floating_point() else t for t in args]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = EVERY[name]()(*args)
    assert len(found[0]) > 3
    assert all(map(torch.equal, found, EVERY[name]()(*wide)))


@pytest.mark.parametrize("name", EVERY)
def test_a_batch_that_has_nothing_to_mine(name):
    x, labels = batch(12, 4, 3, torch.float32)
    none = torch.arange(12)
    cases = {
        "one class": (x, torch.zeros_like(labels)),
        "no positives": (x, none),
        "empty": (x[:0], labels[:0]),
        "one row": (x[:1], labels[:1]),
        "no references": (x, labels, x[:0], labels[:0]),
        "references of one class": (x, none * 0, x, none * 0),
        "references of other classes": (x, labels, x, labels + 100),
    }
    for case, args in cases.items():
        found = EVERY[name]()(*args)
        assert [(t.dtype, tuple(t.shape)) for t in found] == [(torch.int64, (0,))] * len(found), case


@pytest.mark.parametrize("name", EVERY)
def test_forms_of_the_same_call(name):
    """References, small integer labels, strided rows, and embeddings that want a gradient and get none."""
    x, labels, y, ref_labels = with_references(True)
    truth = EVERY[name]()(x, labels, y, ref_labels)
    kept = flashpair.References(y, ref_labels)
    strided = torch.stack([x, x], 2)[:, :, 0].requires_grad_()
    before = y.clone(), strided.detach().clone()
    for args in ((x, labels, kept), (strided, labels.to(torch.uint8), y, ref_labels.to(torch.int16))):
        found = EVERY[name]()(*args)
        assert all(map(torch.equal, found, truth)) and not any(t.requires_grad for t in found)
    assert torch.equal(y, before[0]) and torch.equal(strided, before[1])


def test_what_cannot_be():
    x, labels = batch(10, 4, 2, torch.float32)
    for make in EVERY.values():
        for bad, name in ((torch.nan, "embeddings"), (torch.inf, "embeddings"), (torch.nan, "ref_emb")):
            broken = x.clone()
            broken[3, 1] = bad
            args = (broken, labels) if name == "embeddings" else (x, labels, broken, labels)
            with pytest.raises(ValueError, match=f"{name} must be finite, got NaN"):
                make().blocks(*args)
        with pytest.raises(TypeError, match="labels must be an integer tensor of shape"):
            make().blocks(x, labels.float())
        with pytest.raises(ValueError, match="ref_labels must be given with ref_emb"):
            make()(x, labels, x)
    with pytest.raises(ValueError, match="epsilon must be a finite number of at least 0, got -1"):
        miners.MultiSimilarityMiner(-1)
    with pytest.raises(ValueError, match="distance must be one of euclidean, cosine, got 'dot'"):
        miners.BatchHardMiner("dot")
    with pytest.raises(ValueError, match="triplets must be one of semihard, semihard_all, hard_all, violating"):
        miners.TripletMarginMiner(triplets="hard")
    with pytest.raises(TypeError, match="margin must be a number, got float32"):
        miners.TripletMarginMiner(torch.tensor(0.1))
    with pytest.raises(ValueError, match="cutoff must be a finite number above 0, got 0"):
        miners.DistanceWeightedMiner(0)
    with pytest.raises(ValueError, match=r"nonzero_loss_cutoff must be a finite number above 0.5, got 0.5"):
        miners.DistanceWeightedMiner(0.5, 0.5)
    with pytest.raises(TypeError, match=r"generator must be a torch.Generator or None, got int"):
        miners.DistanceWeightedMiner(generator=3)
    with pytest.raises(TypeError, match="normalize must be a bool"):
        miners.BatchHardMiner(normalize=1)


def test_says_what_it_is():
    text = "TripletMarginMiner(margin=0.1, distance='cosine', triplets='semihard', normalize=False)"
    assert repr(eval("flashpair.miners." + text)) == text


SCRIPT = """
from flashpair.miners import base
miner, n, d, per_class = eval("flashpair.miners." + sys.argv[1]), *map(int, sys.argv[2:5])
base.BLOCK_BYTES = int(sys.argv[5])
torch.set_num_threads(1)
labels = torch.arange(n) // per_class
generator = torch.Generator().manual_seed(0)
x = torch.randn(n, d, generator=generator)[labels] + 0.5 * torch.randn(n, d, generator=generator)
miner(x[:100], labels[:100])
def mine():
    global mined
    found = miner.blocks(x, labels) if sys.argv[6:] else [miner(x, labels)]
    mined = sum(len(indices) for block in found for indices in block)
print(peak_of(mine).extra, mined)
"""


@peaks.only_linux
@pytest.mark.parametrize(
    ("miner", "n", "per_class", "iterated"),
    [
        ("MultiSimilarityMiner()", 6000, 4, False),
        ("BatchHardMiner()", 6000, 4, False),
        ("TripletMarginMiner(triplets='semihard')", 6000, 4, False),
        ("TripletMarginMiner(triplets='hard_all')", 6000, 4, False),
        ("DistanceWeightedMiner()", 6000, 4, False),
        ("TripletMarginMiner(2.0)", 400, 200, True),
    ],
)
def test_peak_by_formula(miner, n, per_class, iterated):
    """Five copies of the embeddings, what is returned twice over, and sixteen blocks."""
    d, block = 32, 2**20
    peak, mined = peaks.printed(SCRIPT, miner, n, d, per_class, block, *["blocks"] * iterated)
    bound = 5 * 4 * n * d + 16 * block + (0 if iterated else 2 * 8 * mined)
    dense = 8 * mined if iterated else 4 * n * n
    assert bound < dense / 2, "the sizes must tell the formula from what is not to exist"
    assert peak <= bound, f"{peak:,} bytes over {bound:,}"


def own_miner(mine, **attributes):
    return type("Own", (miners.Miner,), {"mined": miners.MinedPairs, "mine": mine, **attributes})


NONE = torch.empty(0, dtype=torch.int64)


@pytest.mark.parametrize(
    "mine, error, words",
    [
        (lambda s, block: None, TypeError, "mine of Own must be a generator of MinedPairs, got NoneType"),
        (
            lambda s, block: miners.MinedPairs(NONE, NONE, NONE, NONE),
            TypeError,
            "must be a generator of MinedPairs, got MinedPairs of 4",
        ),
        (lambda s, block: [(NONE, NONE, NONE)], TypeError, "mine of Own must yield MinedPairs, got tuple of 3"),
        (lambda s, block: [3], TypeError, "mine of Own must yield MinedPairs, got int 3"),
        (
            lambda s, block: [miners.MinedPairs(NONE, NONE, NONE.float(), NONE)],
            TypeError,
            "a2 of the MinedPairs of Own must be an int64 tensor of one dimension, got float32",
        ),
        (
            lambda s, block: [miners.MinedPairs(NONE, torch.arange(2), NONE, NONE)],
            ValueError,
            "MinedPairs of Own must have one length for each kind of pair, got .*'p': 2",
        ),
    ],
)
def test_what_ones_own_miner_yields_is_looked_at(mine, error, words):
    x, labels = torch.randn(6, 3), torch.arange(6) // 2
    with pytest.raises(error, match=words):
        own_miner(mine)(normalize=True)(x, labels)


def test_ones_own_miner_says_what_it_mines_and_makes_its_parent():
    with pytest.raises(TypeError, match=r"Own\.mined must be MinedPairs or Triplets"):
        own_miner(lambda s, block: [], mined=None)
    with pytest.raises(TypeError, match=r"__init__ of Own must call super\(\)\.__init__\(normalize=\.\.\.\)"):
        own_miner(lambda s, block: [], __init__=lambda self: None)()
