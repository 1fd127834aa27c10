// What the binding and the kernel of `onchip` share: plain data, no CUDA header, nothing that owns memory.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>

namespace flashpair::onchip {

enum Loss : int { MULTI_SIMILARITY, LIFTED_STAR, LIFTED, N_PAIR, ONE_VS_ONE, ALL_PAIRS };
enum Averaging : int { MEAN, SUM, NONE, MEAN_VALID, NONZERO };
enum Number : int { FLOAT64, FLOAT32, BFLOAT16, FLOAT16 };  // of embeddings; gradients are float64 or float32
enum Side : int { POSITIVE, NEGATIVE, NO_PAIR = -1 };

// What stays the same from call to call: a loss and its shapes. Arrays of two are indexed by Side.
struct Job {
  int n, m, d;  // N anchors, M references, D
  int rows;     // that a block owns: 1, 2, 4, 8 or 16
  int number, loss, averaging;
  bool square;     // the references are the anchors, and i is no pair of itself
  bool unit;       // rows are divided by their norms
  bool euclidean;  // z is a pair's Euclidean distance, else its dot product
  bool one_pair;   // a class takes part with one anchor and one positive of it alone
  bool mined;      // Multi-Similarity's windows, `epsilon` wide
  double scale[2], shift[2], epsilon;
  bool want_dy;  // references have blocks of their own, for their gradient
};

// Addresses on the device. T is double for FLOAT64, else float. Results that are not wanted are null.
struct Tensors {
  const void *x, *y;                   // (N, D), (M, D); y is x in a square problem
  const int64_t *labels, *ref_labels;  // (N,), (M,)
  const void* upstream;                // (N,) T, dL/d(row's loss), or null: the loss is one number
  void *loss, *share;                  // () T: the loss, or with NONE (N,); valid rows over what it was divided by
  void *dx, *dy;                       // (N, D), (M, D) T
  void* workspace;                     // Layout::workspace bytes, 16-byte aligned; contents do not matter
};

struct Layout {
  int blocks, threads;
  int64_t shared, workspace;  // bytes a block, bytes in all
};

struct Limits {
  int processors, shared, cooperative;
};

// These return what went wrong, empty if nothing did. The last two are for the current device.
std::string limits(int device, Limits& found);
std::string lay_out(const Job& job, const Limits& device, Layout& found);  // and makes the kernel ready
std::string launch(const Job& job, const Layout& layout, const Tensors& tensors, void* stream);

}  // namespace flashpair::onchip
