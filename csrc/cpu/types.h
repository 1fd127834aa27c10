// Plain data shared by the binding and by the kernels of every instruction set. Nothing here owns memory.
#pragma once
#include <cstdint>
#include <vector>

namespace flashpair {

enum Op : int { LOGSUMEXP, SUM, MIN, MAX, COUNT };
enum Side : int { POSITIVES, NEGATIVES, ALL };
enum Transform : int { IDENTITY, SOFTPLUS, HINGE, SQUARED_HINGE, TRIANGLE, LIFTED, PROGRAM };

constexpr int64_t MAX_TILE = 512;  // rows or columns of a tile, and entries of a tile's list of live pairs at a time

// N anchors sorted by label against M references sorted by label: row i's positives are columns [lo_i, hi_i),
// its negatives the rest of [0, end). Square: the references are the anchors, and i is no pair of itself.
// Split (square problems): two groups of anchors, rows [0, split) and [split, N), each sorted by itself; the pairs are
// those of one group with the other, so an interval lies in the other group. An empty first group is split = N, too.
template <class T>
struct Problem {
  int64_t n, m, end;
  bool square;
  const int64_t *lo, *hi;            // (N,)
  const int64_t* order;              // (M,) place of each reference in the caller's order
  const T *row_square, *ref_square;  // (N,), (M,) squared norms, null for dot products
  bool squared = false;              // with them: z is the squared distance
  int64_t split = 0;                 // 0: one group
};

enum StepOp : int {
  SCALED,
  OWN,
  CONSTANT,
  ADD,
  SUBTRACT,
  MULTIPLY,
  DIVIDE,
  MAXIMUM,
  MINIMUM,
  NEGATE,
  EXP,
  LOG,
  LOG1P,
  SQRT,
  SOFTPLUS_OF,
  SIGMOID,
  ABSOLUTE,
  ABOVE,
  CHOOSE,
  EXPM1
};
// One number of a program, from earlier ones: op(a, b), CHOOSE: c ? a : b; ABOVE: a > b, 1 or 0.
struct Step {
  int op, a, b, c;
  double constant;
};
constexpr int MAX_STEPS = 96;
// A transform that came as a list of steps (python/flashpair/programs.py): phi is step `value`, which needs no later
// one; its derivatives in s = scale * z and in the anchor's offset are two others.
struct Program {
  std::vector<Step> steps;
  int value, slope, own_slope;
};

// One row reduction, its forward state and what its backward reads. In a square problem one array serves rows and
// columns.
template <class T>
struct Reduction {
  int op, side, transform;
  T scale, shift;                // shift: the offset where there is no vector of them
  const T *offset, *ref_offset;  // (N,), (M,) or null
  const T *lower, *upper;        // (N,) or null
  int lower_of, upper_of;        // the reduction whose values, shifted, are the bound instead; -1: none
  double lower_shift, upper_shift;
  T* peak;                 // (N,) running max of scale * z (logsumexp), or the running extreme of z
  double* total;           // (N,) sum relative to the peak, sum, or count
  int64_t* index;          // (N,) column of the extreme, or null
  const T *value, *grad;   // (N,) logsumexp without offset, and dL/dr
  double* grad_scale;      // one number a row block
  T* grad_offset;          // (N,) or null
  T* grad_ref_offset;      // (M,) or null
  const Program* program;  // of transform PROGRAM
};

// A block of pairs: rows r0 + [0, rows) against columns c0 + [0, cols), z at row stride ld, a multiple of a vector.
// symmetric (square problems): the weight of (i, j) holds what both anchors, i and j, give to S_ij.
// mirror (their tiles off the diagonal): the transposed block is never visited, so the tile serves its columns'
// anchors.
template <class T>
struct Tile {
  T* z;
  int64_t ld, r0, rows, c0, cols;
  bool symmetric, mirror;
};

// Pairs of a tile that some mining window lets through: row << 16 | column inside the tile, and z.
template <class T>
struct Live {
  int32_t* entry;
  T* z;
  int64_t capacity;
};

// Pairs of a tile listed with their z, in the order of their rows.
template <class T>
struct Listed {
  const int32_t* entry;
  const T* z;
  int64_t count;
};

template <class T>
struct Kernels {
  // z: dot products in, Euclidean distances out (nothing to do for dot products).
  void (*distances)(const Problem<T>&, const Tile<T>&);
  void (*reduce)(const Problem<T>&, const Reduction<T>*, int count, const Tile<T>&);
  // The number of live pairs, listed; -1 when they are more than the list's capacity.
  int64_t (*list_live)(const Problem<T>&, const Reduction<T>&, const Tile<T>&, const Live<T>&);
  // z of listed pairs, by a sum of each pair's own: the same bits from both ends, and wherever they are listed.
  void (*similar)(const Problem<T>&, const Tile<T>&, const int32_t* entry, int64_t count, const T* x, const T* y,
                  int64_t d, T* z);
  // `reduce` of listed pairs alone.
  void (*reduce_listed)(const Problem<T>&, const Reduction<T>&, const Tile<T>&, const Listed<T>&);
  // Lists those of the pairs that a window of some reduction lets through; returns as `list_live`.
  int64_t (*keep_live)(const Reduction<T>*, int count, const Tile<T>&, const Listed<T>&, const Live<T>&);
  // w: dL/dS of each pair, times z's derivative in S. What a Euclidean distance pulls along a row's own x is added to
  // row_pull (N,) and ref_pull (M,), null where not wanted. False when every weight is zero.
  bool (*weigh)(const Problem<T>&, const Reduction<T>*, int count, const Tile<T>&, int64_t block, T* w, T* row_pull,
                T* ref_pull);
  // The same for listed pairs, whose gradients go straight to dx (N, D) and dy (M, D), null where not wanted.
  void (*scatter)(const Problem<T>&, const Reduction<T>&, const Tile<T>&, const Live<T>&, int64_t live, int64_t block,
                  const T* x, const T* y, int64_t d, T* dx, T* dy, T* row_pull, T* ref_pull);
  // The products, for a process without BLAS.
  void (*dot_products)(const T* x, int64_t rows, const T* y, int64_t cols, int64_t d, T* z, int64_t ld);
  void (*add_product)(const T* w, int64_t ld, bool transpose, int64_t rows, const T* y, int64_t cols, int64_t d, T* dx);
};

}  // namespace flashpair
