"""Triton kernels on a GPU: `fused`, `tiled` and `screened`. The kernels themselves are in kernels/ at the top level.

Importing this folder imports nothing of Triton; importing one of its modules does.
"""
