// A whole loss as the schedules that compute it at once are told of it: `onchip`, and `tiled` on the CPU.
#pragma once
#include <array>
#include <cstdint>

namespace flashpair::whole {

// Lists that Python has, too: a module exports their words, which Python compares with its own when it loads one.
#define FLASHPAIR_LOSSES MULTI_SIMILARITY, LIFTED_STAR, LIFTED, N_PAIR, ONE_VS_ONE, ALL_PAIRS
#define FLASHPAIR_AVERAGINGS MEAN, SUM, NONE, MEAN_VALID, NONZERO
#define FLASHPAIR_NUMBERS FLOAT64, FLOAT32, BFLOAT16, FLOAT16
#define FLASHPAIR_WORDS_(...) #__VA_ARGS__
#define FLASHPAIR_WORDS(...) FLASHPAIR_WORDS_(__VA_ARGS__)

enum Loss : int { FLASHPAIR_LOSSES };
enum Averaging : int { FLASHPAIR_AVERAGINGS };
enum Number : int { FLASHPAIR_NUMBERS };  // of embeddings; gradients are float64 or float32
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

// From what Python passes: shape (n, m, d, number, square), engine/small_batch.py's Spec (code, numbers), and want_dy.
inline Job job_of(const std::array<int, 5>& shape, const std::array<int, 7>& code, const std::array<double, 5>& numbers,
                  bool want_dy) {
  Job job{};
  job.n = shape[0], job.m = shape[1], job.d = shape[2], job.number = shape[3], job.square = shape[4];
  job.rows = code[0], job.loss = code[1], job.averaging = code[2];
  job.unit = code[3], job.euclidean = code[4], job.one_pair = code[5], job.mined = code[6];
  for (int side : {POSITIVE, NEGATIVE}) job.scale[side] = numbers[side], job.shift[side] = numbers[2 + side];
  job.epsilon = numbers[4], job.want_dy = want_dy;
  return job;
}

// Addresses, on the device that computes. T is double for FLOAT64, else float. Results that are not wanted are null.
struct Tensors {
  const void *x, *y;                   // (N, D), (M, D); y is x in a square problem
  const int64_t *labels, *ref_labels;  // (N,), (M,)
  const void* upstream;                // (N,) T, dL/d(row's loss), or null: the loss is one number
  void *loss, *share;                  // () T: the loss, or with NONE (N,); valid rows over what it was divided by
  void *dx, *dy;                       // (N, D), (M, D) T
  void* workspace;                     // of onchip: Layout::workspace bytes, 16-byte aligned; contents do not matter
};

}  // namespace flashpair::whole
