"""The table of family.py, from its JSON alone."""

from __future__ import annotations

from typing import Any

from ..harness import machine
from ..harness.options import Options
from ..harness.report import BUSY, Document, percent
from ..harness.units import duration, size

OURS, REFERENCE, BASELINE = "flashpair", "reference", "pytorch-metric-learning"
HEAD = ("loss", "time", "memory", "reference", "its memory", BASELINE, "its memory", "of the GEMM bound's speed")
MANY = 1e4  # from so many classes on a process is mostly weights
SHORT = {"wrong": "wrong", "not_there": "not there", "failed": "failed"}


def times(ratio: float) -> str:
    return f"{ratio:,.0f}x" if ratio >= 99.5 else f"{ratio:.3g}x"


def _words(record: dict[str, Any]) -> str:
    """The reason for a missing time."""
    return SHORT.get(record["status"], record["words"])


def _ours(record: dict[str, Any], key: str) -> tuple[str, str]:
    if record["status"] != "ok":
        return _words(record), ""
    memory = record.get("memory", {}).get(key)
    return duration(record["seconds"]["median"]), "" if memory is None else size(memory)


def _against(ours: dict[str, Any], theirs: dict[str, Any] | None, key: str, mark: str = "") -> tuple[str, str]:
    """The other's median and memory as multiples of ours; if ours has none, in their own units."""
    if theirs is None:
        return "", ""
    if theirs["status"] != "ok":
        return _words(theirs), ""
    seconds, memory = theirs["seconds"]["median"], theirs.get("memory", {}).get(key)
    if ours["status"] != "ok":
        return duration(seconds) + mark, "" if memory is None else size(memory)
    some = memory is not None and ours.get("memory", {}).get(key)
    return times(seconds / ours["seconds"]["median"]) + mark, times(memory / some) if some else ""


def markdown(document: Document) -> str:
    """One row for each loss: ours, then the others as multiples of ours."""
    options = Options.of(document["options"])
    whole = document["num_classes"] >= MANY and all(case["class_weights"] for case in document["cases"])
    key = "process_peak" if whole else "peak_extra"
    lines = ["| " + " | ".join(HEAD) + " |", "|---|" + "---:|" * (len(HEAD) - 1)]
    notes: dict[str, str] = {}
    wrong = []
    for case in document["cases"]:
        records = case["variants"]
        ours, baseline = records[OURS], records.get(BASELINE)
        mark = ""
        if baseline is not None and "differs" in baseline:
            mark = notes.setdefault(baseline["differs"], "*" * (len(notes) + 1))
            mark = mark.replace("*", "\\*")
        cells = [*_ours(ours, key), *_against(ours, records.get(REFERENCE), key), *_against(ours, baseline, key, mark)]
        cells.append(percent(ours["fraction_of_gemm_bound"]) if "fraction_of_gemm_bound" in ours else "")
        lines.append("| " + " | ".join([f"`{case['shown']}`", *cells]) + " |")
        wrong += [f"{case['shown']}, {name}: {r['words']}" for name, r in records.items() if r["status"] == "wrong"]
    notes_below = [_told(document, options, whole), *_later(document)]
    notes_below += [f"{mark.replace('*', chr(92) + '*')} Its result differs: {why}." for why, mark in notes.items()]
    notes_below += [f"Not timed, {words}." for words in wrong]
    busy = max((case["cores_used_by_others"] or 0.0 for case in document["cases"]), default=0.0)
    if busy > BUSY:
        notes_below.append(f"Times are doubtful: other processes kept up to {busy:.1f} cores busy.")
    return "\n".join(lines) + "\n\n" + "\n\n".join(notes_below)


def _later(document: Document) -> list[str]:
    """A note on rows of another run; the case of such a row has its own machine."""
    dates: dict[str, list[str]] = {}
    for case in document["cases"]:
        if "machine" in case:
            dates.setdefault(case["machine"]["date"][:10], []).append(f"`{case['shown']}`")
    return [f"Of a later run, {date}, on the same kind of machine: {', '.join(rows)}." for date, rows in dates.items()]


def _told(document: Document, options: Options, whole: bool) -> str:
    weights = any(case["class_weights"] for case in document["cases"])
    classes = f", losses with class weights C = {document['num_classes']:,}" if weights else ""
    where = "the whole process's peak, weights included" if whole else "peak beyond inputs and gradients"
    what = f"median; memory: {where}; the others as multiples of flashpair's time and memory"
    batch = f"N = {options.sizes[0]:,}, D = {options.dims[0]}, {options.per_class} a class{classes}"
    where = machine.words(document["machine"], options.threads)
    return f"One training step, {options.data} data, {options.dtype}, {batch}. Time: {what}. {where}."
