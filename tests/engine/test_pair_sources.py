"""What a loss may ask of each source of pairs: the same answers from all, or an error that says why there is none."""

from __future__ import annotations

import pytest
import torch
from conftest import needs_extension
from helpers import assert_same, batch

import flashpair
from flashpair import Bound, Reduction
from flashpair.chunked import class_weights
from flashpair.core.class_pairs import ClassPairs

D = 8


class Asks(flashpair.Criterion):
    """A loss that asks its pairs one question, and adds up what comes back."""

    def __init__(self, question, **common):
        super().__init__(**{"normalize": True, "reduction": "mean", "impl": "auto", **common})
        self.question = question

    def row_losses(self, pairs):
        rows = self.question(pairs)
        return flashpair.RowLosses(rows, torch.ones_like(rows, dtype=torch.bool), rows.shape[0])


def against_memory(criterion):
    memory = flashpair.CrossBatchMemory(criterion, D, 64)
    for seed in range(3):
        loss = memory(*batch(24, D, 4, torch.float32, seed))
    return loss


def against_stream(criterion):
    x, labels = batch(12, D, 3, torch.float32)
    y, y_labels = batch(20, D, 3, torch.float32, seed=1)
    return criterion(x, labels, ref_emb=flashpair.StreamedReferences(y, y_labels, block=7))


@pytest.mark.parametrize("references", [False, True])
@pytest.mark.parametrize("impl", ["reference", pytest.param("tiled", marks=needs_extension)])
def test_arrange_is_the_inverse_of_restore(impl, references):
    x, labels = batch(12, D, 3, torch.float64)
    given = dict(zip(("ref_emb", "ref_labels"), batch(9, D, 3, torch.float64, 1), strict=True)) if references else {}
    pairs = flashpair.make_pairs(x, labels, impl=impl, **given)
    assert torch.equal(pairs.arrange(labels), pairs.labels)
    assert torch.equal(pairs.restore(pairs.arrange(torch.arange(12))), torch.arange(12))
    assert torch.equal(pairs.arrange_refs(given.get("ref_labels", labels)), pairs.ref_labels)


@needs_extension
@pytest.mark.parametrize("way", [against_memory, against_stream])
def test_what_needs_all_references_at_once_is_refused_in_chunks(way):
    def lifted(pairs):
        vector = torch.zeros(pairs.count)
        (row,) = pairs.reduce(Reduction("sum", "negatives", "lifted", offset=vector, ref_offset=vector))
        return row

    with pytest.raises(RuntimeError, match=r"ref_offset of reductions\[0\] is not available for references in chunks"):
        way(Asks(lifted))
    with pytest.raises(RuntimeError, match=r"pairs\.arrange_refs is not available for references in chunks"):
        way(Asks(lambda pairs: pairs.arrange_refs(torch.zeros(pairs.count))))


@pytest.mark.parametrize("impl", ["reference", pytest.param("tiled", marks=needs_extension)])
def test_sums_of_two_rows_are_of_a_batch_with_itself(impl):
    x, labels = batch(12, D, 3, torch.float64)
    y, y_labels = batch(9, D, 3, torch.float64, 1)
    pairs = flashpair.make_pairs(x, labels, ref_emb=y, ref_labels=y_labels, impl=impl)
    with pytest.raises(RuntimeError, match=r"pairs\.pair_sums is of a batch with itself"):
        pairs.pair_sums(1)


@pytest.mark.parametrize("impl", ["reference", pytest.param("tiled", marks=needs_extension)])
def test_old_names_give_what_the_new_ones_give(impl):
    x, labels = batch(12, D, 3, torch.float64)
    pairs = flashpair.make_pairs(x, labels, impl=impl)
    values = torch.arange(12.0)
    for old, new in (("total", "batch_sum"), ("total_logsumexp", "batch_logsumexp")):
        with pytest.warns(DeprecationWarning, match=rf"pairs\.{old} is now pairs\.{new}"):
            assert torch.equal(getattr(pairs, old)(values=values), getattr(pairs, new)(values))
    with pytest.warns(DeprecationWarning, match=r"pairs\.squares is now pairs\.squared_norms"):
        assert torch.equal(pairs.squares(), pairs.squared_norms())
    chosen = pairs.class_pairs()
    with pytest.warns(DeprecationWarning):
        old = pairs.select(*pairs.draw()), pairs.select(*chosen[:4])
    (truth,) = pairs.take_pairs(chosen).reduce(Reduction("logsumexp", "negatives"))
    for few in old:
        (row,) = few.reduce(Reduction("logsumexp", "negatives"))
        assert torch.equal(row, truth)


