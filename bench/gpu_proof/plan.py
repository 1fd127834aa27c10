"""What a run does: the stages with their limits, and the sizes, on a GPU and on the host."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


class Stage(NamedTuple):
    """A module of this package, the seconds that it may take, and whether others run beside it."""

    name: str
    limit: float
    background: bool = False


STAGES = (
    Stage("machine", 60),
    Stage("build", 240, background=True),
    Stage("compile", 420, background=True),
    Stage("ceilings", 40),
    Stage("truth", 190),
    Stage("table", 110),
    Stage("sweep", 85),
    Stage("counters", 75),
    Stage("sanitizer", 100),
    Stage("launches", 60),
    Stage("suite", 600),
)
NAMES = tuple(stage.name for stage in STAGES)


class TableCase(NamedTuple):
    """One batch to time, by the words of bench.options; `profiled`: also by kernel."""

    loss: str
    dtype: str
    n: int
    d: int
    variants: tuple[str, ...]
    data: str = "random"
    profiled: bool = False


class Tile(NamedTuple):
    """A configuration to try in both passes: rows and columns of a tile, warps, pipeline stages, registers a thread."""

    rows: int
    cols: int
    warps: int
    stages: int
    registers: int


@dataclass(frozen=True)
class Plan:
    """The sizes of a run.

    Args:
        device: "cuda", or "cpu" on the host. arch: what is compiled for on the host, where no chip says.
        workers: processes that compile, that the tests go to; 0: the cores but two.
        ceiling: the side of a square product, the bytes of a copy, and rounds of each.
        truth_losses: names of flashpair.losses.registry.CRITERIA. truth_onchip: those of `onchip`, at `onchip_sizes`.
        table: what is timed, in order of worth. rounds: timed ones of each.
        sweep_losses: what is tuned on, names of CRITERIA. sweep_n: batch sizes that are gated, and timed.
        sweep: candidates beside the row that is shipped, each timed so many times.
        launches: implementations that are launched in other ways.
        tests: files of tests/; tests_alone: what is run by itself afterwards; tests_ahead: their kernels are compiled
            before, once the table is done.
    """

    device: str
    arch: str
    workers: int
    ceiling: tuple[int, int, int]
    truth_losses: tuple[str, ...]
    truth_dtypes: tuple[str, ...]
    truth_sizes: tuple[int, ...]
    width: int
    onchip_losses: tuple[str, ...]
    onchip_sizes: tuple[int, ...]
    table: tuple[TableCase, ...]
    rounds: int
    sweep_losses: tuple[str, ...]
    sweep_n: tuple[int, int]
    sweep: tuple[Tile, ...]
    sweep_repeats: int
    counters_n: int
    sanitizer_n: int
    launches_n: int
    launches: tuple[str, ...]
    patience: float
    compiler: str
    tests_ahead: bool
    tests: tuple[str, ...]
    tests_alone: tuple[str, ...]

    @property
    def on_host(self) -> bool:
        return self.device == "cpu"


BF16, F32 = "bfloat16", "float32"
OURS = ("flashpair", "graph")
DENSE = (*OURS, "reference")
TABLE = (
    TableCase("ms", BF16, 65536, 128, (*OURS, "floor"), profiled=True),
    TableCase("ntxent", BF16, 65536, 128, (*OURS, "floor"), profiled=True),
    TableCase("ms", BF16, 8192, 128, (*DENSE, "floor"), profiled=True),
    TableCase("ntxent", BF16, 8192, 128, (*DENSE, "floor"), profiled=True),
    TableCase("ms", BF16, 1024, 128, ("flashpair-onchip", *OURS, "flashpair-fused", "reference"), profiled=True),
    TableCase("ms", BF16, 256, 128, ("flashpair-onchip", *OURS, "flashpair-fused", "reference")),
    TableCase("ms", F32, 8192, 128, (*DENSE, "pytorch-metric-learning", "floor"), profiled=True),
    TableCase("ms", BF16, 65536, 128, OURS, data="trained"),
    TableCase("ms", BF16, 32768, 256, (*OURS, "floor"), profiled=True),
    TableCase("ms", BF16, 32768, 128, (*DENSE, "floor")),
    TableCase("ms", BF16, 16384, 768, (*OURS, "floor"), profiled=True),
    TableCase("ntxent", BF16, 8192, 128, ("compiled",)),
    TableCase("ms", BF16, 8192, 128, ("compiled",)),
)
SHAPES = ((128, 64), (128, 128), (64, 64), (128, 32), (64, 32))
LAUNCHES = ((8, 3, 0), (8, 2, 0), (8, 3, 128), (8, 2, 128), (4, 3, 0), (4, 2, 0), (4, 3, 168), (8, 4, 128), (4, 2, 128))
GPU = Plan(
    device="cuda",
    arch="",
    workers=0,
    ceiling=(8192, 2**32, 20),
    truth_losses=(
        "MultiSimilarityLoss",
        "NTXentLoss",
        "MultiSimilarityLoss(epsilon=None)",
        "GeneralizedLiftedStructureLoss(distance='euclidean')",
        "TripletMarginLoss(triplets='hard')",
        "LiftedStructureLoss",
        "CircleLoss",
        "ContrastiveLoss",
    ),
    truth_dtypes=(BF16, F32),
    truth_sizes=(1000, 333, 4096),
    width=128,
    onchip_losses=("MultiSimilarityLoss", "NPairsLoss", "GeneralizedLiftedStructureLoss"),
    onchip_sizes=(32, 333, 1000),
    table=TABLE,
    rounds=9,
    sweep_losses=("MultiSimilarityLoss", "NTXentLoss"),
    sweep_n=(4096, 32768),
    sweep=tuple(Tile(*shape, *launch) for launch in LAUNCHES for shape in SHAPES),
    sweep_repeats=5,
    counters_n=16384,
    sanitizer_n=300,
    launches_n=600,
    launches=("fused", "onchip", "tiled", "screened"),
    patience=120,
    compiler="inductor",
    tests_ahead=True,
    tests=(
        "tests/backends/cuda/test_gpu_onchip.py",
        "tests/backends/triton/test_gpu.py",
        "tests/backends/triton/test_gpu_screened.py",
    ),
    tests_alone=("tests/backends/triton/test_gpu.py::test_offsets_past_two_to_the_thirty_one",),
)
HOST = Plan(
    device="cpu",
    arch="90",
    workers=1,
    ceiling=(64, 2**16, 2),
    truth_losses=("MultiSimilarityLoss",),
    truth_dtypes=(BF16, F32),
    truth_sizes=(37,),
    width=32,
    onchip_losses=("MultiSimilarityLoss",),
    onchip_sizes=(33,),
    table=(TableCase("ms", F32, 40, 32, (*DENSE, "pytorch-metric-learning", "compiled", "floor"), profiled=True),),
    rounds=2,
    sweep_losses=("MultiSimilarityLoss",),
    sweep_n=(40, 48),
    sweep=(Tile(64, 32, 4, 2, 0), Tile(32, 32, 4, 1, 128)),
    sweep_repeats=1,
    counters_n=48,
    sanitizer_n=40,
    launches_n=40,
    launches=("fused", "onchip"),
    patience=600,
    compiler="eager",
    tests_ahead=False,
    tests=("tests/packaging/test_compilers.py", "tests/backends/cuda/test_gpu_onchip.py"),
    tests_alone=("tests/packaging/test_compilers.py",),
)
PLANS: dict[str, Plan] = {"gpu": GPU, "host": HOST}


def limits(only: tuple[str, ...]) -> list[Stage]:
    """The stages of that name, all where there is none, and always the first; ValueError names what is unknown."""
    unknown = [name for name in only if name not in NAMES]
    if unknown:
        raise ValueError(f"stages must be of {', '.join(NAMES)}, got {', '.join(unknown)}")
    return [s for s in STAGES if not only or s.name in only or s.name == "machine"]
