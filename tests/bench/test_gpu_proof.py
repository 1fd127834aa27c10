"""bench/gpu_proof on the host: every stage from end to end, with tests/support/gpu_tools in the places of NVIDIA's."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import pytest
import torch

pytest.importorskip("triton")
from bench.gpu_proof import counters, sanitizer, site, summary, sweep
from bench.gpu_proof.__main__ import main
from bench.gpu_proof.accelerator import Cuda
from bench.gpu_proof.driver import FILES, Running
from bench.gpu_proof.plan import NAMES, Stage, Tile
from bench.gpu_proof.record import Record
from bench.gpu_proof.session import members

ROOT = Path(__file__).resolve().parents[2]
SUPPORT = ROOT / "tests/support"
TOOLS, BARE = SUPPORT / "gpu_tools", SUPPORT / "bare"


def _environment(**more):
    own = {"PATH": f"{TOOLS}{os.pathsep}{os.environ['PATH']}", "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    own["CXXFLAGS"] = "-O0"  # of bindings that the module of tests/support/emulated.py takes the place of
    left_out = ("CUDA_HOME", "CUDA_PATH", "TRITON_INTERPRET")
    kept = {k: v for k, v in os.environ.items() if k not in left_out and not k.startswith("PYTEST_")}
    return kept | own | more


def _real_nvcc():
    return shutil.which("nvcc", path=os.environ["PATH"])


def _command(out, *options):
    return [sys.executable, "-m", "bench.gpu_proof", str(out), "--on-host", *options]


def _lines(out):
    return [json.loads(line) for line in (out / "proof.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def proof(tmp_path_factory):
    out = tmp_path_factory.mktemp("proof")
    done = subprocess.run(
        _command(out, "--minutes", "30"), cwd=ROOT, env=_environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr + (out / "log.txt").read_text()
    return out


def test_every_stage_passes_from_end_to_end(proof):
    lines = _lines(proof)
    ends = {line["stage"]: line for line in lines if "ended" in line}
    assert set(ends) == set(NAMES)
    assert all(end["done"] for end in ends.values()), ends
    assert not [line for line in lines if summary.bad(line)]
    ceilings = {line["ceiling"] for line in lines if line["stage"] == "ceilings" and "ceiling" in line}
    assert ceilings == {"product bfloat16", "product float32", "product tf32", "copy", "clocks"}
    compiled = [line for line in lines if line["stage"] == "compile" and "without" in line]
    assert [line["without"] for line in compiled] == [0] and compiled[0]["kernels"] > 20
    of_own = {(line["stage"], line["compiled"]) for line in lines if "compiled" in line}
    assert {count for _, count in of_own} == {0}, "a launch asked for a kernel that was not compiled ahead"


def test_what_each_stage_says(proof):
    lines = _lines(proof)
    truth = [line for line in lines if line["stage"] == "truth" and "gradient" in line]
    found = {(line["case"].split(" ")[1], line["case"].split(" ")[-1], line["by"]) for line in truth}
    onchip = "emulated" if _real_nvcc() is None else "executor"
    assert found == {
        (dtype, *by) for dtype in ("bfloat16", "float32") for by in (("fused", "executor"), ("onchip", onchip))
    }
    assert all(0 < line["gradient"]["error"] <= line["gradient"]["bound"] for line in truth)
    timed = [line for line in lines if line["stage"] == "table" and "seconds" in line and "variant" in line]
    variants = {"flashpair", "graph", "reference", "compiled", "floor", "pytorch-metric-learning"}
    assert {line["variant"] for line in timed} == variants and all(line["arithmetic_floor"] > 0 for line in timed)
    (beside,) = [line for line in lines if line["stage"] == "table" and "against" in line]
    assert max(beside["value"], beside["gradient"]) < 1e-6
    tried = [line for line in lines if line["stage"] == "sweep" and "times" in line]
    assert [line["tile"] is None for line in tried] == [True, False, False, False]  # and what was picked, as a whole
    assert all(line["right"] and min(line["times"].values()) > 0 for line in tried)
    assert [line["found"] for line in lines if line["stage"] == "sanitizer" and "tool" in line] == [0, 0]
    answered = {line["by"] for line in lines if line["stage"] in ("ceilings", "counters", "sanitizer") and "by" in line}
    assert answered | {line["by"] for line in timed} == {"stand-in"} and tried[0]["by"] == "executor, times: stand-in"
    checks = {(line["check"], line["impl"]) for line in lines if line["stage"] == "launches" and line.get("right")}
    assert {("graphs", "fused"), ("streams", "onchip"), ("compiled", "fused")} <= checks
    parts = [line for line in lines if line["stage"] == "suite" and line.get("complete")]
    assert [line["part"] for line in parts] == ["all", "alone"] and all(line["tests"]["passed"] for line in parts)


def test_few_files_and_a_row_for_the_table(proof):
    from flashpair.backends.triton.kernels.configs import Config

    assert {file.name for file in proof.iterdir()} <= set(FILES) and len(FILES) <= 8
    _, row = (proof / "configs.txt").read_text().splitlines()
    width, config = eval(row.partition(",  #")[0], {"Config": Config})
    assert width == 32 and config.rows in (32, 64) and config.depth == 32
    words = (proof / "summary.md").read_text()
    assert all(f"| {name} | done |" in words for name in NAMES)
    assert "| truth | executor |" in words and "| launches | executor, graphs: stand-in |" in words
    assert "## Faults\n\nNone." in words and "| gpu__time_duration.sum | 412864.0 | 612864.0 |" in words


def test_what_is_compiled_ahead_is_what_a_launch_asks_for():
    done = subprocess.run(
        [sys.executable, str(SUPPORT / "ahead.py")], cwd=ROOT, capture_output=True, text=True,
        env=_environment(PYTHONPATH=str(ROOT)),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    kernels = json.loads(done.stdout)
    assert {"gather_rows", "reduce_rows", "merge_splits", "list_tiles", "backward_rows"} <= {
        name for name, _ in kernels
    }
    assert all(there for _, there in kernels), kernels


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=str)
def test_killed_at_any_moment_what_was_found_stays(number, tmp_path):
    driver = subprocess.Popen(
        _command(tmp_path, "--stages", "ceilings"), cwd=ROOT, env=_environment(), stdout=subprocess.DEVNULL
    )
    children = Path(f"/proc/{driver.pid}/task/{driver.pid}/children")
    stage = []
    while driver.poll() is None and not stage:
        said = (tmp_path / "proof.jsonl").exists() and _whole_lines(tmp_path)
        stage = [int(pid) for pid in children.read_text().split()] if said else []
        time.sleep(0.01)
    driver.send_signal(number)
    driver.wait(20)
    lines = _whole_lines(tmp_path)
    assert lines[0]["stage"] == "machine" and lines[0]["machine"]["processors"] == 132
    until = time.monotonic() + 20
    while any(members(pid) for pid in stage) and time.monotonic() < until:
        time.sleep(0.05)
    assert stage and not [members(pid) for pid in stage if members(pid)], "a stage outlives its driver"
    if number == signal.SIGTERM:
        assert driver.returncode == 1 and "stopped from outside" in (tmp_path / "summary.md").read_text()


def _whole_lines(out):
    return [
        json.loads(line) for line in (out / "proof.jsonl").read_text().splitlines(keepends=True) if line[-1] == "\n"
    ]


def test_a_stage_that_does_not_end_is_ended_and_what_it_said_is_kept(tmp_path):
    heard = []
    (tmp_path / "work/compiled").mkdir(parents=True)
    record = Record(tmp_path, heard.append)
    words = "import json, time, subprocess; print(json.dumps({'found': 1}), flush=True); print('noise', flush=True)"
    command = [sys.executable, "-c", f"{words}; subprocess.run(['sleep', '600'])"]
    running = Running(Stage("truth", 1), command, dict(os.environ), record)
    while not heard:
        time.sleep(0.01)
    running.finish("ended after its limit of 1 s")
    assert heard[0]["found"] == 1 and not heard[-1]["done"] and not members(running.process.pid)
    assert "noise" in (tmp_path / "log.txt").read_text()
    assert not summary.failed(record.lines)  # no time is no fault


def test_a_crash_is_a_fault(tmp_path):
    record = Record(tmp_path, lambda line: None)
    running = Running(Stage("truth", 1), [sys.executable, "-c", "import os; os.abort()"], dict(os.environ), record)
    running.process.wait()
    running.finish()
    assert record.lines[-1]["ended"] == "ended with -6" and summary.failed(record.lines)


def test_bad_input_is_named(tmp_path, capsys):
    file = tmp_path / "file"
    file.write_text("")
    for arguments, words in (
        ([str(tmp_path), "--stages", "truth,trth"], "stages must be of machine, build, compile"),
        ([str(tmp_path), "--minutes", "0"], "--minutes must be above 0 and at most 600, got 0"),
        ([str(file)], "OUT must be a folder"),
    ):
        with pytest.raises(SystemExit) as refused:
            main(arguments)
        assert refused.value.code == 2 and words in capsys.readouterr().err


def test_what_is_missing_is_said_and_is_no_fault(tmp_path):
    """No tools, no compilers, and of packages only those that tests/support/bare leaves."""
    bare = _environment(PATH=str(tmp_path / "nothing"), PYTHONPATH=str(BARE), PYTEST_DISABLE_PLUGIN_AUTOLOAD="1")
    command = _command(tmp_path, "--minutes", "30", "--stages", "build,table,counters,sanitizer,suite")
    done = subprocess.run(command, cwd=ROOT, env=bare, capture_output=True, text=True)
    lines = _lines(tmp_path)
    assert done.returncode == 0, done.stdout + "\n".join(map(str, filter(summary.bad, lines)))
    skipped = {(line["stage"], line.get("variant")): line["skipped"] for line in lines if "skipped" in line}
    peer = skipped.pop(("table", "pytorch-metric-learning"))
    assert "pytorch_metric_learning" in peer or "pytorch-metric-learning" in peer
    assert skipped == {
        ("machine", None): "nvidia-smi is not here",
        ("build", None): "no C++ compiler: c++, g++, clang++ not found",
        ("counters", None): "ncu is not on the PATH",
        ("sanitizer", None): "compute-sanitizer is not on the PATH",
    }
    assert [line["note"] for line in lines if "note" in line] == ["pytest-xdist is not here: one process"]
    ends = {line["stage"] for line in lines if line.get("done")}
    assert ends == {"machine", "build", "table", "counters", "sanitizer", "suite"}


def test_what_stages_have_started_ends_with_the_driver(tmp_path):
    """Processes in groups of their own, too, which ninja gives to compilers."""
    slow = tmp_path / "c++"
    slow.write_text("#!/bin/sh\ncase $1 in --version | -dumpmachine) echo x86_64 ;; *) exec sleep 600 ;; esac\n")
    slow.chmod(0o755)
    driver = subprocess.Popen(
        _command(tmp_path / "out", "--stages", "build"), cwd=ROOT, env=_environment(CXX=str(slow)),
        stdout=subprocess.DEVNULL,
    )  # fmt: skip
    children = Path(f"/proc/{driver.pid}/task/{driver.pid}/children")
    stage, sleeping = [], []
    while driver.poll() is None and not sleeping:
        time.sleep(0.05)
        stage = [int(pid) for pid in children.read_text().split()]
        sleeping = [p for own in stage for p in members(own) if Path(f"/proc/{p}/comm").read_text() == "sleep\n"]
    assert sleeping and os.getpgid(sleeping[0]) not in stage
    driver.kill()
    driver.wait(20)
    until = time.monotonic() + 20
    while any(members(own) for own in stage) and time.monotonic() < until:
        time.sleep(0.05)
    assert not [pid for own in stage for pid in members(own)]
    assert all(isinstance(line, dict) for line in _whole_lines(tmp_path / "out"))


def test_without_a_gpu_it_says_so_and_stops(tmp_path):
    command = [word for word in _command(tmp_path) if word != "--on-host"]
    done = subprocess.run(command, cwd=ROOT, env=_environment(CUDA_VISIBLE_DEVICES=""), capture_output=True, text=True)
    assert done.returncode == 2 and "finds no GPU" in done.stdout


def test_the_row_that_is_picked():
    """Of one tile, whose passes are each the fastest over all losses; a tile that is fast in one pass alone is not."""
    slow, mixed, fast = Tile(64, 64, 4, 2, 0), Tile(64, 64, 8, 2, 0), Tile(128, 64, 8, 3, 128)
    shipped = [{"reduce_rows": 1.0, "backward_rows": 1.0}, {"reduce_rows": 2.0, "backward_rows": 2.0}]
    found = {
        slow: [{"reduce_rows": 0.2, "backward_rows": 2.0}, {"reduce_rows": 0.4, "backward_rows": 4.0}],
        mixed: [{"reduce_rows": 3.0, "backward_rows": 0.9}, {"reduce_rows": 6.0, "backward_rows": 1.8}],
        fast: [{"reduce_rows": 0.9, "backward_rows": 0.8}, {"reduce_rows": 1.8, "backward_rows": 1.6}],
    }
    assert sweep.best(found, shipped) == (slow, mixed)
    del found[mixed]
    assert sweep.best(found, shipped) == (fast, fast) and sweep.best({}, shipped) is None


def test_tables_of_ncu():
    with pytest.raises(RuntimeError, match="ncu printed no table"):
        counters.table(["==PROF== Connected", "==ERROR== ERR_NVGPUCTRPERM"])
    done = subprocess.run(
        [TOOLS / "ncu", "--csv", "--page", "raw", "true"],
        capture_output=True,
        text=True,
        env=_environment(PYTHON="true"),
    )
    found = counters.longest(counters.table(done.stdout.splitlines()))
    assert found["reduce_rows"]["gpu__time_duration.sum"] == 412864.0 and len(found) == 2
    assert counters.complaint("==ERROR== LibraryNotLoaded") == "==ERROR== LibraryNotLoaded"
    assert not counters.complaint("==ERROR== The application returned an error code (1).\nValueError")
    assert "device__attribute_clock_rate" not in found["backward_rows"]


def test_what_the_sanitizer_says():
    assert sanitizer.verdict("memcheck", "========= ERROR SUMMARY: 0 errors", 0) == {"found": 0, "clean": True}
    words = "========= RACECHECK SUMMARY: 3 hazards displayed (3 errors, 0 warnings)"
    assert sanitizer.verdict("racecheck", words, 9) == {"found": 3, "clean": False}
    assert "Device not supported" in sanitizer.verdict("memcheck", "Error: Device not supported", 255)["skipped"]
    assert "no summary" in sanitizer.verdict("memcheck", "Traceback", 1)["failed"]
    assert sanitizer.verdict("memcheck", "ERROR SUMMARY: 0 errors", 1)["failed"] == "the step ended with 1"


def test_the_gpu_side_of_the_seam_asks_torch_for_what_there_is(monkeypatch):
    """Over mocks that have torch.cuda's own names and signatures, on CPU tensors."""
    for name in ("synchronize", "reset_peak_memory_stats", "memory_allocated", "max_memory_allocated", "_sleep",
                 "current_stream", "device_count", "empty_cache", "graph", "stream"):  # fmt: skip
        made = mock.create_autospec(getattr(torch.cuda, name))
        monkeypatch.setattr(torch.cuda, name, made)
    for name in ("Stream", "CUDAGraph"):
        whole = getattr(torch.cuda, name)
        monkeypatch.setattr(torch.cuda, name, lambda *args, of=whole, **more: mock.create_autospec(of, instance=True))
    event = mock.create_autospec(torch.cuda.Event, instance=True)
    event.elapsed_time.return_value = 3.0
    monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: event)
    torch.cuda.max_memory_allocated.return_value, torch.cuda.memory_allocated.return_value = 70, 30
    torch.cuda.device_count.return_value = 2
    gpu, steps = Cuda(), []
    assert gpu.seconds(lambda: steps.append(1), 3) == pytest.approx(1e-3) and len(steps) == 3
    assert gpu.watch()()() == pytest.approx(3e-3)
    gpu.hold()
    replay, result = gpu.graph(lambda: (steps.append(1), len(steps)))
    replay()
    assert result[1] == len(steps) == 7
    target = torch.zeros(3)
    assert gpu.late(target, torch.ones(3), lambda: target.sum()) == 3
    assert gpu.peak(lambda: None) == 40 and gpu.devices() == ["cuda:0", "cuda:1"]
    assert gpu.kernels(lambda: torch.ones(3) + 1) == {}  # no kernel of a GPU
    gpu.free()


def test_markers_of_cases_are_files():
    names = ["TripletMarginLoss(triplets='hard') bfloat16 n=333", "TripletMarginLoss(triplets='all') bfloat16 n=333"]
    files = {site.marker(Path("work"), name).name for name in names}
    assert len(files) == 2 and not any("/" in name or " " in name for name in files)
