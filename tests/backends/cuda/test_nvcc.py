"""The machine code of csrc/cuda that this installation holds: no spills, no stack, no stale loads, for every chip."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

import flashpair
from flashpair.backends import extension
from flashpair.backends.cuda.onchip import BLOCK_ROWS

MODULE = next(Path(flashpair.__file__).parent.glob("_onchip.*.so"), None)
pytestmark = pytest.mark.skipif(MODULE is None, reason=f"no CUDA: {extension.build_record().get('cuda_reason')}")
ARCHITECTURES = ("sm_80", "sm_90", "sm_100")


def _dump(*options):
    triton = pytest.importorskip("triton")
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    return subprocess.check_output([tool, *options, MODULE], text=True)


def _by_architecture(text):
    """What cuobjdump says of the kernel for each chip, by architecture."""
    parts = re.split(r"arch = (sm_\d+)", text)
    found = {}
    for arch, part in zip(parts[1::2], parts[2::2], strict=True):
        found[arch] = found.get(arch, "") + part
    return {arch: part for arch, part in found.items() if "loss_and_gradient" in part}


def test_nothing_spills():
    found = _by_architecture(_dump("--dump-resource-usage"))
    if not set(ARCHITECTURES) <= set(found):
        pytest.skip(f"built for {', '.join(found)} alone")
    for arch in ARCHITECTURES:
        kernels = re.findall(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", found[arch])
        assert len(kernels) == 2 * len(BLOCK_ROWS)  # float and double
        for registers, stack, local in kernels:
            assert int(registers) <= 255 and (stack, local) == ("0", "0"), arch


def test_chips_to_come_find_ptx():
    assert "+PTX" not in extension.build_record()["cuda"] or "loss_and_gradient" in _dump("--dump-ptx")


def test_what_the_kernel_writes_is_not_read_as_constant():
    """A load through the read-only path may not see what another block wrote in the same launch."""
    found = _by_architecture(_dump("--dump-sass"))
    assert found
    for arch, code in found.items():
        assert "LDG" in code and "LDG.E.128" in code, arch
        assert not re.search(r"LDG\S*CONSTANT", code), arch
