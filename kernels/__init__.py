"""flashpair's Triton kernels, installed as `flashpair.kernels` and imported only by the implementations that run them.

Bare `triton.jit` functions and plain tables: no autotuner, which needs a driver, and nothing that runs on import.
"""
