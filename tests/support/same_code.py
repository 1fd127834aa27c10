"""Whether a change to the kernels' source has changed what they are compiled to: for a rewrite that should not.

    python tests/support/same_code.py write FILE [--ptx] [ARCH ...]          before, and after, the change
    python tests/support/same_code.py compare BEFORE AFTER [NAMES]

The engine runs on CPU tensors over support/aot.py's chip, and what it would launch is compiled to Triton's own code, or
to PTX. Kept is what a name, a place in the source or a comment cannot change: arguments by their names, all other
values numbered in the order in which they are met. NAMES, where a change renames: {"old kernel": ["new kernel", {"old
argument": "new argument"}]}, an argument's name standing for the fields under it too. Not under TRITON_INTERPRET.
"""

from __future__ import annotations

import argparse
import difflib
import hashlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

os.environ["TRITON_DISABLE_LINE_INFO"] = "1"  # which would be in the PTX

import aot
import torch
from flashpair.backends.triton.kernels import configs
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import ASTSource, make_backend
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from flashpair.backends.triton import fused, screened, tiled

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
# loss, dtype, D, with references of their own, distance, schedule, N, whether references end early
Names = dict[str, tuple[str, dict[str, str]]]
CASES = [
    ("mined", BF16, 128, False, "dot", fused, 64, False),
    ("mined", BF16, 300, True, "dot", fused, 64, True),
    ("logsumexps", BF16, 128, True, "euclidean", fused, 64, False),
    ("learned", F32, 128, False, "dot", fused, 64, False),
    ("lifted", F32, 33, False, "dot", fused, 64, True),
    ("programs", F32, 64, False, "squared_euclidean", fused, 64, False),
    ("learned", F64, 40, True, "dot", fused, 64, False),
    ("mined", F16, 64, False, "euclidean", fused, 64, True),
    ("mined", BF16, 768, False, "dot", tiled, 130, False),
    ("logsumexps", F32, 300, True, "euclidean", tiled, 130, True),
    ("learned", F64, 40, False, "squared_euclidean", tiled, 130, False),
    ("lifted", F16, 64, True, "dot", tiled, 130, False),
    ("mined", BF16, 128, False, "dot", screened, 256, False),
    ("hinges", F32, 300, True, "euclidean", screened, 256, True),
    ("learned", F64, 40, False, "dot", screened, 256, False),
    ("lifted", BF16, 64, True, "dot", screened, 256, False),
]


def flatten(kinds: Any, values: Any, name: str = "") -> Iterator[str]:
    """The names of what a compiled kernel takes, in order, as they are written in the source."""
    for k, (kind, value) in enumerate(zip(kinds, values, strict=True)):
        own = f"{name}{getattr(values, '_fields', range(len(values)))[k]}"
        if isinstance(kind, tuple):
            yield from flatten(kind, value, f"{own}.")
        elif kind != "constexpr":
            yield own


def numbered(text: str, pattern: str) -> str:
    """Each name that the pattern finds, by its number among those of its kind (the pattern's group)."""
    names, counts = dict[str, str](), dict[str, int]()

    def number(found: re.Match[str]) -> str:
        if found[0] not in names:
            counts[found[1]] = counts.get(found[1], -1) + 1
            names[found[0]] = f"%{found[1]}{counts[found[1]]}"
        return names[found[0]]

    return re.sub(pattern, number, text)


def values_numbered(lines: list[str], known: dict[str, str]) -> str:
    """Triton's code with each value by the number of its definition: a name may be another value in another region."""
    names, count = dict(known), 0

    def number(found: re.Match[str]) -> str:
        nonlocal count
        name, defined = found[1], found[2]
        if defined or name not in names:
            names[name] = f"%{count}"
            count += 1
        return f"{names[name]}{defined or ''}"

    pattern = r"(%[\w.$-]+)((?::\d+)? =(?!=)|(?<=\w): )?"
    return "\n".join(re.sub(pattern, number, line) for line in lines)


