"""Builds flashpair._C, and flashpair._onchip where nvcc is, with ninja: one source is compiled per instruction set."""

import json
import os
import subprocess
import sys
from pathlib import Path

import ninja
from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.errors import CompileError

sys.path.insert(0, str(Path(__file__).resolve().parent / "csrc"))
import compilers

PACKAGES = {"flashpair": "python/flashpair", "flashpair.backends.triton.kernels": "kernels"}
CXX, RECORD = compilers.cpp()
NVCC, CUDA_RECORD = compilers.cuda(RECORD)
EXTENSIONS = ["_C"] * bool(CXX) + ["_onchip"] * bool(NVCC)
WITHOUT = {"_C": "FLASHPAIR_PURE_PYTHON=1", "_onchip": "FORCE_CUDA=0"}


class NinjaBuild(build_ext):
    def build_extension(self, ext):
        # An editable install's own build folder is thrown away, which would recompile everything each time.
        folder = Path("build/editable" if self.editable_mode else self.build_temp)
        rules, name = folder / "build.ninja", ext.name.removeprefix("flashpair.")
        self.mkpath(str(folder))
        lines = compilers.ninja_rules(str(folder).replace(" ", "$ "), CXX, RECORD, NVCC)
        rules.write_text("\n".join(lines), encoding="utf-8")
        if subprocess.call([Path(ninja.BIN_DIR, "ninja"), "-f", rules, folder / f"{name}.so"]):
            raise CompileError(f"{ext.name} does not build; to install without it, set {WITHOUT[name]}")
        self.mkpath(os.path.dirname(self.get_ext_fullpath(ext.name)))
        self.copy_file(folder / f"{name}.so", self.get_ext_fullpath(ext.name))


class RecordingBuild(build_py):
    def run(self):
        super().run()
        package = Path("python" if self.editable_mode else self.build_lib, "flashpair")
        (package / "_build.json").write_text(json.dumps(RECORD | CUDA_RECORD, indent=1) + "\n")
        if not CXX:
            print(f"flashpair: installing as pure Python ({RECORD['reason']})", file=sys.stderr)
        for name in compilers.SOURCES.keys() - EXTENSIONS:
            for stale in package.glob(f"{name}.*.so"):
                stale.unlink()


setup(
    packages=[p for root, d in PACKAGES.items() for p in (root, *(f"{root}.{s}" for s in find_packages(d)))],
    package_dir=PACKAGES,
    ext_modules=[Extension(f"flashpair.{name}", compilers.SOURCES[name]) for name in EXTENSIONS],
    cmdclass={"build_ext": NinjaBuild, "build_py": RecordingBuild},
)
