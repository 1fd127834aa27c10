"""The table of ranks.py, from its JSON alone."""

from __future__ import annotations

from ..harness import machine
from ..harness.options import Options
from ..harness.report import BUSY, Document
from ..harness.units import duration, size
from .traffic import PASSES

COUNTED = (
    "processes",
    "loss",
    "schedule",
    "traffic",
    "by formula",
    "pairs a pass",
    "by formula",
    "chunks",
    "memory",
    "rows",
)
HEAD = ("loss", "", "median", "rows a second", "speedup", "of processor time", "memory", "traffic", "by formula")


def markdown(document: Document) -> str:
    options = Options.of(document["options"])
    lines = ["| " + " | ".join(HEAD) + " |", "|---|---|" + "---:|" * (len(HEAD) - 2)]
    for case in document["cases"]:
        shown = f"`{case['shown']}`"
        for name, r in case["variants"].items():
            by = r["traffic"].get("formula")
            enough = r["processes"] <= document["machine"]["cores"]
            times = [duration(r["seconds"]["median"]), f"{r['throughput']:,.0f}", f"{r['speedup']:.2f}x"]
            cells = [
                shown, name, *(times if enough else ["few cores", "", ""]), f"{r['processor_speedup']:.2f}x",
                size(r["memory"]["peak_extra"]), size(r["traffic"]["bytes"]) if r["processes"] > 1 else "",
                "" if by is None else size(by),
            ]  # fmt: skip
            lines.append("| " + " | ".join(cells) + " |")
            shown = ""
    n, d = options.sizes[0], options.dims[0]
    told = [
        f"One training step of a global batch, N = {n:,}, D = {d}, {options.per_class} a class, {options.data} data, "
        f"{options.dtype}; one core and one thread a process. Median of the slowest process; speedup over one process "
        "with the whole batch in the same rounds, and the same of the processor's time of the process that used most, "
        "which waits for nobody; peak memory of a process beyond inputs, and bytes that it sends. "
        f"{machine.words(document['machine'], 1)}."
    ]
    busy = max((case["cores_used_by_others"] or 0.0 for case in document["cases"]), default=0.0)
    if busy > BUSY:
        told.append(f"Times are doubtful: other processes kept up to {busy:.1f} cores busy.")
    return "\n".join(lines) + "\n\n" + "\n\n".join(told)


def counts(document: Document) -> str:
    """What was counted, beside docs/scaling.md's formulas."""
    options = Options.of(document["options"])
    lines = ["| " + " | ".join(COUNTED) + " |", "|---:|---|---|" + "---:|" * (len(COUNTED) - 3)]
    rows = [
        (r["processes"], case, r) for case in document["cases"] for r in case["variants"].values() if r["processes"] > 1
    ]
    for world, case, r in sorted(rows, key=lambda row: row[0]):
        each, traffic = case["n"] / world, r["traffic"]
        passes = sum(map(len, PASSES[case["loss"]]))
        cells = [
            str(world), f"`{case['shown']}`", r["how"], f"{traffic['bytes']:,}", f"{traffic['formula']:,.0f}",
            f"{sum(traffic['pairs'].values()) / passes:,.0f}", f"{each * case['n'] / 2:,.0f}",
            str(sum(traffic["chunks"].values())), size(r["memory"]["peak_extra"]),
            size(each * case["d"] * options.torch_dtype.itemsize),
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    n, d = options.sizes[0], options.dims[0]
    told = (
        f"One step, N = {n:,}, D = {d}, {options.dtype}. Bytes that a process sends; pairs that a pass "
        "over the references meets, counted once for both their ends; chunks of all passes; the peak of a process's "
        "memory beyond inputs, tile buffers included; one copy of its rows."
    )
    return "\n".join(lines) + "\n\n" + told
