"""The implementations of row reductions: `reference` in PyTorch, C++ on the CPU, Triton and CUDA C++ on a GPU.

The public word of a backend is its module's name: ``impl="tiled"`` is `cpu/tiled.py` or `triton/tiled.py`. A folder of
backends knows `core` and what stands here beside it, never another folder of backends.
"""
