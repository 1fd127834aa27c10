// Rows rounded to int8, and which pairs of a tile their products prove dead. Internal to no instruction set.
//
// A row x is s q + r with whole numbers q in [-127, 127]: s is its step, and |r|, what was lost, is kept. For every
// pair
//   |x_i . x_j - s_i s_j q_i . q_j| <= N_i |r_j| + N_j |r_i|,   N = max(|x|, |s q|)   (Cauchy-Schwarz),
// so that a pair whose estimate plus that bound stays under both anchors' thresholds is dead.
// docs/screened-mining.md has the proof, rounding included: `lost` below is inflated so that no order of summation of
// an exact similarity can exceed the bound.
#pragma once
#include <cstdint>
#include <vector>

namespace flashpair {

constexpr int64_t PANEL = 16;  // rows that stand side by side, 32 bits of each in turn

// One side's rows, padded with zeros to whole panels.
struct Int8Rows {
  int64_t groups;               // of coordinates that fill 32 bits
  std::vector<int32_t> panels;  // (panels, groups, PANEL)
  std::vector<int32_t> shift;   // what products with this row as the signed factor start from
  std::vector<float> step, lost, norm;
  std::vector<float> half;  // half the squared norm for Euclidean distances, else 0

  Int8Rows(int64_t n, int64_t d, int64_t depth) : groups((d + depth - 1) / depth) {
    const int64_t padded = (n + PANEL - 1) / PANEL * PANEL;
    panels.resize(padded * groups), shift.resize(padded);
    for (auto* of : {&step, &lost, &norm, &half}) of->resize(padded);
  }
};

// Where an anchor has no use for a pair: similarities of at most `low` (N,), and, where not null, of at least `high`.
// Distances stand as similarities minus halves, -d^2 / 2. NaN: there is no such bound.
struct Thresholds {
  const float *low, *high;
};

// A block of pairs; columns from `cols` on take no part. both_ends: the columns' anchors want pairs, too.
struct Int8Tile {
  int64_t r0, rows, c0, cols;
  bool both_ends;
};

// The pairs of a tile's row that are none of the side's: columns [lo, hi) of the references, and the row's own.
struct Excluded {
  const int64_t *lo, *hi;  // (N,) or null
  bool self;
};

struct Int8Kernels {
  int64_t depth;  // coordinates in 32 bits
  // Rows [first, last), `first` on a panel's edge; square (N,): squared norms, null for dot products.
  void (*round_floats)(const float* x, int64_t first, int64_t last, int64_t d, const float* square, Int8Rows& to);
  void (*round_doubles)(const double* x, int64_t first, int64_t last, int64_t d, const double* square, Int8Rows& to);
  // Lists row << 16 | column of each pair that is not proved dead; -1 when they are more than `capacity`.
  int64_t (*candidates)(const Int8Rows& x, const Int8Rows& y, const Thresholds&, const Excluded&, const Int8Tile&,
                        int32_t* entry, int64_t capacity);
};

#define FLASHPAIR_DECLARE(isa) \
  namespace isa {              \
  Int8Kernels int8_kernels();  \
  }
FLASHPAIR_DECLARE(baseline)
#ifdef FLASHPAIR_X86_64
FLASHPAIR_DECLARE(avx2)
FLASHPAIR_DECLARE(avx512)
FLASHPAIR_DECLARE(avx512vnni)
#endif
#undef FLASHPAIR_DECLARE

}  // namespace flashpair
