"""CUDA C++ on a GPU: `onchip` computes a small batch's loss and gradient in one launch (csrc/cuda)."""
