"""A run as JSON, as a table on the terminal and as Markdown. Tables are made from the JSON alone."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from . import machine
from .options import GEMM_BOUNDS, Options, label
from .units import duration, size, span

Document = dict[str, Any]
GROWN = 1024  # below this N, constant costs hide the growth
BUSY = 0.2  # cores that other processes may use before times are doubtful
NARROWEST = 124  # with fewer columns rich would cut numbers off


def stamp(document: Document) -> str:
    """The time of a run, in the form of file names."""
    return document["machine"]["date"][:19].replace(":", "").replace("-", "").replace("T", "-")


def stem(document: Document) -> str:
    o = document["options"]
    against = "" if o["ref"] is None else f"-ref{o['ref']}"
    where = "-cuda" if o.get("device") == "cuda" else ""
    where += "" if o.get("phase", "step") == "step" else f"-{o['phase']}"
    return f"{o['loss']}-{document.get('kind', o['data'])}-{o['dtype']}{against}{where}-{stamp(document)}"


def write(document: Document, folder: Path) -> Path:
    return save(document, folder / f"{stem(document)}.json")


def save(document: Document, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1) + "\n")
    return path


def read(path: Path) -> Document:
    return json.loads(path.read_text())


def is_sweep(document: Document) -> bool:
    """Whether its cases differ in the share of live pairs (live_pairs.py), not in size alone."""
    return document.get("kind") == "live_pairs"


def variants_of(document: Document) -> list[str]:
    names: dict[str, None] = {}
    for case in document["cases"]:
        names.update(dict.fromkeys(case["variants"]))
    return list(names)


def percent(fraction: float) -> str:
    return f"{100 * fraction:.3g} %" if fraction < 9.995 else f"{100 * fraction:,.0f} %"


def growth(document: Document, variant: str, d: int) -> dict[str, float]:
    """Exponents by which time and peak memory grow with N, between the two largest sizes that ran."""
    ran = [
        (c["n"], c["variants"][variant])
        for c in document["cases"]
        if c["d"] == d and c["variants"].get(variant, {}).get("status") == "ok"
    ]
    if len(ran) < 2 or ran[-2][0] == ran[-1][0]:
        return {}
    (n0, a), (n1, b) = ran[-2:]
    pairs = {"time": (a["seconds"]["median"], b["seconds"]["median"])}
    if "memory" in a and "memory" in b:
        pairs["memory"] = (a["memory"]["peak_extra"], b["memory"]["peak_extra"])
    return {k: math.log(v / u) / math.log(n1 / n0) for k, (u, v) in pairs.items() if u > 0 and v > 0}


def _live(case: dict[str, Any]) -> str:
    """The share of negatives that mining keeps; empty for a loss without mining."""
    share = case["live_share_of_negatives"]
    return "" if share is None else percent(share)


def print_table(document: Document, console: Console | None = None) -> None:
    console = console or Console()
    console.width = max(console.width, NARROWEST)
    options = Options.of(document["options"])
    table = Table(title=options.title, title_justify="left", pad_edge=False)
    table.add_column("N", justify="right", no_wrap=True)
    table.add_column("D", justify="right", no_wrap=True)
    table.add_column("live pairs", justify="right", no_wrap=True)
    table.add_column("variant")
    for name in ("median", "quartiles", "of GEMM bound", "memory", "/ (N+M) D", "error"):
        table.add_column(name, justify="right", no_wrap=True)
    for case in document["cases"]:
        for row, (variant, r) in enumerate(case["variants"].items()):
            place = [f"{case['n']:,}", str(case["d"]), _live(case)] if row == 0 else ["", "", ""]
            style = "bold" if variant == "flashpair" else None
            if r["status"] != "ok":
                since = f" since N = {r['since_n']:,}" if r.get("since_n") else ""
                table.add_row(*place, f"{escape(label(variant))}: [yellow]{escape(r['words'] + since)}[/]")
                continue
            t, m = r["seconds"], r.get("memory")
            table.add_row(
                *place, escape(label(variant)), duration(t["median"]), span(t["q1"], t["q3"]),
                percent(r["fraction_of_gemm_bound"]) if "fraction_of_gemm_bound" in r else "",
                size(m["peak_extra"]) if m else "", f"{m['over_linear']:.3g}x" if m else "",
                f"{r['check']['gradient_error']:.0e}" if "check" in r else "", style=style,
            )  # fmt: skip
        table.add_section()
    console.print(table)
    console.print(machine.words(document["machine"], options.threads, options.device == "cuda"), highlight=False)
    busy = max((c["cores_used_by_others"] or 0.0 for c in document["cases"]), default=0.0)
    if busy > BUSY:
        console.print(f"[yellow]Times are doubtful: other processes kept up to {busy:.1f} cores busy[/]")
    for d in options.dims:
        for variant in variants_of(document):
            grows = growth(document, variant, d)
            if "memory" in grows and options.sizes[-1] >= GROWN:
                said = f"time grows as N^{grows['time']:.2f}, memory as N^{grows['memory']:.2f}"
                console.print(f"{variant}, D = {d}: {said}", highlight=False, markup=False)


def _cell(record: dict[str, Any] | None, share: bool) -> str:
    if record is None:
        return ""
    if record["status"] != "ok":
        return {"not_there": "not there", "wrong": "wrong"}.get(record["status"], record["words"])
    parts = [duration(record["seconds"]["median"])]
    if share and "fraction_of_gemm_bound" in record:
        parts[0] += f" ({percent(record['fraction_of_gemm_bound'])})"
    if "memory" in record:
        parts.append(size(record["memory"]["peak_extra"]))
    return ", ".join(parts)


def markdown(document: Document) -> str:
    """One row a size (or share of live pairs), one column a variant: median time, peak memory."""
    options = Options.of(document["options"])
    names = [v for v in variants_of(document) if v not in GEMM_BOUNDS]
    names += [v for v in variants_of(document) if v not in names]
    many = len(options.dims) > 1
    head = ["N", *(["D"] if many else []), *(["live pairs"] if is_sweep(document) else []), *map(label, names)]
    lines = ["| " + " | ".join(head) + " |", "|" + "---:|" * len(head)]
    for case in document["cases"]:
        cells = [_cell(case["variants"].get(v), v == "flashpair") for v in names]
        place = [f"{case['n']:,}", *([str(case["d"])] if many else [])]
        place += [_live(case)] if is_sweep(document) else []
        lines.append("| " + " | ".join([*place, *cells]) + " |")
    width = "" if many else f", D = {options.dims[0]}"
    what = "Median time (share of the GEMM bound's speed), peak memory beyond inputs and gradient."
    note = f"{options.title}{width}. {what}"
    return "\n".join(
        [*lines, "", f"{note} {machine.words(document['machine'], options.threads, options.device == 'cuda')}."]
    )
