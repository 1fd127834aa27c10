"""flashpair's Triton kernels, installed as `flashpair.kernels` and imported only by the implementations that run them.

None are written yet: `impl="fused"` refuses with that reason, and `python -m flashpair info` says so.
"""
