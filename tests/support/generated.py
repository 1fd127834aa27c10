"""What is made from the losses' declarations: `python tests/support/generated.py` writes it, a test says if it is old.

The lists of names, `flashpair.functional`, the tables of the pages and the papers of CITATION.cff.
"""

from __future__ import annotations

import inspect
import json
import pkgutil
import re
import subprocess
import sys
from collections.abc import Callable, Iterable
from importlib import import_module
from pathlib import Path

import flashpair.losses
from flashpair.losses import papers
from flashpair.losses.declaration import GROUPS, REGISTRY, Declaration

ROOT = Path(__file__).resolve().parents[2]
SHARED = ("base", "class_loss")  # modules whose names are exported beside the losses'
SHARED_NAMES = {"base": ("Criterion", "RowLosses", "Terms"), "class_loss": ("ClassCriterion",)}
WIDTH = 118  # of a line of a page's list


def declarations() -> list[Declaration]:
    """Every loss of the package, by its class's name. Modules that nothing imports yet are among them."""
    for module in pkgutil.iter_modules(flashpair.losses.__path__):
        import_module(f"flashpair.losses.{module.name}")
    own = (d for d in REGISTRY.values() if d.kind.__module__.startswith("flashpair.losses."))
    return sorted(own, key=lambda d: d.name.lower())


def of_group(group: str) -> list[Declaration]:
    """The losses of a group."""
    return [d for d in declarations() if d.group == group]


def losses_init(_: str) -> str:
    """python/flashpair/losses/__init__.py."""
    names = {module: list(exported) for module, exported in SHARED_NAMES.items()}
    for d in declarations():
        names.setdefault(d.kind.__module__.rpartition(".")[2], []).append(d.name)
    imports = "".join(f"from .{module} import {', '.join(sorted(names[module]))}\n" for module in sorted(names))
    every = sorted(name for exported in names.values() for name in exported)
    text = ",\n    ".join(f'"{name}"' for name in every)
    return (
        '"""Losses, one small file for each family. Made by tests/support/generated.py."""\n\n'
        f"{imports}\n__all__ = [\n    {text},\n]\n"
    )


def functional(_: str) -> str:
    """python/flashpair/functional.py."""
    head = (
        '"""The losses of pairs as functions, with the arguments and defaults of their classes, for code that keeps\n'
        "its own hyper-parameters. Their docstrings are made from the classes'. Made by tests/support/generated.py.\n"
        '"""\n\nfrom __future__ import annotations\n\n'
        "from collections.abc import Callable\nfrom typing import Any\n\nfrom torch import Tensor\n\n"
        "from . import losses\nfrom .losses.function_docstrings import describe as _describe\n"
        "from .losses.function_docstrings import old_name as _old_name\n\n\n"
    )
    made = [d for d in declarations() if d.function]
    body = "\n\n".join(map(_function, made))
    kinds = "".join(f"    {d.function}: losses.{d.name},\n" for d in made)
    tail = (
        f"\n\n_KINDS: dict[Callable[..., Tensor], type[losses.Criterion]] = {{\n{kinds}}}\n"
        "for _function, _kind in _KINDS.items():\n    _describe(_function, _kind)\n\n\n"
        "def __getattr__(name: str) -> Any:\n    return globals()[_old_name(name)]\n"
    )
    return head + body + tail