def plain_ttir(text: str, arguments: list[str]) -> str:
    lines = [re.sub(r" loc\(.*?\)", "", line) for line in text.splitlines() if not line.startswith("#loc")]
    head = next(k for k, line in enumerate(lines) if "tt.func public" in line)
    found = re.findall(r"(%[\w.$-]+): ([^\s,()]+)( \{[^}]*\})?", lines[head])
    if len(found) != len(arguments):
        raise ValueError(f"{len(arguments)} arguments, and {lines[head]}")
    known = {value: f"%<{name}>" for (value, _, _), name in zip(found, arguments, strict=True)}
    body = lines[head + 1 :]
    # Where a constant stands is chance: it is written where it is used.
    for line in body:
        if constant := re.fullmatch(r"\s*(%[\w.$-]+) = arith\.constant (.*)", line):
            known[constant[1]] = f"[{constant[2]}]"
    body = [line for line in body if " = arith.constant " not in line]
    kinds = sorted(f"{known[value]}: {kind}{facts}" for value, kind, facts in found)
    return "\n".join(kinds) + "\n" + values_numbered(body, known)


def plain_ptx(text: str, arguments: list[str]) -> str:
    lines = [line.partition("//")[0].strip() for line in text[text.index(".entry") :].splitlines()]
    body = "\n".join(line for line in lines if line and not line.startswith((".param", ".loc", ".file")))
    name = re.search(r"\.entry (\w+)", body)[1]  # type: ignore[index]
    named = [*arguments, "scratch.0", "scratch.1", "scratch.2"]
    body = re.sub(rf"\b{name}_param_(\d+)", lambda found: f"<{named[int(found[1])]}>", body).replace(name, "kernel")
    # Where a parameter is read follows the order of parameters: a register that holds one has its name.
    read = re.compile(r"ld\.param\.\w+ \s*(%\w+), \[(<[^>]*>)\];")
    held = {found[1]: f"{{{found[2]}}}" for found in read.finditer(body)}
    body = "\n".join(line for line in body.splitlines() if not read.fullmatch(line))
    body = re.sub(r"%\w+", lambda found: held.get(found[0], found[0]), body)
    return numbered(numbered(body, r"(\$L\w*?__?BB|\$L__tmp|\$L\w*?)\d+(?:_\d+)?"), r"%(r|rd|p|f|fd|rs|h|b|hh)\d+")


def compiled(src: Any, arch: str, options: Any, ptx: bool) -> str:
    """What the stages of the compiler make of it, into no cache."""
    from triton._C.libtriton import ir

    target = GPUTarget("cuda", int(arch), 32)
    backend = make_backend(target)
    options = backend.parse_options(dict(options.__dict__))
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    code = (target, options, backend.get_codegen_implementation(options), backend.get_module_map(), context)
    module: Any = src.make_ir(*code)
    stages: dict[str, Any] = {}
    backend.add_stages(stages, options, src.language)
    metadata: dict[str, Any] = {"hash": "", "target": target, **options.__dict__}
    for stage in ("ttir", "ttgir", "llir", "ptx") if ptx else ("ttir",):
        module = stages[stage](module, metadata)
    return str(module)


def write(arch: str, ptx: bool, some: str) -> dict[str, dict[str, str]]:
    """For each case its kernels' code, by the kernel's name and a number."""
    report: dict[str, dict[str, str]] = {}
    seen: set[str] = set()
    case, values = "", tuple[Any, ...]()
    run = JITFunction.run

    def remember(kernel: Any, *args: Any, **more: Any) -> Any:
        nonlocal values
        values = args
        return run(kernel, *args, **more)

    def compile_one(
        kernel: Any, key: Any, signature: Any, device: Any, constants: Any, options: Any, attrs: Any, *_: Any
    ) -> None:
        marker = f"{kernel.__name__} {key} {case.split()[0]}"
        if marker in seen:
            return
        seen.add(marker)
        kinds = [signature[name] for name in kernel.arg_names]
        args = [*values, *[None] * (len(kinds) - len(values))]
        names = kernel.arg_names
        flat = [
            f"{names[int(name.partition('.')[0])]}{name[len(name.partition('.')[0]) :]}"
            for name in flatten(kinds, args)
        ]
        text = compiled(ASTSource(kernel, signature, constants, attrs), arch, options, ptx)
        plain = (plain_ptx if ptx else plain_ttir)(text, flat)
        number = sum(name.startswith(f"{kernel.__name__} ") for name in report[case])
        report[case][f"{kernel.__name__} {number}"] = plain

    family = aot.FAMILIES[arch]
    problem = aot.problem
    driver.set_active(aot.Chip(arch, 0))
    patches = [
        mock.patch.object(JITFunction, "run", remember),
        mock.patch.object(JITFunction, "_do_compile", compile_one),
        mock.patch.object(configs, "family", lambda device: family),
        mock.patch.object(tiled, "BLOCK", 64),
    ]
    for patch in patches:
        patch.start()
    for loss, dtype, d, references, distance, schedule, n, ended in CASES:
        case = f"sm_{arch} {schedule.__name__.rpartition('.')[2]} {loss} {dtype} D={d} {references} {distance}"
        if some and not re.search(some, case):
            continue
        report[case] = {}
        end = torch.tensor(n - 3) if ended else None
        with mock.patch.object(aot, "problem", lambda *of, end=end: problem(*of)._replace(end=end)):
            aot.compile_step(loss, dtype, d, references, distance, schedule, n)
    for patch in patches:
        patch.stop()
    return report


