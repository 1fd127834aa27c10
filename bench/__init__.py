"""Time and memory of a training step, against baselines and the bare matrix products: `python -m bench STUDY`.

Run from the repository root; nothing here is installed. How one run goes:

    options -> suite: for each (N, D)
        try      each variant once in a fresh process, under limits: may it run, what memory does it take
        check    loss and gradient against float64; a wrong variant is not timed
        measure  the rest in one process, interleaved round by round
    -> report: JSON with machine information, a table, a plot

`python -m bench family` does the same for every loss of the library (family_cases.py), in one table.
`python -m bench weights` draws the weight that each loss gives to a pair; dependence.py finds what it depends on.
`python -m bench.gpu_proof` brings its own copy of flashpair, and runs where none is installed.
"""

import importlib.util
import os
import sys

PROOF = "FLASHPAIR_GPU_PROOF"  # set in processes of bench.gpu_proof, which draws nothing and may have torch alone
if any(word.startswith("bench.gpu_proof") for word in sys.orig_argv):
    os.environ[PROOF] = "1"  # processes that it starts have another command line
if PROOF not in os.environ and importlib.util.find_spec("flashpair"):
    from flashpair.core.extras import need

    need("bench", "bench", "matplotlib", "numpy", "rich")
