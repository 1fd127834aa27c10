"""Builds and installs flashpair as a stranger would: sdist, isolated wheel, empty folder, fresh process."""

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from fnmatch import fnmatch
from pathlib import Path

import pytest

import flashpair

ROOT = Path(__file__).resolve().parents[2]
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


def sources():
    """Files of the tree that are its own, not made of it; of an unpacked sdist, where git knows none, by .gitignore."""
    listing = ("git", "-c", "safe.directory=*", "ls-files", "-z", "--cached", "--others", "--exclude-standard")
    if (ROOT / ".git").exists() and shutil.which("git"):
        found = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
        return sorted(name for name in found if name and (ROOT / name).is_file())
    made = [line.rstrip("/") for line in (ROOT / ".gitignore").read_text().split()] + ["PKG-INFO", "setup.cfg"]
    files = (f.relative_to(ROOT) for f in ROOT.rglob("*") if f.is_file())
    return sorted(str(f) for f in files if not any(fnmatch(part, like) for part in f.parts for like in made))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of the tree, so that building disturbs nothing in it."""
    copy = tmp_path_factory.mktemp("source")
    for name in sources():
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, copy / name)
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
    code = "import flashpair, flashpair.backends.triton.kernels as k; print(flashpair.__file__, k.__file__, sep='\\n')"
    for file in python("-c", code, cwd=cwd, PYTHONPATH=str(site)).stdout.split("\n")[:2]:
        assert Path(file).is_relative_to(site)


def info(site, cwd):
    return python("-m", "flashpair", "info", cwd=cwd, PYTHONPATH=str(site)).stdout


def record(site):
    return json.loads((site / "flashpair/_build.json").read_text())


def names(sdist):
    with tarfile.open(sdist) as archive:
        return {f.name.partition("/")[2] for f in archive.getmembers() if f.isfile()}


def test_sdist_has_every_file(sdist):
    """All that its Makefile, tests and benchmarks read, and nothing that was made on the way."""
    expected = set(sources())
    for needed in (
        "Makefile",
        "CONTRIBUTING.md",
        "bench/__main__.py",
        "tests/support/golden.json",
        ".ci/run",
        "csrc/cpu/tile/simd.h",
    ):
        assert needed in expected
    made = {"PKG-INFO", "setup.cfg"}
    assert {name for name in names(sdist) if ".egg-info/" not in name} - made == expected


def test_sdist_leaves_out_what_was_made(source, tmp_path):
    """Bytecode, extensions and records of the tree that it is packed from."""
    used = shutil.copytree(source, tmp_path / "used")
    for name in ("csrc/__pycache__/compilers.cpython-313.pyc", "tests/__pycache__/golden.cpython-313.pyc"):
        (used / name).parent.mkdir(exist_ok=True)
        (used / name).write_bytes(b"made")
    for name in ("python/flashpair/_build.json", "python/flashpair/_C.cpython-313-x86_64-linux-gnu.so"):
        (used / name).write_bytes(b"{}")
    python("-m", "build", "--sdist", "--no-isolation", "--outdir", tmp_path, cwd=used)
    found = names(next(tmp_path.glob("*.tar.gz")))
    assert "csrc/compilers.py" in found
    assert not [name for name in found if "__pycache__" in name or name.endswith((".so", ".pyc", "_build.json"))]


def test_one_version(sdist):
    """Said once, in the package; the citation file, the changelog and what is built agree."""
    version = flashpair.__version__
    assert sdist.name == f"flashpair-{version}.tar.gz"
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert newest[1] == version
    with tarfile.open(sdist) as archive:
        said = archive.extractfile(f"flashpair-{version}/PKG-INFO").read().decode()
    assert f"\nVersion: {version}\n" in said


def test_wheel_has_every_module(source, pure):
    for folder, package in (("python/flashpair", "flashpair"), ("kernels", "flashpair/backends/triton/kernels")):
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


def test_compiler_that_is_not_there_is_an_error(source):
    """Where CXX names it. Nobody who names a compiler wants an install without the extension."""
    done = python("setup.py", "--version", cwd=source, check=False, CXX="g++-that-is-nowhere -m64")
    assert done.returncode != 0
    assert "CXX must be a C++ compiler's command, got 'g++-that-is-nowhere -m64', which is not found" in done.stderr
    done = python("setup.py", "--version", cwd=source, CXX="g++-that-is-nowhere", FLASHPAIR_PURE_PYTHON="1")
    assert done.stdout.strip() == flashpair.__version__


def test_import_is_light():
    code = (
        "import sys, torch; before = set(sys.modules); import flashpair; new = set(sys.modules) - before;"
        "assert not new & {'triton', 'flashpair._C'}, new; assert not torch.cuda.is_initialized()"
    )
    python("-c", code, cwd=ROOT)
