"""Every shipped configuration, compiled for chips that are not there: registers, stack, shared memory, tensor cores.

Zero stack means that no value leaves the registers; it is what decided the tiles in kernels/configs.py.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("triton")
from flashpair.backends.triton.kernels import configs
from ttir import narrow_products

CHIPS = ("80", "90", "100", "86", "gfx942")


def _screened():
    from aot import SCREENED

    return SCREENED


def _family(chip):
    from aot import FAMILIES

    return FAMILIES[chip]


@pytest.fixture(scope="module", params=CHIPS)
def compiled(request):
    """A chip, and what tests/support/aot.py reports of it, after a minute or two of a core."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, str(Path(__file__).resolve().parents[2] / "support" / "aot.py"), request.param]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return SimpleNamespace(chip=request.param, kernels=json.loads(done.stdout))


def test_every_configuration_fits_the_chip(compiled):
    family = _family(compiled.chip)
    for (of, dtype), rows in configs.TABLE.items():
        for largest, config in rows if of == family else ():
            name = str(dtype).removeprefix("torch.")
            own = (r for r in compiled.kernels if r["dtype"] == name and r["config"][:2] == list(config[:2]))
            kernels = {r["kernel"] for r in own}
            assert {"reduce_rows", "backward_rows"} <= kernels, f"{name} to D = {largest} was not compiled"
    for r in compiled.kernels:
        assert r["stack"] == 0, f"registers spill to the stack: {r}"
        assert r["registers"] <= (512 if compiled.chip.startswith("gfx") else 255), r
        assert r["shared"] <= configs.SHARED_MEMORY[family] * 1024, f"more shared memory than the chip has: {r}"


def test_the_screen_is_on_the_tensor_cores_in_int8(compiled):
    seen = [r for r in compiled.kernels if r["kernel"] == "screen"]
    assert len(seen) == len(_screened()) and all(r["int8"] for r in seen)


def test_products_are_on_the_tensor_cores(compiled):
    seen = [r for r in compiled.kernels if r["kernel"] in ("reduce_rows", "backward_rows")]
    seen = [r for r in seen if ", tiled" not in r["loss"]]  # whose products are the vendor's
    assert seen
    for r in seen:
        fewer = r["config"][0] < 64 and r["by_warp"]  # rows than wgmma and tcgen05 take
        assert r["tensor_cores"] or fewer or r["dtype"] == "float64", f"no tensor-core instruction: {r}"


def test_offsets_are_products_of_64_bits(compiled):
    assert len(compiled.kernels) > 8
    assert not [(r["kernel"], r["narrow"]) for r in compiled.kernels if r["narrow"]]


def test_a_product_of_32_bits_is_noticed():
    """What Triton makes of `x + live_rows * live_stride`, and of two that are no offset of that kind."""
    code = """
  tt.func public @sum(%x: !tt.ptr<f32> {tt.divisibility = 16 : i32}, %rows: i32 loc("rows"(#loc)), %stride: i32) {
    %cst = arith.constant dense<128> : tensor<64xi32>
    %all = tt.splat %rows : i32 -> tensor<64xi32> loc(#loc1)
    %first = arith.muli %all, %cst : tensor<64xi32> loc(#loc1)
    %wide = arith.muli %9, %10 : i64 loc(#loc2)
    %base = arith.muli %rows, %stride : i32 loc(#loc3)
    %at = arith.muli %7, %all : tensor<64xi32> loc(#loc4)
"""
    assert [line.split()[0] for line in narrow_products(code)] == ["%base", "%at"]
