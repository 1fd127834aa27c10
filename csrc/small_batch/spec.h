// A whole loss as the backends that compute it in one call are told of it: `onchip`, and `tiled` on the CPU.
//
// Plain data: constants of the call, and addresses. Nothing here owns memory or computes.
#pragma once
#include <array>
#include <cstdint>

namespace flashpair::small_batch {

// Python has these lists, too. A module exports their words, and Python compares them with its own when it loads it.
#define FLASHPAIR_LOSSES MULTI_SIMILARITY, LIFTED_STAR, LIFTED, N_PAIR, ONE_VS_ONE, ALL_PAIRS
#define FLASHPAIR_AVERAGINGS MEAN, SUM, NONE, MEAN_VALID, NONZERO
#define FLASHPAIR_NUMBERS FLOAT64, FLOAT32, BFLOAT16, FLOAT16
#define FLASHPAIR_WORDS_(...) #__VA_ARGS__
#define FLASHPAIR_WORDS(...) FLASHPAIR_WORDS_(__VA_ARGS__)

enum Loss : int { FLASHPAIR_LOSSES };
enum Averaging : int { FLASHPAIR_AVERAGINGS };
enum Number : int { FLASHPAIR_NUMBERS };  // the embeddings' type; gradients are float64 or float32
enum Side : int { POSITIVE, NEGATIVE, NO_PAIR = -1 };

// What stays the same from call to call: a loss and its shapes. Arrays of two are indexed by Side.
struct Spec {
  int n, m, d;  // N anchors, M references, D
  int rows;     // onchip: how many a block owns: 1, 2, 4, 8 or 16
  int number, loss, averaging;
  bool square;     // the references are the anchors, and i is no pair of itself
  bool normalize;  // rows are divided by their norms
  bool euclidean;  // z is a pair's Euclidean distance, else its dot product
  bool one_pair;   // each class takes part with one anchor and one positive of it alone
  bool mined;      // Multi-Similarity's mining windows, `epsilon` wide
  double scale[2], shift[2], epsilon;
  bool want_dy;  // the references' gradient is wanted
};

// From the tuples that Python passes: the shape, and code and numbers of engine/small_batch.py's Spec.
inline Spec make_spec(const std::array<int, 5>& shape, const std::array<int, 7>& code,
                      const std::array<double, 5>& numbers, bool want_dy) {
  const auto [n, m, d, number, square] = shape;
  const auto [rows, loss, averaging, normalize, euclidean, one_pair, mined] = code;
  const auto [pos_scale, neg_scale, pos_shift, neg_shift, epsilon] = numbers;
  Spec spec{};
  spec.n = n, spec.m = m, spec.d = d, spec.number = number, spec.square = square;
  spec.rows = rows, spec.loss = loss, spec.averaging = averaging;
  spec.normalize = normalize, spec.euclidean = euclidean, spec.one_pair = one_pair, spec.mined = mined;
  spec.scale[POSITIVE] = pos_scale, spec.scale[NEGATIVE] = neg_scale;
  spec.shift[POSITIVE] = pos_shift, spec.shift[NEGATIVE] = neg_shift;
  spec.epsilon = epsilon, spec.want_dy = want_dy;
  return spec;
}

// Addresses on the device that computes. T is double for FLOAT64, else float. Results that are not wanted are null.
struct Tensors {
  const void *x, *y;                   // (N, D), (M, D); in a square problem y is x
  const int64_t *labels, *ref_labels;  // (N,), (M,)
  const void* upstream;                // (N,) T, dL/d(row's loss); null where the loss is one number
  void *loss, *share;                  // () T: the loss, or with NONE (N,); valid rows over the loss's denominator
  void *dx, *dy;                       // (N, D), (M, D) T
  void* workspace;                     // onchip: Layout::workspace bytes, 16-byte aligned; contents do not matter
};

}  // namespace flashpair::small_batch
