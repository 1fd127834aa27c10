"""Every GPU kernel once, on shapes small enough for a sanitizer: several tiles, ragged edges, every schedule.

python bench/gpu_small.py [CRITERION ...]
"""

from __future__ import annotations

import sys

import torch

from flashpair.check import CRITERIA, batch, refusal
from flashpair.dispatch import obstacles

NAMES = (
    "MultiSimilarityLoss",
    "LiftedStructureLoss",
    "GeneralizedLiftedStructureLoss(distance='euclidean')",
    "NPairsLoss",
)


def main(names: tuple[str, ...]) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        x, labels = (t.cuda() for t in batch(200, 72, 4, dtype))
        y, ref_labels = (t.cuda() for t in batch(150, 72, 4, dtype, seed=1))
        for name in names:
            for impl in ("fused", "tiled", "screened", "onchip"):
                if obstacles(impl, x.device) or refusal(name, impl, "cuda"):
                    continue
                criterion = CRITERIA[name](impl=impl)
                criterion(x.requires_grad_(), labels).backward()
                if criterion.takes_references:
                    criterion(x, labels, ref_emb=y.requires_grad_(), ref_labels=ref_labels).backward()
            print(name, dtype, "done", flush=True)
    torch.cuda.synchronize()
    assert x.grad is not None and x.grad.isfinite().all()


if __name__ == "__main__":
    main(tuple(sys.argv[1:]) or NAMES)
