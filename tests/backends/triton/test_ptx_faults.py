"""tests/ptx finds what it is there to find: each fault in the smallest kernel that has it, and not in its cure."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from ptx.faults import Fault, Unsupported
from ptx.small import kernel, memory, run

from flashpair.core.similarity import l2_normalize

# Each thread leaves its word in shared memory, and takes its neighbour's of the other warp.
EXCHANGE = """
ld.global.b32 %r2, [%d0];
st.shared.b32 [%r1], %r2;
{barrier}
xor.b32 %r3, %r1, 128;
ld.shared.b32 %r4, [%r3];
st.global.b32 [%d1], %r4;
"""
COPY = """
cp.async.ca.shared.global [%r1], [%d0], 4;
cp.async.commit_group;
{wait}
bar.sync 0;
xor.b32 %r3, %r1, 128;
ld.shared.b32 %r4, [%r3];
st.global.b32 [%d1], %r4;
"""
BRANCH = """
setp.lt.u32 %p1, %r0, {edge};
@%p1 bra $SIDE;
mov.b32 %r2, 1;
bra $MEET;
$SIDE:
mov.b32 %r2, 2;
{inside}
$MEET:
{outside}
st.global.b32 [%d1], %r2;
"""


def words(count=64):
    return np.arange(count, dtype=np.uint32) + 7, np.zeros(count, np.uint32)


def faults(body, kind, **more):
    with pytest.raises(Fault) as found:
        run(body, *words(), **more)
    assert found.value.kind == kind, found.value
    assert "kernel at" in str(found.value)
    return str(found.value)


def test_a_barrier_orders_two_warps():
    first, second = words()
    run(EXCHANGE.format(barrier="bar.sync 0;"), first, second)
    assert (second == np.roll(first, 32)).all()
    faults(EXCHANGE.format(barrier=""), "race")


def test_within_a_warp_lockstep_is_order_enough():
    first, second = words()
    run(EXCHANGE.format(barrier="").replace("128", "64"), first, second)
    assert (second == first.reshape(2, 2, 16)[:, ::-1].ravel()).all()


def test_lanes_that_store_at_one_address_store_the_same():
    first, second = words()
    body = "and.b32 %r3, %r1, -8;\nshr.u32 %r4, %r0, {by};\n{store}"
    into_shared = "st.shared.b32 [%r3], %r4;\nld.shared.b32 %r5, [%r3];\nst.global.b32 [%d1], %r5;"
    run(body.format(by=1, store=into_shared), first, second)
    assert (second == np.arange(64) // 2).all()
    assert "one place" in faults(body.format(by=0, store=into_shared), "race")
    into_global = "cvt.u64.u32 %d3, %r0;\nand.b64 %d3, %d3, 1;\nshl.b64 %d3, %d3, 2;\nsub.s64 %d3, %d1, %d3;\n"
    run(body.format(by=1, store=f"{into_global}st.global.b32 [%d3], %r4;"), first, second)
    assert "one element" in faults(body.format(by=0, store=f"{into_global}st.global.b32 [%d3], %r4;"), "race")


def test_a_write_may_not_overtake_another_warps_read():
    again = "bar.sync 0;\nst.shared.b32 [%r1], %r0;\n"
    body = EXCHANGE.format(barrier="bar.sync 0;")
    run(body + again, *words())
    faults(body + again.removeprefix("bar.sync 0;\n"), "race")


def test_a_copy_is_there_after_its_wait():
    first, second = words()
    run(COPY.format(wait="cp.async.wait_group 0;"), first, second)
    assert (second == np.roll(first, 32)).all()
    faults(COPY.format(wait=""), "cp.async read before its wait")
    faults(COPY.format(wait="cp.async.wait_group 1;"), "cp.async read before its wait")


def test_a_copy_without_a_source_is_zero():
    first, second = words()
    body = COPY.format(wait="cp.async.wait_group 0;").replace("[%d0], 4;", "[%d0], 4, %r5;")
    run("and.b32 %r5, %r0, 1;\nshl.b32 %r5, %r5, 2;\n" + body, first, second)
    assert (second == np.where(np.arange(64) % 2, np.roll(first, 32), 0)).all()


def test_memory_that_nobody_wrote_or_that_is_not_there():
    faults("ld.shared.b32 %r2, [%r1];", "read of unwritten shared memory")
    words_past = faults("st.shared.b32 [%r1+4000], %r0;", "access outside shared memory")
    assert "4" in words_past
    assert "second" in faults("st.global.b32 [%d1+4], %r0;", "access outside the tensors")
    faults("ld.global.b32 %r2, [%d0+-4];", "access outside the tensors")
    faults("ld.global.v2.b32 {%r2, %r3}, [%d0];", "misaligned access")
    faults("add.s32 %r2, %r3, 1;", "read of a register that nothing wrote")


def test_a_guard_keeps_threads_from_what_is_not_theirs():
    first, second = words()
    run("setp.lt.u32 %p1, %r0, 63;\n@%p1 st.global.b32 [%d1+4], %r0;", first, second)
    assert (second[1:] == np.arange(63)).all() and second[0] == 0


def test_tensors_side_by_side_are_far_apart_for_a_kernel():
    pytest.importorskip("triton")
    from ptx.launch import Launch, pack

    both = torch.zeros(128, dtype=torch.int32)
    parameters, regions = pack([("*i32", "first", both[:64]), ("*i32", "second", both[64:])])
    launch = functools.partial(Launch, name="kernel", threads=64, grid=(1, 1, 1), shared=0)
    launch(kernel("st.global.b32 [%d1], %r0;", 64), parameters=parameters, regions=regions).run()
    assert both.tolist() == [0] * 64 + list(range(64))
    with pytest.raises(Fault, match="access outside the tensors"):
        launch(kernel("st.global.b32 [%d0+4], %r0;", 64), parameters=parameters, regions=regions).run()


def test_blocks_share_no_element():
    body = "mov.u32 %r2, %ctaid.x;\nst.global.b32 [%d1], %r2;"
    run(body, *words(), blocks=1)
    faults(body, "race", blocks=2)
    run("ld.global.b32 %r2, [%d1];", *words(), blocks=2)
    faults("ld.global.b32 %r2, [%d1];\nst.global.b32 [%d1], %r2;", "race", blocks=2)


def test_paths_part_and_meet():
    first, second = words()
    run(BRANCH.format(edge=37, inside="", outside="bar.sync 0;"), first, second)
    assert (second == np.where(np.arange(64) < 37, 2, 1)).all()
    faults(BRANCH.format(edge=37, inside="bar.sync 0;", outside=""), "divergent barrier")
    faults(BRANCH.format(edge=32, inside="bar.sync 0;", outside="bar.sync 0;"), "divergent barrier")
    shuffle = "shfl.sync.bfly.b32 %r3, %r2, 1, 31, -1;"
    run(BRANCH.format(edge=32, inside=shuffle, outside=""), first, second)
    faults(BRANCH.format(edge=37, inside=shuffle, outside=""), "warp instruction in a divergent warp")


def test_a_loop_of_each_threads_own_length():
    first, second = words()
    body = """
