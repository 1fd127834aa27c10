"""summary.md: what the lines of proof.jsonl come to, for people. Written anew after every stage."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

Line = dict[str, Any]
Lines = list[Line]
BYTES = 2**20


def bad(line: Line) -> bool:
    """Whether a line speaks of a fault: of the product, or of the proof."""
    wrong = line.get("right") is False and line["stage"] != "sweep"  # a candidate that is wrong is not taken
    return "error" in line or "failed" in line or wrong or line.get("clean") is False or _crashed(line)


def _crashed(line: Line) -> bool:
    return str(line.get("ended", "")).startswith("ended with ") and line["ended"] != "ended with the run"


def failed(lines: Lines) -> bool:
    return any(bad(line) for line in lines)


def write(out: Path, lines: Lines) -> None:
    sections = (
        _machine,
        _stand_ins,
        _stages,
        _faults,
        _truth,
        _table,
        _agreement,
        _kernels,
        _sweep,
        _counters,
        _sanitizer,
        _launches,
        _suite,
    )
    words = ["# GPU proof", ""]
    for section in sections:
        found = list(section(lines))
        words += [*found, ""] if found else []
    new = out / "summary.md.new"
    new.write_text("\n".join(words), encoding="utf-8")
    new.rename(out / "summary.md")


def of(lines: Lines, stage: str, *fields: str) -> Lines:
    """A stage's lines that have all these fields."""
    return [line for line in lines if line["stage"] == stage and all(field in line for field in fields)]


def markdown(header: Iterable[str], rows: Iterable[Iterable[Any]]) -> Iterator[str]:
    names = list(header)
    yield f"| {' | '.join(names)} |"
    yield f"|{'---|' * len(names)}"
    for row in rows:
        yield f"| {' | '.join('' if cell is None else str(cell).replace('|', '/') for cell in row)} |"


def duration(seconds: float | None) -> str:
    if seconds is None:
        return ""
    return f"{seconds * 1e3:.3f} ms" if seconds < 1 else f"{seconds:.2f} s"


def _machine(lines: Lines) -> Iterator[str]:
    for line in of(lines, "machine", "machine"):
        m = line["machine"]
        yield f"{m['gpu'] or 'no GPU: on the host'}, {m['processors']} multiprocessors, torch {m['torch']}, CUDA"
        yield f"{m['cuda']}, Triton {m['triton']}, {m['cores']} cores, revision {m['git_revision']}"
        yield f"({m['git_changed_files']} files changed), {m['date']}."
    for line in of(lines, "ceilings", "flop_per_second"):
        yield f"{line['ceiling']}: {line['flop_per_second'] / 1e12:.1f} TFLOP/s."
    for line in of(lines, "ceilings", "bytes_per_second"):
        yield f"{line['ceiling']}: {line['bytes_per_second'] / 1e12:.3f} TB/s."


def _stand_ins(lines: Lines) -> Iterator[str]:
    found = Counter((line["stage"], line["by"]) for line in lines if "by" in line)
    if found:
        yield "## Not by a GPU\n"
        yield "The executor runs compiled PTX on the CPU; a stand-in answers for a GPU and proves nothing of it.\n"
        yield from markdown(("stage", "by", "lines"), ([*key, count] for key, count in found.items()))


def _stages(lines: Lines) -> Iterator[str]:
    ends = [line for line in lines if "ended" in line and "seconds" in line]
    if ends:
        yield "## Stages\n"
        yield from markdown(
            ("stage", "ended", "seconds"), ([e["stage"], e["ended"] or "done", e["seconds"]] for e in ends)
        )
    for line in of(lines, "compile", "kernels", "seconds"):
        yield f"\n{line['kernels']} kernels in {line['seconds']} s, {line['without']} of them could not be compiled."
    skipped = [line for line in lines if "skipped" in line]
    if skipped:
        yield "\nNot run:\n"
        for line in skipped:
            about = (line.get(k) for k in ("case", "variant", "part", "check", "impl", "tool"))
            yield f"- {' '.join(filter(None, (line['stage'], *about)))}: {line['skipped']}"


def _faults(lines: Lines) -> Iterator[str]:
    faults = [line for line in lines if bad(line)]
    yield f"## Faults\n\n{len(faults) or 'None'}{'.' if not faults else ':'}"
    for line in faults:
        yield f"- {', '.join(f'{k}: {v}' for k, v in line.items() if k != 'at')}"


