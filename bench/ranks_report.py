"""The table of bench/ranks.py, from its JSON alone."""

from __future__ import annotations

from . import machine
from .options import Options
from .report import BUSY, Document
from .units import duration, size

HEAD = ("loss", "", "median", "rows a second", "speedup", "of processor time", "memory", "sent", "by formula")


def markdown(document: Document) -> str:
    options = Options.of(document["options"])
    lines = ["| " + " | ".join(HEAD) + " |", "|---|---|" + "---:|" * (len(HEAD) - 2)]
    for case in document["cases"]:
        shown = f"`{case['shown']}`"
        for name, r in case["variants"].items():
            by = r["sent"].get("formula")
            enough = r["processes"] <= document["machine"]["cores"]
            times = [duration(r["seconds"]["median"]), f"{r['throughput']:,.0f}", f"{r['speedup']:.2f}x"]
            cells = [
                shown, name, *(times if enough else ["few cores", "", ""]), f"{r['processor_speedup']:.2f}x",
                size(r["memory"]["peak_extra"]), size(r["sent"]["bytes"]) if r["processes"] > 1 else "",
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