mov.b32 %r2, 0;
mov.b32 %r3, 0;
$AGAIN:
add.s32 %r3, %r3, %r2;
add.s32 %r2, %r2, 1;
setp.le.u32 %p1, %r2, %r0;
@%p1 bra $AGAIN;
st.global.b32 [%d1], %r3;
"""
    run(body, first, second)
    assert (second == np.arange(64) * (np.arange(64) + 1) // 2).all()


def test_what_is_not_known_is_refused_by_name():
    with pytest.raises(Unsupported, match="tex"):
        run("tex.1d.v4.f32.s32 {%r2, %r3, %r4, %r5}, [first, {%r0}];", *words())
    with pytest.raises(Unsupported, match=r"mma.sync.aligned.m8n8k16"):
        run("mma.sync.aligned.m8n8k16.row.col.s32.s8.s8.s32 {%r2, %r3}, {%r4}, {%r5}, {%r2, %r3};", *words())


# A product of 64 x 16 zeros and 8 x 16 ones: 128-byte rows of 8, for both operands; the descriptors name them.
PRODUCT = """
mov.b32 %r2, 0;
shl.b32 %r3, %r0, 4;
st.shared.v4.b32 [%r3], {{%r2, %r2, %r2, %r2}};
st.shared.v4.b32 [%r3+2048], {{%r2, %r2, %r2, %r2}};
st.shared.v4.b32 [%r3+4096], {{%r2, %r2, %r2, %r2}};
st.shared.v4.b32 [%r3+6144], {{%r2, %r2, %r2, %r2}};
st.shared.v4.b32 [%r3+8192], {{%r2, %r2, %r2, %r2}};
{proxy}
bar.sync 0;
mov.b32 %r10, 0;
mov.b32 %r11, 0;
mov.b32 %r12, 0;
mov.b32 %r13, 0;
mov.b64 %d4, 0x4000004000000000;
mov.b64 %d5, 0x4000004000000200;
{fence}
{early}
wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {{%r10,%r11,%r12,%r13}}, %d4, %d5, 1, 1, 1, 0, 0;
wgmma.commit_group.sync.aligned;
{meanwhile}
{wait}
st.global.b32 [%d1], %r10;
"""
GOOD = {
    "proxy": "fence.proxy.async.shared::cta;", "fence": "wgmma.fence.sync.aligned;", "early": "", "meanwhile": "",
    "wait": "wgmma.wait_group.sync.aligned 0;",
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        ({"proxy": ""}, "missing proxy fence"),
        ({"fence": ""}, "wgmma without a wgmma.fence"),
        ({"early": "add.s32 %r10, %r10, 1;"}, "wgmma of a register that was written after its wgmma.fence"),
        ({"wait": ""}, "wgmma accumulator read before its wait"),
        ({"wait": "wgmma.wait_group.sync.aligned 1;"}, "wgmma accumulator read before its wait"),
        ({"meanwhile": "st.shared.b32 [%r1], %r0;"}, "write of what a wgmma in flight reads"),
    ],
)
def test_products_in_flight(change, kind):
    arrays = np.zeros(128, np.uint32), np.ones(128, np.uint32)
    run(PRODUCT.format(**GOOD), *arrays, threads=128, shared=16384)
    assert not arrays[1].any()
    with pytest.raises(Fault) as found:
        run(PRODUCT.format(**GOOD | change), *arrays, threads=128, shared=16384)
    assert found.value.kind == kind, found.value


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_normalised_rows_are_rounded_once(dtype):
    pytest.importorskip("triton")
    from ptx.cases import rounded_once

    x = torch.randn(20, 33, generator=torch.Generator().manual_seed(0)).to(dtype)
    rows = l2_normalize(x.float()).to(dtype)
    assert rounded_once(rows, x)
    bits = rows.clone().view(torch.int16)
    bits[7, 3] += 1
    assert not rounded_once(bits.view(dtype), x)
    assert not rounded_once(l2_normalize(x.float()).mul(1 + 2.0**-9).to(dtype), x)


def mutants(body, first, second, threads=64, shared=4096):
    """Of a small kernel: kind, what finds it, and why nothing does."""
    pytest.importorskip("triton")
    from ptx.launch import Launch
    from ptx.mutants import Hunt

    parameters, regions = memory(first, second)
    hunt = Hunt(few=False)
    hunt(Launch(kernel(body, threads), "kernel", threads, (1, 1, 1), shared, parameters, regions))
    return [(record["mutant"], record["by"], record["why"]) for record in hunt.records.values()]


BARRIER = "bar.sync 0;\n"


@pytest.mark.parametrize(
    ("body", "why"),
    [
        (EXCHANGE.format(barrier=BARRIER), ["needed"]),
        (EXCHANGE.format(barrier=2 * BARRIER), ["no access on one side of it"] * 2),
        (
            EXCHANGE.format(barrier=BARRIER).replace("128", "64"),
            ["what is accessed on both sides of it is one warp's own"],
        ),
        (
            EXCHANGE.format(barrier=BARRIER) + BARRIER + "ld.shared.b32 %r5, [%r1];\n",
            ["needed", "what is accessed on both sides of it is only read"],
        ),
        (
            "st.shared.b32 [%r1], %r0;\n" + BARRIER + "st.shared.b32 [%r1+1024], %r0;\n",
            ["nothing is accessed on both sides of it"],
        ),
    ],
)  # fmt: skip
def test_a_barrier_that_nothing_misses_has_a_reason(body, why):
    found = mutants(body, *words())
    assert [kind for kind, *_ in found] == ["barrier"] * len(why)
    assert [why or ("needed" if by == "race" else "") for _, by, why in found] == why


# Each thread takes its own word, or 3 where the mask keeps it out: here the threads from `edge` on.
MASKED = """
setp.lt.u32 %p1, %r0, {edge};
mov.b32 %r2, 3;
@%p1 ld.global.b32 %r2, [%d0];
{use}
st.global.b32 [%d1], %r4;
"""


@pytest.mark.parametrize(
    ("edge", "use", "by", "why"),
    [
        (64, "mov.b32 %r4, %r2;", "", "it is true in every lane"),
        (40, "mov.b32 %r4, %r2;", "other result", ""),
        (40, "selp.b32 %r4, %r2, %r0, %p1;", "", "what it keeps out is not used"),
        (40, "min.u32 %r4, %r2, 2;", "", "what it keeps out is not used"),
        (40, "shr.u32 %r4, %r2, 8;", "other result with other numbers there", ""),
    ],
)
def test_a_mask_that_nothing_misses_has_a_reason(edge, use, by, why):
    assert mutants(MASKED.format(edge=edge, use=use), *words()) == [("mask", by, why)]


def test_a_store_by_more_threads_than_it_takes():
    """Both halves have one value for each word, and the second need not store it; then a value of its own."""
    half = "and.b32 %r2, %r0, 31;\nmul.wide.u32 %d4, %r2, 4;\nsub.s64 %d5, %d1, %d2;\nadd.s64 %d5, %d5, %d4;\n"
    store = half + "setp.lt.u32 %p1, %r0, 32;\n@%p1 st.global.b32 [%d5], {value};"
    assert mutants(store.format(value="%r2"), *words()) == [
        ("mask", "", "the lanes that it keeps out would do what others do")
    ]
    assert mutants(store.format(value="%r0"), *words()) == [("mask", "race", "")]


def test_a_copy_without_its_mask():
    """A copy's bytes are zeros where its mask is: of a word that nobody wants, or that someone does."""
    body = "and.b32 %r5, %r0, 1;\nshl.b32 %r5, %r5, 2;\n" + COPY.format(wait="cp.async.wait_group 0;")
    body = body.replace("[%d0], 4;", "[%d0], 4, %r5;")
    assert mutants(body, *words())[0] == ("copy's mask", "other result", "")
    unused = body.replace("st.global.b32 [%d1]", "setp.ne.u32 %p1, %r5, 0;\n@%p1 st.global.b32 [%d1]")
    assert mutants(unused, *words())[0] == ("copy's mask", "", "what it keeps out is not used")