def renamed(text: str, names: dict[str, str], groups: bool = True) -> str:
    """Arguments, or all those of a group, by their new names."""

    def rename(found: re.Match[str]) -> str:
        name = found[1]
        for old in (name, *(name[:k] for k, letter in reversed(list(enumerate(name))) if groups and letter == ".")):
            if old in names:
                return f"<{names[old]}{name[len(old) :]}>"
        return found[0]

    return re.sub(r"<(\w[\w.]*)>", rename, text)


def lines(text: str) -> list[str]:
    """The argument lines of Triton's code in alphabetical order, then the rest."""
    first = [line for line in text.splitlines() if line.startswith("%<")]
    return [*sorted(first), *(line for line in text.splitlines() if not line.startswith("%<"))]


def compare(before: dict[str, Any], after: dict[str, Any], names: Names, show: int) -> int:
    """Prints, for each kernel, how many are the same and how the first others differ; -> how many do."""
    same: dict[str, int] = {}
    others: dict[str, list[str]] = {}
    for case, kernels in before.items():
        wanted = []
        for key, code in kernels.items():
            old = key.split()[0]
            new, arguments = names.get(old, (old, {}))
            wanted.append((new, lines(renamed(code, arguments))))
        again = {new: arguments for new, arguments in names.values()}
        left = [
            (name := key.split()[0], lines(renamed(code, again.get(name, {}), False)))
            for key, code in after[case].items()
        ]
        for one in list(wanted):
            if one in left:
                left.remove(one)
                wanted.remove(one)
                same[one[0]] = same.get(one[0], 0) + 1
        for name, code in wanted:
            near = [other for of, other in left if of == name]
            if near:
                best = max(near, key=lambda other: difflib.SequenceMatcher(None, code[:200], other[:200]).quick_ratio())
                left.remove((name, best))
                diff = list(difflib.unified_diff(code, best, "before", "after", lineterm="", n=1))
                words = f"{len(code)} lines, {len(best)} after, {len(diff)} of difference"
            else:
                diff, words = [], "missing after"
            others.setdefault(name, []).append("\n".join([f"{case}: {words}", *diff[:show]]))
        for name, _ in left:
            others.setdefault(name, []).append(f"{case}: not there before")
    for name in sorted({*same, *others}):
        print(f"{name}: {same.get(name, 0)} the same, {len(others.get(name, []))} not")
    for name, found in others.items():
        print(f"--- {name}")
        print("\n".join(found))
    return sum(map(len, others.values()))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("action", choices=("write", "compare"))
    parser.add_argument("words", nargs="+")
    parser.add_argument("--ptx", action="store_true")
    parser.add_argument("--some", default="", help="an expression that the cases' names are to match")
    parser.add_argument("--show", type=int, default=20)
    args = parser.parse_args()
    if args.action == "write":
        path, *archs = args.words
        report = {}
        for arch in archs or ("90",):
            report |= write(arch, args.ptx, args.some)
        Path(path).write_text(json.dumps(report, indent=0))
        total = sum(map(len, report.values()))
        digest = hashlib.sha256(Path(path).read_bytes()).hexdigest()[:12]
        print(f"{total} kernels, {digest}")
        return 0
    before, after, *names = (json.loads(Path(path).read_text()) for path in args.words)
    return min(1, compare(before, after, names[0] if names else {}, args.show))


if __name__ == "__main__":
    raise SystemExit(main())
