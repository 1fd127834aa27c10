"""The options of a run: one frozen dataclass, also passed to child processes and written to the JSON."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch

LOSSES = ("ms", "ms_weighting", "n_pairs", "lifted", "generalized_lifted", "lifted_star")
TITLES = {
    "ms": "Multi-Similarity with mining",
    "ms_weighting": "Multi-Similarity without mining",
    "n_pairs": "N-pair loss (mc)",
    "lifted": "Lifted structure",
    "generalized_lifted": "Generalized lifted structure (cosine)",
    "lifted_star": "LiftedStruct*",
}
DATA = ("random", "trained")
DTYPES = ("float32", "float64", "float16", "bfloat16")
DEVICES = ("cpu", "cuda")
PHASES = ("step", "forward", "launch_overhead", "device")
VARIANTS = ("flashpair", "reference", "compiled", "pytorch-metric-learning", "gemm_bound", "flex-attention", "inf-cl")
VARIANTS += ("flashpair-onchip", "flashpair-fused", "flashpair-tiled", "flashpair-screened", "compiled-max-autotune")
DEFAULT = VARIANTS[:5]
GEMM_BOUNDS = GEMM_BOUND, GEMM_BOUND_TWO = "gemm_bound", "gemm_bound (two products)"
LABELS = {GEMM_BOUND: "GEMM bound", GEMM_BOUND_TWO: "GEMM bound (two products)"}  # in tables and pictures
GB = 10**9


def label(variant: str) -> str:
    return LABELS.get(variant, variant)


@dataclass(frozen=True)
class Options:
    """The arguments of a run.

    Args:
        memory_limit: bytes that a step may add to the memory of its process, or of the GPU.
        threads: of torch.
        loss: one of LOSSES. sizes: batch sizes N, ascending. dims: embedding widths D.
        per_class: samples of a class.
        data: ``"random"``, or ``"trained"``: tight classes, so that mining leaves few pairs.
        noise: of trained data: standard deviation of a coordinate within a class, where that of centres is 1.
        intrinsic: dimensions that the centres of trained data spread over. More dimensions leave fewer live pairs.
        device: ``"cpu"``, or ``"cuda"`` for the current GPU. dtype: of the embeddings.
        phase: ``"step"``, forward and backward; ``"forward"``, with all that a backward needs. On a GPU also
            ``"launch_overhead"``, the time to launch a step while the GPU is busy, and ``"device"``, the time to run
            what was launched.
        ref: None, or M references without gradient instead of the batch itself.
        variants: names of VARIANTS, or your own ``module:function`` (see variants.py).
        repeats: timed rounds; warmup: rounds before them.
        num_classes: C, of losses against class weights.
        time_limit: seconds that one step may take, and after which a variant gets no further round.
        seed: of the data.
    """

    memory_limit: int
    threads: int
    loss: str = "ms"
    sizes: tuple[int, ...] = (256, 1024, 4096, 16384)
    dims: tuple[int, ...] = (128,)
    per_class: int = 4
    data: str = "random"
    noise: float = 0.2
    intrinsic: int = 8
    dtype: str = "float32"
    device: str = "cpu"
    phase: str = "step"
    ref: int | None = None
    variants: tuple[str, ...] = DEFAULT
    repeats: int = 5
    warmup: int = 1
    time_limit: float = 30.0
    seed: int = 0
    num_classes: int = 1000

    def __post_init__(self) -> None:
        if not self.sizes or min(self.sizes) < 4 or not self.dims or min(self.dims) < 1:
            raise ValueError(f"sizes must be at least 4 and dims at least 1, got {self.sizes} and {self.dims}")
        if self.per_class < 2 or self.repeats < 1 or self.warmup < 0 or self.threads < 1:
            raise ValueError("per-class must be at least 2, repeats and threads at least 1, warmup at least 0")
        if not self.noise > 0 or self.intrinsic < 1:
            raise ValueError(f"noise must be above 0 and intrinsic at least 1, got {self.noise} and {self.intrinsic}")
        if self.num_classes < 2:
            raise ValueError(f"num_classes must be at least 2, got {self.num_classes}")
        if self.memory_limit <= 0 or self.time_limit <= 0:
            raise ValueError("memory-limit and time-limit must be above 0")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("device cuda: torch finds no GPU here")
        if self.device == "cpu" and self.phase in ("launch_overhead", "device"):
            raise ValueError(f"phase {self.phase}: needs a GPU, on the CPU a step launches nothing")
        if self.ref is not None and (self.ref < 4 or self.loss == "lifted"):
            raise ValueError("ref must be at least 4, and lifted is defined within a batch, without references")
        unknown = [v for v in self.variants if v not in VARIANTS and ":" not in v]
        if unknown:
            raise ValueError(f"variants must be of {', '.join(VARIANTS)} or module:function, got {unknown}")

    @property
    def backward(self) -> bool:
        return self.phase != "forward"

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @property
    def title(self) -> str:
        against = "" if self.ref is None else f" against {self.ref:,} references without gradient"
        what = {"step": "one training step", "forward": "forward of a training step"}.get(
            self.phase, f"{self.phase} time of one training step"
        )
        where = "" if self.device == "cpu" else " on the GPU"
        return f"{TITLES[self.loss]}, {what}{against}{where}: {self.data} data, {self.dtype}"

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def of(cls, values: dict[str, Any]) -> Options:
        """From JSON: lists become tuples again, and unknown names are dropped."""
        known = {f.name for f in fields(cls)}
        mine: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return cls(**{k: v for k, v in mine.items() if k in known})