TWICE = {
    "proxy": ("proxy fence", ["no product reads what no other fence covers"] * 2),
    "fence": ("wgmma's fence", ["no product's register is written since the fence before it"] * 2),
    "wait": (
        "wgmma's wait",
        ["nothing that it waits for is used before another wait", "nothing that it waits for is in flight"],
    ),
}


@pytest.mark.parametrize("what", TWICE)
def test_a_fence_or_wait_that_stands_twice(what):
    arrays = np.zeros(128, np.uint32), np.ones(128, np.uint32)
    kind, why = TWICE[what]
    once = mutants(PRODUCT.format(**GOOD), *arrays, threads=128, shared=16384)
    assert all(by and not why for _, by, why in once), once
    twice = mutants(PRODUCT.format(**GOOD | {what: 2 * GOOD[what]}), *arrays, threads=128, shared=16384)
    assert [(by, reason) for name, by, reason in twice if name == kind] == [("", reason) for reason in why]


def test_a_register_moved_after_its_fence():
    """A copy of a number that was there before the fence is no less written after it."""
    arrays = np.zeros(128, np.uint32), np.ones(128, np.uint32)
    with pytest.raises(Fault, match="written after its"):
        run(PRODUCT.format(**GOOD | {"early": "mov.b32 %r10, %r11;"}), *arrays, threads=128, shared=16384)


def test_a_mutant_without_a_reason_fails_the_run(monkeypatch, capsys):
    pytest.importorskip("triton")
    from ptx import mutants
    from ptx.__main__ import main

    record = {
        "kernel": "reduce_rows",
        "mutant": "barrier",
        "at": "reduce.py:1",
        "what": "bar.sync 0",
        "by": "",
        "why": "",
    }
    found, explained = {"by": "race"}, {"why": "no access on one side of it"}
    for change, status in ((found, 0), (explained, 0), ({}, 1), (found | explained, 1)):
        monkeypatch.setattr(mutants, "of_case", lambda case, few, change=change: [record | change])
        assert main(["mutants", "tiled"]) == status
        assert ("reduce.py:1: bar.sync 0" in capsys.readouterr().out) == bool(status)
