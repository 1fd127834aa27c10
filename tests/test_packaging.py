"""Builds and installs flashpair as a stranger would: sdist, isolated wheel, empty folder, fresh process."""

import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
HAS_NVCC = any(map(shutil.which, ("nvcc", "/usr/local/cuda/bin/nvcc")))
HAS_COMPILER = any(map(shutil.which, (os.environ.get("CXX") or "c++", "g++", "clang++")))
needs_compiler = pytest.mark.skipif(not HAS_COMPILER, reason="no C++ compiler on this machine")


def python(*args, cwd, check=True, **env):
    ours = ("FLASHPAIR_", "PYTHONPATH", "TORCH_CUDA_ARCH_LIST")
    clean = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    clean["TORCH_CUDA_ARCH_LIST"] = "9.0+PTX"  # for one chip, because nvcc takes its time
    command = [sys.executable, *map(str, args)]
    done = subprocess.run(command, cwd=cwd, env=clean | env, capture_output=True, text=True, timeout=600)
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of the tree, so that building disturbs nothing in it."""
    copy = tmp_path_factory.mktemp("source")
    built = shutil.ignore_patterns("*.so", "_build.json", "__pycache__")
    for folder in ("csrc", "kernels", "python"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=built)
    for file in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, copy)
    return copy


@pytest.fixture(scope="module")
def sdist(source, tmp_path_factory):
    out = tmp_path_factory.mktemp("sdist")
    python("-m", "build", "--sdist", "--no-isolation", "--outdir", out, cwd=source)
    return next(out.glob("*.tar.gz"))


@pytest.fixture(scope="module")
def install(sdist, tmp_path_factory):
    """Installs a wheel built from the sdist under the given environment, into a folder of its own."""

    def build(**env):
        out, site = tmp_path_factory.mktemp("wheel"), tmp_path_factory.mktemp("site")
        python("-m", "pip", "wheel", "--quiet", "--no-deps", "-w", out, sdist, cwd=out, **env)
        wheel = next(out.glob("*.whl"))
        python("-m", "pip", "install", "--quiet", "--no-deps", "--target", site, wheel, cwd=out)
        return site

    return build


@pytest.fixture(scope="module")
def native(install):
    return install(CXXFLAGS="-O0")  # for time


@pytest.fixture(scope="module")
def pure(install):
    return install(FLASHPAIR_PURE_PYTHON="1")


@pytest.fixture(scope="module")
def without_compiler(install, tmp_path_factory):
    return install(PATH=str(tmp_path_factory.mktemp("empty")), CXX="")


def check_import(site, cwd):
    code = "import flashpair, flashpair.kernels as k; print(flashpair.__file__, k.__file__, sep='\\n')"
    for file in python("-c", code, cwd=cwd, PYTHONPATH=str(site)).stdout.split("\n")[:2]:
        assert Path(file).is_relative_to(site)


def info(site, cwd):
    return python("-m", "flashpair", "info", cwd=cwd, PYTHONPATH=str(site)).stdout


def record(site):
    return json.loads((site / "flashpair/_build.json").read_text())


def test_sdist_has_every_source(source, sdist):
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for folder in ("csrc", "kernels", "python/flashpair"):
        files = {str(f.relative_to(source)) for f in (source / folder).rglob("*") if f.is_file()}
        assert files
        assert files <= names


def test_wheel_has_every_module(source, pure):
    for folder, package in (("python/flashpair", "flashpair"), ("kernels", "flashpair/kernels")):
        modules = [f.relative_to(source / folder) for f in (source / folder).rglob("*.py")]
        assert not [m for m in modules if not (pure / package / m).exists()]


@needs_compiler
def test_native_wheel(native, tmp_path):
    assert {p.name.partition("-")[0] for p in native.iterdir()} == {"flashpair"}
    check_import(native, tmp_path)
    assert "extension: built" in info(native, tmp_path)
    assert record(native)["isas"][0] == "baseline"
    python("-c", "import flashpair._C", cwd=tmp_path, PYTHONPATH=str(native))


@needs_compiler
@pytest.mark.skipif(not HAS_NVCC, reason="no nvcc on this machine")
def test_cuda_loads_without_a_driver(native, tmp_path):
    module = next(native.glob("flashpair/_onchip.*.so"))
    python("-c", "import flashpair._onchip", cwd=tmp_path, PYTHONPATH=str(native))
    assert "for 9.0+PTX" in record(native)["cuda"]
    said = info(native, tmp_path)
    assert f"onchip: built with {record(native)['cuda']}" in said
    assert "onchip on cpu: cannot run: onchip needs a CUDA device" in said
    assert b"libcudart.so" not in module.read_bytes()  # the runtime is inside; the driver is looked for when it runs


def test_without_nvcc(source):
    hidden = "import shutil; which = shutil.which; shutil.which = lambda f: None if 'nvcc' in str(f) else which(f); "
    script = hidden + "import sys; sys.path.insert(0, 'csrc'); import compilers; print(compilers.cuda({'reason': ''}))"
    assert "no nvcc in CUDA_HOME or on the PATH" in python("-c", script, cwd=source).stdout
    done = python("-c", script, cwd=source, check=False, FORCE_CUDA="1")
    assert done.returncode != 0 and "FORCE_CUDA is set, but CUDA cannot be built" in done.stderr


@pytest.mark.parametrize(("site", "why"), [("pure", "FLASHPAIR_PURE_PYTHON"), ("without_compiler", "no C++ compiler")])
def test_pure_python_wheel(site, why, request, tmp_path):
    folder = request.getfixturevalue(site)
    assert not list(folder.rglob("*.so"))
    check_import(folder, tmp_path)
    said = info(folder, tmp_path)
    assert "pure Python" in said
    assert why in said
    assert f"onchip: not built: {record(folder)['cuda_reason']}" in said
    assert record(folder)["extension"] is False


@needs_compiler
def test_compile_error_is_loud(source, tmp_path):
    broken = shutil.copytree(source, tmp_path / "broken")
    for file in broken.glob("csrc/**/*.cpp"):
        file.write_text("#error broken on purpose\n")
    done = python("setup.py", "build_ext", cwd=broken, check=False)
    assert done.returncode != 0
    assert "FLASHPAIR_PURE_PYTHON=1" in done.stderr


def test_import_is_light():
    code = (
        "import sys, torch; before = set(sys.modules); import flashpair; new = set(sys.modules) - before;"
        "assert not new & {'triton', 'flashpair._C'}, new; assert not torch.cuda.is_initialized()"
    )
    python("-c", code, cwd=ROOT)
