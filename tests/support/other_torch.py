"""Another torch beside the environment's own, on a machine without a GPU: `python other_torch.py VERSION FOLDER`.

PyPI's wheels of torch for x86-64 are CUDA's. One imports over libraries of the names that it links in which every
function says that there is no device, so that the gigabytes of the real ones need not be there. Then, for instance:

    PYTHONPATH=FOLDER python -m pytest tests/losses/test_losses_compiled.py

The Triton that the wheel asks for goes beside it. Everything else (numpy, sympy, ...) is the environment's own.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path

NVIDIA = r"lib(cu\w*|nccl|nv\w*)\.so\.\d+"
NO_DEVICE = 100  # cudaErrorNoDevice, CUDA_ERROR_NO_DEVICE


def needed(library: Path) -> set[tuple[str, str]]:
    """The NVIDIA libraries that it links, each with a version of symbols that it asks of it ("" for none)."""
    words = subprocess.check_output(["readelf", "--wide", "-d", "-V", library], text=True)
    found, name = {(name, "") for name in re.findall(r"\(NEEDED\).*\[(.+)\]", words)}, ""
    for line in words.splitlines():
        if file := re.search(r"Version: \d+ +File: (\S+)", line):
            name = file[1]
        elif version := re.search(r" Name: (\S+) +Flags", line):
            found.add((name, version[1]))
    return {(name, version) for name, version in found if re.fullmatch(NVIDIA, name)}


def missing(library: Path) -> set[tuple[str, str]]:
    """The functions of NVIDIA's libraries that it calls, with the versions that it asks for."""
    words = subprocess.check_output(["nm", "-D", "--undefined-only", "--with-symbol-versions", library], text=True)
    return set(re.findall(r" U ((?:__)?(?:cu|nccl|nv)\w*)(?:@(\S+))?", words))


def stand_in(name: str, versions: set[str], functions: set[tuple[str, str]], folder: Path) -> None:
    """A library in which each of the functions that have one of the versions returns NO_DEVICE."""
    own = {version: sorted(f for f, of in functions if of == version) for version in sorted(versions)}
    with tempfile.TemporaryDirectory() as place:
        source, script = Path(place) / "all.c", Path(place) / "versions"
        source.write_text("".join(f"long {f}(void) {{ return {NO_DEVICE}; }}\n" for fs in own.values() for f in fs))
        script.write_text("".join(f"{v} {{ {' '.join(f'{f};' for f in fs)} }};\n" for v, fs in own.items() if v))
        command = ["cc", "-shared", "-fPIC", "-w", "-fno-builtin", f"-Wl,-soname,{name}"]
        command += [f"-Wl,--version-script,{script}"] if versions - {""} else []
        subprocess.run([*command, "-o", folder / name, source], check=True)


def main(version: str, folder: Path) -> None:
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder)]
    subprocess.run([*pip, f"torch=={version}"], check=True)
    wanted = (folder / f"torch-{version}.dist-info/METADATA").read_text()
    if triton := re.search(r"Requires-Dist: (triton==[\d.]+)", wanted):
        subprocess.run([*pip, triton[1]], check=True)
    libraries = folder / "torch/lib"
    own = list(libraries.glob("*.so*"))
    asked = {one for path in own for one in needed(path)}
    functions = {function for path in own for function in missing(path)}
    for name in sorted({name for name, _ in asked}):
        stand_in(name, {version for of, version in asked if of == name}, functions, libraries)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
