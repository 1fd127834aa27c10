"""Runs compiled PTX on the CPU, one block at a time, and says what is wrong with it.

parse.py reads the text; machine.py runs a grid, and a block's warps in lockstep; arithmetic.py, moves.py, matrix.py and
warpgroup.py are the instructions; memory.py holds every access against the tensors that were passed and against what
other warps do; launch.py takes the place of a GPU under Triton. Written from NVIDIA's public PTX ISA; what the product's
kernels do not use is refused by name.
"""
