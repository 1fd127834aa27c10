"""Stage, in the background: every kernel that later stages launch, compiled into Triton's cache without a GPU.

The engine runs each case once on CPU tensors over support/aot.py's driver, which claims to be this chip; what it would
launch is noted, not launched. Then each kernel is compiled by a process of its own, forked from this one, so that one
that crashes or hangs the compiler costs itself alone. Types, constants and alignment are those of a real launch, and so
is the place in the cache. On the host it is PTX, which the executor runs, and no machine code.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import launches, site
from .cases import TruthCase, main_cases, own_steps, table_name, tested_steps, truth_cases
from .child import Skip, Stage, reason
from .machine import known
from .plan import Plan, Tile
from .tuning import candidate_name, candidates, chosen, gates

SMALL = 64  # integers from there on are sizes, not constants
LONGEST = 120.0  # seconds that one kernel may take


class Wanted(NamedTuple):
    """A launch: the jit function, its arguments with stand-ins for tensors, and Triton's options."""

    kernel: Any
    args: tuple[Any, ...]
    options: dict[str, Any]

    @property
    def name(self) -> str:
        return self.kernel.fn.__name__

    def key(self) -> Any:
        """Equal for launches that are served by one kernel; Triton itself may tell apart less, not more."""
        return self.name, _key(self.args), tuple(sorted((k, repr(v)) for k, v in self.options.items()))

    def compile(self) -> Any:
        return self.kernel.run(*self.args, grid=(1,), warmup=True, **self.options)


def make_launcher(made: Any) -> None:
    """Triton 3.6 has a C compiler make a launcher for each signature at its first launch; later ones share one."""
    from triton.backends.nvidia import driver

    if hasattr(driver, "make_launcher"):
        try:
            driver.CudaLauncher(made.src, made.metadata)
        except Exception as error:  # which costs the first launch half a second, no more
            sys.stderr.write(f"no launcher ahead for {made.name}: {reason(error)}\n")


def _key(value: Any) -> Any:
    if isinstance(value, Tensor):
        return str(value.dtype), value.data_ptr() % 16 == 0
    if isinstance(value, tuple):
        return type(value).__name__, *(_key(one) for one in value)
    if isinstance(value, float):
        return "float"
    if isinstance(value, int) and abs(value) >= SMALL:
        return "int", value % 16 == 0, -(2**31) <= value < 2**31
    return repr(value)  # which may be a constant


def _stand_in(value: Any) -> Any:
    """A few numbers in a tensor's place, aligned as it is."""
    if isinstance(value, Tensor):
        few = torch.zeros(64, dtype=value.dtype)
        return few if value.data_ptr() % 16 == 0 else few[1:]
    if isinstance(value, tuple):
        made = [_stand_in(one) for one in value]
        return type(value)(*made) if hasattr(value, "_fields") else tuple(made)
    return value


class Job(NamedTuple):
    name: str
    run: Callable[[], Any]


def jobs(plan: Plan) -> list[Job]:
    """In the order in which the stages need them."""
    found = [Job(case.name, lambda case=case: case.step("cpu")()) for case in truth_cases(plan)]
    timed = list(dict.fromkeys(case._replace(variants=(), profiled=False) for case in plan.table))
    found += [
        Job(table_name(case), lambda case=case: [step() for step in own_steps(plan, case, "cpu")]) for case in timed
    ]
    for n in (plan.counters_n, plan.sanitizer_n):
        found += [Job(case.name, lambda case=case: case.step("cpu")()) for case in main_cases(plan, n)]
    for impl in plan.launches:
        for name in launches.names(plan, impl):
            dtype = getattr(torch, name.split(" ")[-1])
            found.append(Job(name, lambda impl=impl, dtype=dtype: launches.ahead(plan, impl, dtype)))
    for tile in candidates(plan):
        for case in gates(plan):
            found.append(Job(candidate_name(case.loss, tile), lambda case=case, tile=tile: _tuned(case, tile)))
    return found


def _tuned(case: TruthCase, tile: Tile | None) -> None:
    with chosen(tile):
        case.step("cpu")()


@contextlib.contextmanager
def pretended(machine: dict[str, Any], seen: Callable[[Wanted], None]) -> Iterator[None]:
    """CPU tensors go the way of the GPU's through the engine, and launches are noted."""
    from flashpair.backends.triton.kernels import configs
    from triton.runtime import driver

    from flashpair.backends.triton import launch, tiled
    from flashpair.core import problem
    from flashpair.engine import dispatch, pairs, row_reduce_op, small_batch, sorted_rows

    capability = tuple(machine["capability"])
    family = configs.CAPABILITIES.get(capability, configs.SMALL)

    def note(kernel: Any, grid: Any, device: Any, *args: Any, warps: int, stages: int, **more: Any) -> None:
        if 0 not in grid:
            options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True, **more}
            seen(Wanted(kernel, tuple(map(_stand_in, args)), options))

    def kernel_rows(x: Tensor, order: Tensor, *, normalize: bool, impl: str) -> Tensor:
        return sorted_rows._KernelRows.apply(problem.solid(x), order, normalize)

    changes = [
        (configs, "family", lambda device: family),
        (launch, "processors", lambda device: machine["processors"]),
        (launch, "run", note),
        (dispatch, "_unsupported_reasons", lambda impl, device: ()),
        (
            row_reduce_op,
            "backend_module",
            lambda impl, device: row_reduce_op.triton_backend(impl),
        ),
        (pairs, "sorted_rows", kernel_rows),
        (dispatch, "compute_dtype", lambda backend, x, y: x.dtype),
        (small_batch, "small_batch_backend", lambda *args: ""),
        (tiled, "_product", lambda a, b, out: out),
        (tiled, "_mirror", lambda s: None),
    ]
    driver.set_active(site.load("tests/support/aot.py").Chip("{}{}".format(*capability), 0))
    before = [getattr(module, name) for module, name, _ in changes]
    try:
        for module, name, value in changes:
            setattr(module, name, value)
        yield
    finally:
        for (module, name, _), value in zip(changes, before, strict=True):
            setattr(module, name, value)


