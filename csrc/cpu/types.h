// Plain data that the binding and the kernels of every instruction set share. Nothing here owns memory.
#pragma once
#include <cstdint>
#include <vector>

// Functions of headers that several instruction sets compile are inlined, so that code of one instruction set cannot be
// linked into another. ALWAYS is for lambdas, which take no `inline`.
#define ALWAYS __attribute__((always_inline))
#define INLINE inline ALWAYS

namespace flashpair {
namespace {
template <class T>
constexpr T INF = static_cast<T>(__builtin_inff());
}  // namespace

// Python has these lists, too. The module exports their words, and Python compares them with its own when it loads it.
#define FLASHPAIR_OPS LOGSUMEXP, SUM, MIN, MAX, COUNT
#define FLASHPAIR_SIDES POSITIVES, NEGATIVES, ALL
#define FLASHPAIR_TRANSFORMS IDENTITY, SOFTPLUS, HINGE, SQUARED_HINGE, TRIANGLE, LIFTED

enum Op : int { FLASHPAIR_OPS };
enum Side : int { FLASHPAIR_SIDES };
enum Transform : int { FLASHPAIR_TRANSFORMS, PROGRAM };

constexpr int64_t STRIDE = 32;     // rows of a tile are written up to a multiple of this: two vectors at least
constexpr int64_t K_BLOCK = 128;   // coordinates whose products are one chain of additions
constexpr int64_t MAX_TILE = 512;  // rows or columns of a tile

// N anchors against M references, both sorted by label. Row i's positives are the columns [pos_begin_i, pos_end_i); its
// negatives are the other columns of [0, num_valid).
// square: the references are the anchors, and i is no pair of itself.
// split (of a square problem): the anchors are two groups, rows [0, split) and [split, N), each sorted by itself. The
// pairs are those of one group with the other, so a row's interval lies in the other group. Where the first group is
// empty, split is N.
template <class T>
struct Problem {
  int64_t n, m, num_valid;
  bool square;
  const int64_t *pos_begin, *pos_end;  // (N,)
  const int64_t* perm;                 // (M,) each reference's index in the caller's order
  const T *row_sq_norm, *ref_sq_norm;  // (N,), (M,) squared norms; null for dot products
  bool squared = false;                // with squared norms: z is the squared distance
  int64_t split = 0;                   // 0: one group
};

#define FLASHPAIR_STEP_OPS                                                                                 \
  SCALED, OWN, CONSTANT, ADD, SUBTRACT, MULTIPLY, DIVIDE, MAXIMUM, MINIMUM, NEGATE, EXP, LOG, LOG1P, SQRT, \
      SOFTPLUS_OF, SIGMOID, ABSOLUTE, ABOVE, CHOOSE, EXPM1
enum StepOp : int { FLASHPAIR_STEP_OPS };
// One value of an expression, computed from earlier ones: op(a, b). CHOOSE: c > 0 ? a : b. ABOVE: a > b ? 1 : 0.
struct Step {
  int op, a, b, c;
  double constant;
};
constexpr int MAX_STEPS = 96;
// A user's transform phi as a list of steps (python/flashpair/core/expression.py). Step `value` is phi and needs no
// later step. Steps `slope` and `d_offset` are its derivatives in s = scale * z and in the anchor's offset.
struct Program {
  std::vector<Step> steps;
  int value, slope, d_offset;
};

// One row reduction: its constants, its forward state, and what its backward reads. In a square problem one array
// serves rows and columns.
template <class T>
struct Reduction {
  int op, side, transform;
  T scale, shift;                // shift: the offset where `offset` is null
  const T *offset, *ref_offset;  // (N,), (M,) or null
  const T *lower, *upper;        // (N,) or null: the mining window, lower < z < upper
  int lower_of, upper_of;        // the reduction whose values, plus the shift below, are the bound; -1: none
  double lower_shift, upper_shift;
  // Forward state.
  T* row_max;       // (N,) logsumexp: the largest directed z (see direction); of min and max the extreme z so far
  double* row_sum;  // (N,) logsumexp: the sum of exponentials relative to row_max; else the sum or the count
  int64_t* index;   // (N,) the column that attains the extreme, or null
  // What backward reads.
  const T *value, *grad;     // (N,) the values, and dL/dvalue
  const T *top_z, *log_sum;  // (N,) of a logsumexp: value = scale * top_z + log_sum; log_sum is inf of an empty set
  // What backward adds to.
  double* grad_scale;      // one number a row block
  T* grad_offset;          // (N,) or null
  T* grad_ref_offset;      // (M,) or null
  const Program* program;  // of transform PROGRAM

