"""What torch has loaded that the compiled kernels use too: its OpenMP threads, and its BLAS.

A second OpenMP runtime would be worse than none: its threads spin beside torch's, which doubles the time on 2 cores.
The BLAS multiplies weights by embeddings where the kernels' own vectors are narrow (no AVX2). Similarities are always
the kernels' own, whose bits do not hang on where a pair stands (tile/products.h). What is not found has a stand-in.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from types import ModuleType

import torch

SYMBOLS = ("sgemm_", "dgemm_", "MKL_Set_Num_Threads_Local", "GOMP_parallel")


def _torch_library() -> ctypes.CDLL | None:
    """A handle on torch's own library, loaded already, and on what it links."""
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
    extension.use_runtime(*addresses().values())