def _function(d: Declaration) -> str:
    parameters = [p for p in inspect.signature(d.kind).parameters.values()]
    place = [p for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    keyword = [p for p in parameters if p.kind is p.KEYWORD_ONLY]
    refs = ["ref_emb: Tensor | None = None", "ref_labels: Tensor | None = None"] if d.kind.takes_references else []
    lines = [
        "embeddings: Tensor", "labels: Tensor", *map(_parameter, place), "*", *refs, *map(_parameter, keyword)
    ]  # fmt: skip
    made = ", ".join([*(p.name for p in place), *(f"{p.name}={p.name}" for p in keyword)])
    called = "embeddings, labels, ref_emb=ref_emb, ref_labels=ref_labels" if refs else "embeddings, labels"
    return (
        f"def {d.function}(\n    " + ",\n    ".join(lines) + ",\n) -> Tensor:\n"
        f'    """`{d.name}` of embeddings (N, D) and labels (N,)."""\n'
        f"    criterion = losses.{d.name}({made})\n    loss: Tensor = criterion({called})\n    return loss\n"
    )


def _parameter(p: inspect.Parameter) -> str:
    default = json.dumps(p.default) if isinstance(p.default, str) else repr(p.default)
    return f"{p.name}: {p.annotation} = {default}"


def between(text: str, made: str, name: str = "losses") -> str:
    """`text` with what stands between its two marks replaced."""
    begin, end = f"<!-- {name}: made by tests/support/generated.py -->\n", f"<!-- {name}: end -->\n"
    return re.sub(
        re.escape(begin) + ".*?" + re.escape(end), lambda _: f"{begin}\n{made.strip()}\n\n{end}", text, flags=re.DOTALL
    )


def readme(text: str) -> str:
    """README.md's list by name."""
    parts = []
    for group, heading in GROUPS.items():
        words = [*f"- **{heading}**:".split(" "), *(f"`{d.name}`," for d in of_group(group))]
        parts.append("\n".join(_wrapped(words)).rstrip(","))
    return between(text, "\n".join(parts))


def _wrapped(words: Iterable[str]) -> list[str]:
    lines = [""]
    for word in words:
        if lines[-1] and len(lines[-1]) + 1 + len(word) > WIDTH:
            lines.append(" ")
        lines[-1] = f"{lines[-1]} {word}" if lines[-1] else word
    return lines


def losses_page(text: str) -> str:
    """docs/losses.md's tables."""
    for group in GROUPS:
        rows = ["| criterion | paper | reduction |", "|---|---|---|"]
        for d in of_group(group):
            arguments = ", ".join([*(["..."] if group == "classes" else []), *d.arguments])
            reduction = "" if d.reduction == "mean" else f"`{d.reduction}` "
            rows.append(f"| [`{d.name}`](api/losses.md#flashpair.{d.name})`({arguments})` | {d.source} | {reduction}|")
        text = between(text, "\n".join(rows), group)
    return text


def api_losses(text: str) -> str:
    """docs/api/losses.md's entries."""
    parts = []
    for group, heading in GROUPS.items():
        parts.append(f"## {heading}")
        parts += [f"::: flashpair.{d.name}" for d in of_group(group)]
    return between(text, "\n\n".join(parts))


def api_functional(text: str) -> str:
    """docs/api/functional.md's entries."""
    names = [d.function for d in declarations() if d.function]
    return between(text, "\n\n".join(f"::: flashpair.functional.{name}" for name in names))


def citation(text: str) -> str:
    """CITATION.cff's references: the papers of papers.py, and those that a loss's own module has."""
    known = [p for p in vars(papers).values() if isinstance(p, papers.Paper)]
    known += [s.paper for d in declarations() for s in d.sources]
    made = "".join(map(_reference, dict.fromkeys(known)))
    return text.partition("references:\n")[0] + "references:\n" + made


def _reference(paper: papers.Paper) -> str:
    lines = [f"  - type: {'conference-paper' if paper.venue else 'article'}", f"    title: {json.dumps(paper.title)}"]
    lines.append("    authors:")
    for author in paper.authors:
        family, given = (json.dumps(part.strip(), ensure_ascii=False) for part in author.split(",", 1))
        lines.append(f"      - {{ family-names: {family}, given-names: {given} }}")
    lines.append(f"    year: {paper.year}")
    if paper.venue:
        lines.append(f"    collection-title: {json.dumps(paper.venue, ensure_ascii=False)}")
    if paper.arxiv:
        lines += ["    identifiers:", f'      - {{ type: other, value: "arXiv:{paper.arxiv}" }}']
    return "\n".join(lines) + "\n"


FILES: dict[str, Callable[[str], str]] = {
    "python/flashpair/losses/__init__.py": losses_init,
    "python/flashpair/functional.py": functional,
    "README.md": readme,
    "docs/losses.md": losses_page,
    "docs/api/losses.md": api_losses,
    "docs/api/functional.md": api_functional,
    "CITATION.cff": citation,
}


def made(name: str, root: Path = ROOT) -> str:
    """What the file is to be; Python as ruff formats it."""
    path = root / name
    text = FILES[name](path.read_text(encoding="utf-8"))
    if path.suffix != ".py":
        return text
    command = [sys.executable, "-m", "ruff", "format", "--stdin-filename", str(path), "-"]
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=True, cwd=root)
    return done.stdout


def main() -> None:
    for name in FILES:
        path, text = ROOT / name, made(name)
        if path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")
            print(name)


if __name__ == "__main__":
    main()
