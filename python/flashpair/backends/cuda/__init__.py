"""CUDA C++ on a GPU: `onchip` computes the loss and the gradient of a small batch in one launch (csrc/cuda)."""
