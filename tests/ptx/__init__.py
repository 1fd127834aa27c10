"""Runs compiled PTX on the CPU, one block at a time, and says what is wrong with it.

parse.py reads the text; control.py makes a program of it, and machine.py runs a grid, a block's warps in lockstep.
arithmetic.py, moves.py, matrix.py and warpgroup.py are the instructions. tensors.py and shared.py hold every access
against the tensors that were passed, and against what others do. launch.py takes the place of a GPU under Triton,
engine.py of one under the product; cases.py, trials.py and mutants.py are what is run. Written from NVIDIA's public
PTX ISA; instructions that the product's kernels do not use are refused by name.
"""
