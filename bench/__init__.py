"""Time and memory of a training step, against peers and the bare matrix products: `python -m bench`.

Run from the repository root; nothing here is installed. How one run goes:

    options -> suite: for each (N, D)
        probe    each variant once in a fresh process, under limits: may it run, what memory does it take
        check    loss and gradient against float64; what is wrong is not timed
        measure  the rest in one process, interleaved round by round
    -> report: JSON with machine information, a table, a plot

`python -m bench.family` does the same for every loss of the library (family_cases.py), in one table.
`python -m bench.weights` draws what each loss gives to a pair, and dependence.py finds what that depends on.
`python -m bench.gpu_proof` brings its own copy of flashpair, and runs where none is installed.
"""

import importlib.util

if importlib.util.find_spec("flashpair"):
    from flashpair.core.extras import need

    need("bench", "bench", "matplotlib", "numpy", "rich")
