"""Which compilers there are, and the ninja rules of both extensions; for setup.py. It never looks for a GPU."""

import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pybind11

ISA_FLAGS = {"baseline": "", "avx2": "-mavx2 -mfma"}
ISA_FLAGS["avx512"] = "-mavx512f -mavx512vl -mavx512dq -mavx512bw -mfma"
INT8_FLAGS = {**ISA_FLAGS, "avx512vnni": f"{ISA_FLAGS['avx512']} -mavx512vnni"}
COMMON = "-O3 -std=c++17 -fPIC -pthread -fvisibility=hidden -fno-math-errno -Wall -Wextra -Wno-psabi"
SANITIZE = "-fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer -g -O1"
SHARED = "-bundle -undefined dynamic_lookup" if sys.platform == "darwin" else "-shared"
NVCC_FLAGS = "-O3 -std=c++17 --threads 0 -Xcompiler -fPIC,-fvisibility=hidden"
ARCHITECTURES = ("80", "90", "100")

SOURCES = {
    "_C": ["csrc/bindings.cpp", "csrc/cpu/kernels.cpp", "csrc/cpu/screen/int8.cpp"],
    "_onchip": ["csrc/cuda/bindings.cpp", "csrc/cuda/onchip.cu"],
}


def source_hash():
    """As the package has it, which is not there to be imported yet."""
    return runpy.run_path("python/flashpair/backends/source_hash.py")["source_hash"](Path("csrc"))


def env_on(name):
    return os.environ.get(name, "") not in ("", "0")


def env_flags(name):
    return shlex.join(shlex.split(os.environ.get(name, ""))).replace("$", "$$")


def cpp():
    """The C++ compiler's command (empty for a pure Python install), and the record that `flashpair info` reads.

    One that CXX names, and that is not there, is an error: whoever names it does not want an install without.
    """
    candidates = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    found = [cxx for cxx in candidates if shutil.which((shlex.split(cxx) or [""])[0])]
    if env_on("FLASHPAIR_PURE_PYTHON"):
        reason = "FLASHPAIR_PURE_PYTHON is set"
    elif os.name == "nt":
        reason = "the extension is not supported on Windows"
    elif not found and os.environ.get("CXX"):
        raise RuntimeError(
            f"CXX must be a C++ compiler's command, got {os.environ['CXX']!r}, which is not found; unset it to take"
            " c++, g++ or clang++, or set FLASHPAIR_PURE_PYTHON=1 to install without the extension"
        )
    elif not found:
        reason = f"no C++ compiler: {', '.join(candidates)} not found"
    else:
        version = subprocess.getoutput(f"{found[0]} --version").partition("\n")[0]
        x86 = subprocess.getoutput(f"{found[0]} -dumpmachine").startswith("x86_64")
        isas = list(INT8_FLAGS) if x86 else ["baseline"]
        return found[0], {"extension": True, "reason": "", "compiler": version, "isas": isas, "sources": source_hash()}
    return "", {"extension": False, "reason": reason, "compiler": "", "isas": []}


def architectures(text, known):
    """nvcc's flags for a TORCH_CUDA_ARCH_LIST ("8.0;9.0+PTX", "80 90"), or for ARCHITECTURES that it knows, and PTX."""
    words = [word for word in re.split(r"[;, ]+", text) if word]
    words = words or [f"{arch}{'+PTX' * (arch == known[-1])}" for arch in known]
    for word in words:
        found = re.fullmatch(r"(\d+)\.?(\d[af]?)(\+PTX)?", word)
        if not found:
            raise RuntimeError(f"TORCH_CUDA_ARCH_LIST: {word!r} is none of the form 9.0 or 9.0+PTX")
        arch = found[1] + found[2]
        kinds = ("sm", "compute") if found[3] else ("sm",)
        yield word, [f"-gencode=arch=compute_{arch},code={kind}_{arch}" for kind in kinds]


def cuda(record):
    """nvcc's command with its flags (empty to do without), and its part of the record.

    FORCE_CUDA=1 insists on nvcc, =0 does without.
    """
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    places = (*(f"{home}/bin/nvcc" for home in homes[:2] if home), "nvcc", f"{homes[2]}/bin/nvcc")
    nvcc = shlex.quote(next(filter(None, map(shutil.which, places)), ""))
    known = re.findall(r"compute_(\w+)", subprocess.getoutput(f"{nvcc} --list-gpu-arch"))
    known = [arch for arch in ARCHITECTURES if arch in known]
    reason = record["reason"] or ("" if known else "no nvcc in CUDA_HOME or on the PATH, or none for these GPUs")
    if os.environ.get("FORCE_CUDA", "") == "0":
        reason = reason or "FORCE_CUDA=0"
    if reason:
        if env_on("FORCE_CUDA"):
            raise RuntimeError(f"FORCE_CUDA is set, but CUDA cannot be built: {reason}")
        return "", {"cuda": "", "cuda_reason": reason}
    chosen = dict(architectures(os.environ.get("TORCH_CUDA_ARCH_LIST", ""), known))
    command = " ".join([nvcc.replace("$", "$$"), NVCC_FLAGS, *(flag for flags in chosen.values() for flag in flags)])
    release = subprocess.getoutput(f"{nvcc} --version").partition("release ")[2].partition(",")[0]
    return command, {"cuda": f"nvcc {release} for {' '.join(chosen)}", "cuda_reason": ""}


def ninja_rules(at, cxx, record, nvcc):
    """The lines of a build.ninja that makes `at`/_C.so, and `at`/_onchip.so where there is nvcc."""
    common = f"{COMMON} {SANITIZE if env_on('FLASHPAIR_SANITIZE') else ''} {env_flags('CXXFLAGS')}"
    include = shlex.join(f"-I{d}" for d in ("csrc", sysconfig.get_path("include"), pybind11.get_include()))
    yield f"builddir = {at}\nrule cxx\n deps = gcc\n depfile = $out.d"
    yield f" command = {cxx} {common} {include} $flags -MMD -MF $out.d -c $in -o $out"
    yield f"rule link\n command = {cxx} {common} {SHARED} $in -o $out {env_flags('LDFLAGS')}"
    x86 = "-DFLASHPAIR_X86_64=1" if "avx2" in record["isas"] else ""
    bindings, kernels, int8 = SOURCES["_C"]
    yield f"build {at}/bindings.o: cxx {bindings}\n flags = {x86} -DFLASHPAIR_SOURCES='\"{source_hash()}\"'"
    objects = [f"{at}/bindings.o"]
    for name, source, isas in (("kernels", kernels, ISA_FLAGS), ("int8", int8, INT8_FLAGS)):
        for isa in filter(record["isas"].__contains__, isas):
            objects.append(f"{at}/{name}_{isa}.o")
            yield f"build {objects[-1]}: cxx {source}\n flags = -DFLASHPAIR_ISA={isa} {isas[isa]}"
    yield f"build {at}/_C.so: link {' '.join(sorted(objects))}\n"
    if not nvcc:
        return
    bindings, kernel = SOURCES["_onchip"]
    yield f"rule nvcc\n deps = gcc\n depfile = $out.d\n command = {nvcc} -MMD -MF $out.d -c $in -o $out"
    # The runtime is linked statically: the module loads on a machine without a driver.
    yield f"rule nvlink\n command = {nvcc} -shared -cudart static $in -o $out"
    yield f"build {at}/onchip.o: nvcc {kernel}\nbuild {at}/onchip_bindings.o: cxx {bindings}"
    yield f"build {at}/_onchip.so: nvlink {at}/onchip.o {at}/onchip_bindings.o\n"
