"""C++ kernels on the CPU: `tiled` goes through all pairs, `screened` first proves most of them irrelevant in int8."""