  // A logsumexp's exponents are (directed z - directed top_z) * steepness, where directed z grows as the terms do. The
  // difference is taken first, so that the largest term is e^0 at any magnitude, whether or not the compiler fuses a
  // multiplication with an addition. Of a transform, phi takes z's place as it is.
  INLINE T direction() const { return transform == IDENTITY && scale < 0 ? T(-1) : T(1); }
  INLINE T steepness() const { return transform == IDENTITY ? direction() * scale : T(1); }
};

// A block of pairs: rows r0 + [0, rows) against columns c0 + [0, cols). z has row stride ld, a multiple of STRIDE.
// symmetric (square problems): the gradient weight of (i, j) is what both anchors, i and j, give to S_ij.
// mirror (symmetric tiles off the diagonal): the transposed block is never visited, so this tile also serves the
// reductions of its columns' anchors.
template <class T>
struct Tile {
  T* z;
  int64_t ld, r0, rows, c0, cols;
  bool symmetric, mirror;
};

// A pair inside a tile, packed as row << 16 | column.
INLINE int32_t pack_entry(int64_t row, int64_t column) { return static_cast<int32_t>(row << 16 | column); }
INLINE int64_t entry_row(int32_t entry) { return entry >> 16; }
INLINE int64_t entry_column(int32_t entry) { return entry & 0xffff; }

// Where a tile's kept pairs are written: those that some mining window lets through.
template <class T>
struct KeptPairs {
  int32_t* entry;
  T* z;
  int64_t capacity;
};

// Candidates: pairs of a tile that passed the screen, with their z, in the order of their rows.
template <class T>
struct Candidates {
  const int32_t* entry;
  const T* z;
  int64_t count;
};

// Whether `backward` wrote any weight that is not 0, and whether any pair is close (euclidean.h).
struct BackwardResult {
  bool any_weight, any_close;
};

// The kernels of one instruction set. Outputs that are not wanted are null.
template <class T>
struct Kernels {
  // The tile's z. scratch: as large as the tile; panel: min(D, K_BLOCK) rows of as many columns.
  void (*similarities)(const Problem<T>&, const Tile<T>&, const T* x, const T* y, int64_t d, T* scratch, T* panel);
  // Forward: accumulates a tile's pairs into the reductions' state.
  void (*reduce)(const Problem<T>&, const Reduction<T>*, int count, const Tile<T>&);
  // Lists the pairs that the window lets through. Returns how many, or -1 where they exceed the capacity.
  int64_t (*list_kept)(const Problem<T>&, const Reduction<T>&, const Tile<T>&, const KeptPairs<T>&);
  // z of a tile's candidates, the same bits as `similarities` has.
  void (*candidate_similarities)(const Problem<T>&, const Tile<T>&, const int32_t* entry, int64_t count, const T* x,
                                 const T* y, int64_t d, T* z);
  // The same of row rows[k] and reference cols[k].
  void (*pair_similarities)(const Problem<T>&, const T* x, const T* y, int64_t d, int64_t count, const int64_t* rows,
                            const int64_t* cols, T* z);
  // Forward over candidates alone.
  void (*reduce_candidates)(const Problem<T>&, const Reduction<T>&, const Tile<T>&, const Candidates<T>&);
  // Lists the candidates that a window of some reduction lets through. Returns as `list_kept`.
  int64_t (*list_kept_candidates)(const Reduction<T>*, int count, const Tile<T>&, const Candidates<T>&,
                                  const KeptPairs<T>&);
  // Backward: w = dL/dS of each pair. The part of a Euclidean distance's gradient along each row itself is added to
  // row_norm_grad (N,) and ref_norm_grad (M,). Close pairs have w = 0, and their factor is left in the tile's z.
  BackwardResult (*backward)(const Problem<T>&, const Reduction<T>*, int count, const Tile<T>&, int64_t block, T* w,
                             T* row_norm_grad, T* ref_norm_grad);
  // Adds the gradients of close pairs, whose factor `backward` has left in z, to dx (N, D) and dy (M, D).
  void (*scatter_close)(const Tile<T>&, const T* x, const T* y, int64_t d, T* dx, T* dy);
  // Backward of a tile's `count` kept pairs: adds their gradients to dx (N, D) and dy (M, D).
  void (*scatter_kept)(const Problem<T>&, const Reduction<T>&, const Tile<T>&, const KeptPairs<T>&, int64_t count,
                       int64_t block, const T* x, const T* y, int64_t d, T* dx, T* dy);
  // to (rows, D) += w from (inner, D): w is (rows, inner), or (inner, rows) and read transposed.
  void (*add_product)(const T* w, int64_t ld, bool transpose, int64_t rows, const T* from, int64_t inner, int64_t d,
                      T* to);
  bool fast_products;  // add_product is as fast as a vendor's BLAS
};

}  // namespace flashpair
