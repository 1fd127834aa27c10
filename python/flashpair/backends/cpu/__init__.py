"""C++ kernels on the CPU: `tiled` computes all pairs; `screened` first excludes most pairs by int8 products."""