def _truth(lines: Lines) -> Iterator[str]:
    found = of(lines, "truth", "gradient")
    if found:
        yield "## Truth: relative errors against float64, and 2 x (eager + one rounding)\n"
        columns = ("case", "right", "value", "bound", "gradient", "bound", "worst row", "compiled here")
        yield from markdown(columns, (
            [t["case"], "yes" if t["right"] else "**no**", f"{t['value']['error']:.1e}", f"{t['value']['bound']:.1e}",
             f"{t['gradient']['error']:.1e}", f"{t['gradient']['bound']:.1e}", f"{t['worst_row']:.1e}", t["compiled"]]
            for t in found
        ))  # fmt: skip


def _table(lines: Lines) -> Iterator[str]:
    times, firsts = of(lines, "table", "seconds", "variant"), of(lines, "table", "peak")
    if not times:
        return
    peaks = {(f["case"], f["variant"]): f["peak"] for f in firsts}
    floors = {t["case"]: t["seconds"] for t in times if t["variant"] == "floor"}
    yield "## Times of a step\n\nFloors: bare products of the same shapes; 6 N² D flop at the product ceiling.\n"
    columns = ("case", "variant", "median", "lowest", "of bare products", "of arithmetic", "added memory")
    rows = []
    for t in times:
        peak = peaks.get((t["case"], t["variant"]))
        rows.append([
            t["case"], t["variant"], duration(t["seconds"]), duration(t["lowest"]), _ratio(t, floors.get(t["case"])),
            _ratio(t, t["arithmetic_floor"]), None if peak is None else f"{peak / BYTES:.0f} MiB",
        ])  # fmt: skip
    yield from markdown(columns, rows)


def _ratio(line: Line, floor: float | None) -> str | None:
    return None if not floor else f"{line['seconds'] / floor:.2f}"


def _agreement(lines: Lines) -> Iterator[str]:
    for line in of(lines, "table", "against"):
        verdict = "" if "right" not in line else f", {'within' if line['right'] else '**over**'} {line['bound']:.1e}"
        errors = f"value {line['value']:.1e}, gradient {line['gradient']:.1e}{verdict}"
        yield f"- {line['case']}, beside `{line['against']}`: {errors}"


def _kernels(lines: Lines) -> Iterator[str]:
    found = [line for line in of(lines, "table", "kernels") if line["kernels"]]
    if found:
        yield "## Time by kernel, of one step\n"
        rows = [[f["case"], name, duration(s), count] for f in found for name, (s, count) in f["kernels"].items()]
        yield from markdown(("case", "kernel", "all launches", "launches"), rows)


def _sweep(lines: Lines) -> Iterator[str]:
    found = sorted(of(lines, "sweep", "of_shipped", "tile"), key=lambda line: sum(line["of_shipped"]))
    wrong = [line for line in of(lines, "sweep", "right", "tile") if not line["right"]]
    if found:
        yield "## Sweep of both main kernels: time of the shipped row = 1\n"
        rows = ([*line["tile"], ", ".join(f"{x:.3f}" for x in line["of_shipped"])] for line in found[:12])
        yield from markdown(("rows", "columns", "warps", "stages", "registers", "of shipped, by loss"), rows)
        yield f"\n{len(found)} candidates timed, {len(wrong)} wrong, {len(of(lines, 'sweep', 'dropped'))} did not run."
    for line in of(lines, "sweep", "best"):
        stands = "" if line["faster"] else "No faster than the shipped row, which stands: "
        yield f"\n{stands}`{line['best']}`, {', '.join(f'{k} {v:.3f}' for k, v in line['of_shipped'].items())}."


def _counters(lines: Lines) -> Iterator[str]:
    found = of(lines, "counters", "metrics")
    if found:
        yield "## ncu\n"
        names = sorted({name for line in found for name in line["metrics"]})
        header = ["metric", *(f"{line['case'].split(' ')[0]} {line['kernel']}" for line in found)]
        yield from markdown(header, ([name, *(line["metrics"].get(name) for line in found)] for name in names))


def _sanitizer(lines: Lines) -> Iterator[str]:
    for line in of(lines, "sanitizer", "tool", "clean"):
        yield f"compute-sanitizer {line['tool']}, {line['case']}: {line['found']} found."


def _launches(lines: Lines) -> Iterator[str]:
    found = of(lines, "launches", "check")
    if found:
        yield "## Launches\n"
        rows = ([f["check"], f["impl"], f.get("failed") or f.get("skipped") or "right"] for f in found)
        yield from markdown(("check", "implementation", ""), rows)


def _suite(lines: Lines) -> Iterator[str]:
    last = {line["part"]: line for line in of(lines, "suite", "tests")}
    if last:
        yield "## Tests\n"
        for part, line in last.items():
            counts = ", ".join(f"{count} {what}" for what, count in line["tests"].items())
            yield f"{part}: {counts}{'' if 'complete' in line else ', not all'}."
