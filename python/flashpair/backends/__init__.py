"""The implementations of row reductions: `reference` in PyTorch, C++ on the CPU, Triton and CUDA C++ on a GPU.

The public name of a backend is the name of its module: ``impl="tiled"`` is `cpu/tiled.py` or `triton/tiled.py`. A
folder of backends may import `core` and the modules beside it in this folder, but no other folder of backends.
"""
