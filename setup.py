"""Builds flashpair._C with ninja, because one source file is compiled once per instruction set."""

import json
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import ninja
import pybind11
from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.errors import CompileError

ISA_FLAGS = {"baseline": "", "avx2": "-mavx2 -mfma"}
ISA_FLAGS["avx512"] = "-mavx512f -mavx512vl -mavx512dq -mavx512bw -mfma"
COMMON = "-O3 -std=c++17 -fPIC -pthread -fvisibility=hidden -fno-math-errno -Wall -Wextra -Wno-psabi"
SANITIZE = "-fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer -g -O1"
SHARED = "-bundle -undefined dynamic_lookup" if sys.platform == "darwin" else "-shared"
BINDINGS, KERNELS = "csrc/bindings.cpp", "csrc/cpu/kernels.cpp"
PACKAGES = {"flashpair": "python/flashpair", "flashpair.kernels": "kernels"}


def env_on(name):
    return os.environ.get(name, "") not in ("", "0")


def env_flags(name):
    return shlex.join(shlex.split(os.environ.get(name, ""))).replace("$", "$$")


def plan():
    """The compiler command (empty for a pure Python install), and the record that `flashpair info` reads."""
    candidates = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    found = [cxx for cxx in candidates if shutil.which(shlex.split(cxx)[0])]
    if env_on("FLASHPAIR_PURE_PYTHON"):
        reason = "FLASHPAIR_PURE_PYTHON is set"
    elif os.name == "nt":
        reason = "the extension is not supported on Windows"
    elif not found:
        reason = f"no C++ compiler: {', '.join(candidates)} not found"
    else:
        version = subprocess.getoutput(f"{found[0]} --version").partition("\n")[0]
        x86 = subprocess.getoutput(f"{found[0]} -dumpmachine").startswith("x86_64")
        isas = list(ISA_FLAGS) if x86 else ["baseline"]
        return found[0], {"extension": True, "reason": "", "compiler": version, "isas": isas}
    return "", {"extension": False, "reason": reason, "compiler": "", "isas": []}


CXX, RECORD = plan()


def ninja_rules(at):
    common = f"{COMMON} {SANITIZE if env_on('FLASHPAIR_SANITIZE') else ''} {env_flags('CXXFLAGS')}"
    include = shlex.join(f"-I{d}" for d in ("csrc", sysconfig.get_path("include"), pybind11.get_include()))
    yield f"builddir = {at}\nrule cxx\n deps = gcc\n depfile = $out.d"
    yield f" command = {CXX} {common} {include} $flags -MMD -MF $out.d -c $in -o $out"
    yield f"rule link\n command = {CXX} {common} {SHARED} $in -o $out {env_flags('LDFLAGS')}"
    x86 = "-DFLASHPAIR_X86_64=1" if "avx2" in RECORD["isas"] else ""
    yield f"build {at}/bindings.o: cxx {BINDINGS}\n flags = {x86}"
    for isa in RECORD["isas"]:
        yield f"build {at}/{isa}.o: cxx {KERNELS}\n flags = -DFLASHPAIR_ISA={isa} {ISA_FLAGS[isa]}"
    yield f"build {at}/_C.so: link {' '.join(f'{at}/{o}.o' for o in ('bindings', *RECORD['isas']))}\n"


class NinjaBuild(build_ext):
    def build_extension(self, ext):
        # An editable install's own build folder is thrown away, which would recompile everything each time.
        folder = Path("build/editable" if self.editable_mode else self.build_temp)
        rules = folder / "build.ninja"
        self.mkpath(str(folder))
        rules.write_text("\n".join(ninja_rules(str(folder).replace(" ", "$ "))))
        if subprocess.call([Path(ninja.BIN_DIR, "ninja"), "-f", rules]):
            raise CompileError("C++ build failed; to install without it, set FLASHPAIR_PURE_PYTHON=1")
        self.mkpath(os.path.dirname(self.get_ext_fullpath(ext.name)))
        self.copy_file(folder / "_C.so", self.get_ext_fullpath(ext.name))


class RecordingBuild(build_py):
    def run(self):
        super().run()
        package = Path("python" if self.editable_mode else self.build_lib, "flashpair")
        (package / "_build.json").write_text(json.dumps(RECORD, indent=1) + "\n")
        if not CXX:
            print(f"flashpair: installing as pure Python ({RECORD['reason']})", file=sys.stderr)
            for stale in package.glob("_C.*.so"):
                stale.unlink()


setup(
    packages=[p for root, d in PACKAGES.items() for p in (root, *(f"{root}.{s}" for s in find_packages(d)))],
    package_dir=PACKAGES,
    ext_modules=[Extension("flashpair._C", [BINDINGS, KERNELS])] if CXX else [],
    cmdclass={"build_ext": NinjaBuild, "build_py": RecordingBuild},
)
