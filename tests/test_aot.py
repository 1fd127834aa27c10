"""Every shipped configuration, compiled for chips that are not there: registers, stack, shared memory, tensor cores.

Zero stack means that no value leaves the registers; it is what decided the tiles in kernels/configs.py.
"""

from __future__ import annotations

import pytest

pytest.importorskip("triton")
from flashpair.kernels import configs

CHIPS = ("80", "90", "100", "86", "gfx942")


def _screened():
    from aot import SCREENED

    return SCREENED


def _family(chip):
    from aot import FAMILIES

    return FAMILIES[chip]


@pytest.mark.parametrize("chip", CHIPS)
def test_every_configuration_fits_the_chip(compiled, chip):
    family = _family(chip)
    seen = [r for r in compiled if r["arch"] == chip]
    for (of, dtype), rows in configs.TABLE.items():
        for largest, config in rows if of == family else ():
            name = str(dtype).removeprefix("torch.")
            kernels = {r["kernel"] for r in seen if r["dtype"] == name and r["config"][:2] == list(config[:2])}
            assert {"reduce_rows", "weigh_rows"} <= kernels, f"{name} to D = {largest} was not compiled"
    for r in seen:
        assert r["stack"] == 0, f"registers spill to the stack: {r}"
        assert r["registers"] <= (512 if chip.startswith("gfx") else 255), r
        assert r["shared"] <= configs.SHARED_MEMORY[family] * 1024, f"more shared memory than the chip has: {r}"


@pytest.mark.parametrize("chip", CHIPS)
def test_the_screen_is_on_the_tensor_cores_in_int8(compiled, chip):
    seen = [r for r in compiled if r["arch"] == chip and r["kernel"] == "screen"]
    assert len(seen) == len(_screened()) and all(r["int8"] for r in seen)


@pytest.mark.parametrize("chip", CHIPS)
def test_products_are_on_the_tensor_cores(compiled, chip):
    seen = [r for r in compiled if r["arch"] == chip and r["kernel"] in ("reduce_rows", "weigh_rows")]
    seen = [r for r in seen if "blocked" not in r["loss"]]  # whose products are the vendor's
    assert seen
    for r in seen:
        assert r["tensor_cores"] or r["dtype"] == "float64", f"no tensor-core instruction: {r}"