@pytest.mark.parametrize("impl", ["reference", pytest.param("tiled", marks=needs_extension)])
@pytest.mark.parametrize(
    ("values", "error", "words"),
    [
        ({"scale": True}, TypeError, r"scale of reductions\[1\] must be a number or a tensor, got bool True"),
        ({"scale": float("nan")}, ValueError, r"scale of reductions\[1\] must be a number or a tensor, got NaN"),
        ({"lower": torch.zeros(())}, TypeError, r"the shift of lower of reductions\[1\] must be a number, got float"),
        ({"lower": None}, TypeError, r"the shift of lower of reductions\[1\] must be a number, got NoneType None"),
    ],
)
def test_numbers_of_a_reduction_are_checked(impl, values, error, words):
    x, labels = batch(12, D, 3, torch.float64)
    lowest = Reduction("min", "positives", detach=True)
    values = {k: Bound(lowest, v) if k == "lower" else v for k, v in values.items()}
    with pytest.raises(error, match=words):
        flashpair.make_pairs(x, labels, impl=impl).reduce(lowest, Reduction("logsumexp", "negatives", **values))


@pytest.mark.parametrize("size", [(), (9,)])
def test_the_reference_takes_one_reference_offset_for_all(size):
    x, labels = batch(12, D, 3, torch.float64)
    y, y_labels = batch(9, D, 3, torch.float64, 1)
    pairs = flashpair.make_pairs(x, labels, ref_emb=y, ref_labels=y_labels, impl="reference")
    offset = torch.zeros(12, dtype=torch.float64)
    one, every = (
        pairs.reduce(Reduction("sum", "negatives", "lifted", offset=offset, ref_offset=value))[0]
        for value in (torch.full(size, 0.5, dtype=torch.float64), torch.full((9,), 0.5, dtype=torch.float64))
    )
    assert torch.equal(one, every)


class TestClassWeightsInChunks:
    """Three classes a chunk, of seven."""

    @pytest.fixture(autouse=True)
    def chunks(self, monkeypatch):
        monkeypatch.setattr(class_weights, "CHUNK_BYTES", 3 * D * 8)

    def pairs(self, proxies, impl="auto"):
        x, labels = batch(12, D, 3, torch.float64)
        weight = torch.randn(7, D, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
        make = class_weights.proxy_pairs if proxies else class_weights.class_pairs
        return make(*((weight, x) if proxies else (x,)), labels, *(() if proxies else (weight,)), True, impl)

    @needs_extension
    @pytest.mark.parametrize("proxies", [False, True])
    def test_answers_are_those_of_all_weights_at_once(self, proxies):
        pairs, truth = self.pairs(proxies), self.pairs(proxies, "reference")
        assert isinstance(pairs, class_weights.ChunkedClassPairs)
        order = pairs.restore
        assert_same(order(pairs.squared_norms()), truth.squared_norms())
        for count in ("num_positives", "num_negatives"):
            assert torch.equal(order(getattr(pairs, count)()), getattr(truth, count)())
        for r in (Reduction("sum", "all"), Reduction("max", "negatives"), Reduction("count", "all", lower=0.1)):
            assert_same(order(pairs.reduce(r)[0]), truth.reduce(r)[0])

    @needs_extension
    def test_a_transform_that_no_backend_computes_goes_to_the_reference(self):
        flashpair.register_transform("atan_of_a_test", torch.atan)
        r = Reduction("sum", "negatives", "atan_of_a_test")
        pairs, truth = self.pairs(False), self.pairs(False, "reference")
        assert_same(pairs.restore(pairs.reduce(r)[0]), truth.reduce(r)[0])

    @needs_extension
    def test_a_named_backend_refuses_what_it_refuses_elsewhere(self):
        x, labels = batch(12, D, 3, torch.float64)
        with pytest.raises(RuntimeError, match="impl='screened' cannot run: screened needs a mining window"):
            flashpair.ArcFaceLoss(7, D, impl="screened")(x, labels)

    @needs_extension
    def test_proxies_as_anchors_compile_as_one_graph(self):
        x, labels = batch(12, D, 3, torch.float64)
        criterion = flashpair.ProxyAnchorLoss(7, D).double()
        compiled = torch.compile(criterion, fullgraph=True, backend="aot_eager")
        assert_same(compiled(x, labels), criterion(x, labels))


@needs_extension
def test_references_that_are_kept_compile_as_one_graph():
    x, labels = batch(12, D, 3, torch.float32)
    bank = flashpair.References(*batch(30, D, 3, torch.float32, 1))
    criterion = flashpair.NTXentLoss()
    compiled = torch.compile(criterion, fullgraph=True, backend="aot_eager")
    assert_same(compiled(x, labels, ref_emb=bank), criterion(x, labels, ref_emb=bank))


def test_a_choice_of_ones_own_is_taken():
    x, labels = batch(12, D, 3, torch.float64)
    pairs = flashpair.make_pairs(x, labels, impl="reference")
    k = torch.arange(3)
    few = pairs.take_pairs(ClassPairs(k, k + 5, k, torch.tensor(2)))
    assert_same(few.matched_similarities()[:2], torch.stack([x[0] @ x[5], x[1] @ x[6]]))
    assert few.num_positives().tolist() == [1, 1, 0]