class Pool:
    """Compiles what is wanted, so many at once, and says which cases are ready."""

    def __init__(self, stage: Stage, workers: int) -> None:
        self.stage, self.workers = stage, workers
        self.waiting: list[Wanted] = []
        self.known: dict[Any, str | None] = {}  # None until it is compiled; empty, or why it could not be
        self.cases: dict[str, set[Any]] = {}
        self.running: dict[int, tuple[Any, Wanted, float]] = {}
        self.without = 0

    def want(self, case: str, wanted: Wanted) -> None:
        key = wanted.key()
        self.cases.setdefault(case, set()).add(key)
        if key not in self.known:
            self.known[key] = None
            self.waiting.append(wanted)

    def work(self) -> None:
        """Starts what there is room for, and looks at what has ended."""
        while self.waiting and len(self.running) < self.workers:
            wanted = self.waiting.pop(0)
            self.running[self._fork(wanted)] = (wanted.key(), wanted, time.monotonic())
        for pid, (key, wanted, since) in list(self.running.items()):
            done, status = os.waitpid(pid, os.WNOHANG)
            if not done and time.monotonic() - since > LONGEST:
                os.kill(pid, 9)
            if done:
                del self.running[pid]
                self.known[key] = self._why(pid) if status else ""
                if status:
                    self.without += 1
                    self.stage.say(kernel=wanted.name, dropped=self.known[key], options=_shown(wanted))
        self._announce()

    def _fork(self, wanted: Wanted) -> int:
        pid = os.fork()
        if pid:
            return pid
        code = 1
        try:
            make_launcher(wanted.compile())
            code = 0
        except BaseException as error:
            self._file(os.getpid()).write_text(reason(error), encoding="utf-8")
        finally:
            os._exit(code)

    def _file(self, pid: int) -> Any:
        return self.stage.work / f"compile-{pid}.txt"

    def _why(self, pid: int) -> str:
        file = self._file(pid)
        if not file.exists():
            return "the compiler crashed, or took too long"
        words = file.read_text(encoding="utf-8")
        file.unlink()
        return words

    def _announce(self) -> None:
        ready = [name for name, keys in self.cases.items() if all(self.known[key] is not None for key in keys)]
        for name in ready:
            why = [f"{key[0]}: {self.known[key]}" for key in self.cases.pop(name) if self.known[key]]
            new = site.marker(self.stage.work, f"{name}.new")
            new.write_text("; ".join(why), encoding="utf-8")
            new.rename(site.marker(self.stage.work, name))


def _shown(wanted: Wanted) -> dict[str, Any]:
    names, options = ("num_warps", "num_stages", "maxnreg"), wanted.options
    shown = {name: options[name] for name in names if name in options}
    for form in (arg for arg in wanted.args if hasattr(arg, "BLOCK_ROWS")):
        shown |= {"BLOCK_ROWS": form.BLOCK_ROWS.value, "BLOCK_COLS": form.BLOCK_COLS.value}
    return shown


def run(stage: Stage) -> None:
    try:
        import triton  # noqa: F401
    except ImportError as error:
        raise Skip(f"there is no Triton: {error}") from error
    if not stage.plan.on_host:
        os.nice(10)  # what is measured beside this comes first
    torch.set_num_threads(1)  # no thread may live where a process is forked
    started, facts = time.monotonic(), known(stage)
    pool = Pool(stage, stage.plan.workers or max(1, facts["cores"] - 2))
    with site.of_tests("ptx.launch").to_ptx() if stage.plan.on_host else contextlib.nullcontext():
        compile_all(stage, pool, jobs(stage.plan), facts)
    stage.say(kernels=len(pool.known), without=pool.without, seconds=round(time.monotonic() - started, 1))
    if stage.plan.tests_ahead:
        while not site.marker(stage.work, "table.end").exists():  # whose times on the host want the cores
            time.sleep(0.2)
        before, since = len(pool.known), time.monotonic()
        compile_all(stage, pool, [Job(*one) for one in tested_steps()], facts)
        stage.say(for_tests=len(pool.known) - before, seconds=round(time.monotonic() - since, 1))


def compile_all(stage: Stage, pool: Pool, todo: list[Job], facts: dict[str, Any]) -> None:
    """Notes what the jobs launch, while what is noted is being compiled, and waits for the rest."""
    name = ""
    with pretended(facts, lambda wanted: pool.want(name, wanted)):
        for job in todo:
            name = job.name
            try:
                job.run()
            except Exception as error:
                stage.say(case=name, dropped=reason(error))
                site.marker(stage.work, name).touch()
            pool.work()
    said = time.monotonic()
    while pool.waiting or pool.running:
        pool.work()
        if time.monotonic() - said > 15:
            said = time.monotonic()
            stage.say(left=len(pool.waiting) + len(pool.running))
        time.sleep(0.02)
