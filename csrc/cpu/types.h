// Plain data shared by the binding and by the kernels of every instruction set. Nothing here owns memory.
#pragma once
#include <cstdint>
#include <vector>

namespace flashpair {

// Lists that Python has, too, which compares its words with those that the module exports.
#define FLASHPAIR_OPS LOGSUMEXP, SUM, MIN, MAX, COUNT
#define FLASHPAIR_SIDES POSITIVES, NEGATIVES, ALL
#define FLASHPAIR_TRANSFORMS IDENTITY, SOFTPLUS, HINGE, SQUARED_HINGE, TRIANGLE, LIFTED

enum Op : int { FLASHPAIR_OPS };
enum Side : int { FLASHPAIR_SIDES };
enum Transform : int { FLASHPAIR_TRANSFORMS, PROGRAM };

constexpr int64_t STRIDE = 32;     // numbers, two vectors at the least, up to which rows of a tile are written
constexpr int64_t DEPTH = 128;     // coordinates whose products are one chain of additions
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

#define FLASHPAIR_STEP_OPS                                                                                 \
  SCALED, OWN, CONSTANT, ADD, SUBTRACT, MULTIPLY, DIVIDE, MAXIMUM, MINIMUM, NEGATE, EXP, LOG, LOG1P, SQRT, \
      SOFTPLUS_OF, SIGMOID, ABSOLUTE, ABOVE, CHOOSE, EXPM1
enum StepOp : int { FLASHPAIR_STEP_OPS };
// One number of a program, from earlier ones: op(a, b), CHOOSE: c ? a : b; ABOVE: a > b, 1 or 0.
struct Step {
  int op, a, b, c;
  double constant;
};
constexpr int MAX_STEPS = 96;
// A transform that came as a list of steps (python/flashpair/core/expression.py): phi is step `value`, which needs no
// later one; its derivatives in s = scale * z and in the anchor's offset are two others.
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
  T* peak;         // (N,) logsumexp: directed z (below) that the total is relative to; or the running extreme of z
  double* total;   // (N,) sum relative to the peak, sum, or count
  int64_t* index;  // (N,) column of the extreme, or null
  const T *value, *grad;   // (N,) the values, and dL/dr
  const T *top, *rest;     // (N,) of logsumexp: value = scale * top + rest; rest is inf of an empty set
  double* grad_scale;      // one number a row block
  T* grad_offset;          // (N,) or null
  T* grad_ref_offset;      // (M,) or null
  const Program* program;  // of transform PROGRAM

  // A logsumexp's z (of a transform: phi, as it is) in the direction in which terms grow, and what it is multiplied by
  // then. Its exponents are
  // (directed z - directed top) * steepness: the difference comes first, so that the largest term is e^0 at any
  // magnitude, however a compiler rounds a multiplication beside an addition.
  T direction() const { return transform == IDENTITY && scale < 0 ? T(-1) : T(1); }
  T steepness() const { return transform == IDENTITY ? direction() * scale : T(1); }
};

// A block of pairs: rows r0 + [0, rows) against columns c0 + [0, cols), z at row stride ld, a multiple of STRIDE.
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

// What `weigh` has found: a weight that is not 0, and one of near pairs.
struct Weights {
  bool any, near;
};

template <class T>
struct Kernels {
  // The tile's z. scratch: as large as the tile; panel: min(D, DEPTH) rows of as many columns.
  void (*similarities)(const Problem<T>&, const Tile<T>&, const T* x, const T* y, int64_t d, T* scratch, T* panel);
  void (*reduce)(const Problem<T>&, const Reduction<T>*, int count, const Tile<T>&);
  // The number of live pairs, listed; -1 when they are more than the list's capacity.
  int64_t (*list_live)(const Problem<T>&, const Reduction<T>&, const Tile<T>&, const Live<T>&);
  // z of listed pairs, the same bits as in a tile.
  void (*similar)(const Problem<T>&, const Tile<T>&, const int32_t* entry, int64_t count, const T* x, const T* y,
                  int64_t d, T* z);
  // The same of row rows[k] and reference cols[k].
  void (*pair_similarities)(const Problem<T>&, const T* x, const T* y, int64_t d, int64_t count, const int64_t* rows,
                            const int64_t* cols, T* z);
  // `reduce` of listed pairs alone.
  void (*reduce_listed)(const Problem<T>&, const Reduction<T>&, const Tile<T>&, const Listed<T>&);
  // Lists those of the pairs that a window of some reduction lets through; returns as `list_live`.
  int64_t (*keep_live)(const Reduction<T>*, int count, const Tile<T>&, const Listed<T>&, const Live<T>&);
  // w: dL/dS of each pair, times z's derivative in S. What a Euclidean distance pulls along a row's own x is added to
  // row_pull (N,) and ref_pull (M,), null where not wanted, but for near pairs, whose pull is left in the tile's z.
  Weights (*weigh)(const Problem<T>&, const Reduction<T>*, int count, const Tile<T>&, int64_t block, T* w, T* row_pull,
                   T* ref_pull);
  // The gradients of near pairs, whose pull `weigh` has left in z; dx (N, D) and dy (M, D), null where not wanted.
  void (*scatter_near)(const Tile<T>&, const T* x, const T* y, int64_t d, T* dx, T* dy);
  // The same for listed pairs, whose gradients go straight to dx (N, D) and dy (M, D), null where not wanted.
  void (*scatter)(const Problem<T>&, const Reduction<T>&, const Tile<T>&, const Live<T>&, int64_t live, int64_t block,
                  const T* x, const T* y, int64_t d, T* dx, T* dy);
  // to (rows, D) += w from (inner, D): w is (rows, inner), or (inner, rows) and read transposed.
  void (*add_product)(const T* w, int64_t ld, bool transpose, int64_t rows, const T* from, int64_t inner, int64_t d,
                      T* to);
  bool quick_products;  // add_product is as fast as a vendor's
};

}  // namespace flashpair
