"""flashpair's Triton kernels, installed as `flashpair.backends.triton.kernels`; only its backends import them.

Bare `triton.jit` functions and plain tables: no autotuner, which needs a driver, and nothing that runs on import.
"""
