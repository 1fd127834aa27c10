"""The OpenMP threads and the BLAS that torch has loaded, which the compiled kernels use, too.

A second OpenMP runtime would be worse than none: its threads would spin beside torch's, which doubles the time on 2
cores. The BLAS multiplies weights by embeddings on processors without AVX2. Similarities are always computed by the
kernels themselves, so that their bits do not depend on where a pair stands (csrc/cpu/tile/products.h). The kernels have
a replacement for each symbol that is not found.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from types import ModuleType

import torch

SYMBOLS = ("sgemm_", "dgemm_", "MKL_Set_Num_Threads_Local", "GOMP_parallel")


def _torch_library() -> ctypes.CDLL | None:
    """A handle on torch's library, which is loaded already, and on the libraries that it links."""
    for name in ("libtorch_cpu.so", "libtorch_cpu.dylib"):
        path = Path(torch.__file__).parent / "lib" / name
        if path.exists():
            return ctypes.CDLL(str(path))
    return None


def addresses() -> dict[str, int]:
    """The address of each symbol, 0 where there is none. FLASHPAIR_RUNTIME=builtin finds none, for tests.

    Only torch's library is searched: another BLAS in the process may take 64-bit integers under the same names.
    """
    library = None if os.environ.get("FLASHPAIR_RUNTIME") == "builtin" else _torch_library()
    addresses = {}
    for symbol in SYMBOLS:
        function = getattr(library, symbol, None)
        addresses[symbol] = (ctypes.cast(function, ctypes.c_void_p).value or 0) if function else 0
    return addresses


def connect(extension: ModuleType) -> None:
    """Gives the addresses to the compiled kernels."""
    extension.use_runtime(*addresses().values())
