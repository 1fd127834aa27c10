// Rows rounded to int8, and which pairs of a tile their products prove irrelevant. Shared by all instruction sets.
//
// A row x is s q + r: q are integers in [-127, 127], s is the row's step, and |r|, the residual, is kept. For all pairs
//   |x_i . x_j - s_i s_j q_i . q_j| <= N_i |r_j| + N_j |r_i|,   N = max(|x|, |s q|)   (Cauchy-Schwarz).
// A pair whose estimate plus that bound stays under both anchors' thresholds is irrelevant; the others are candidates.
// docs/screened-mining.md has the proof, rounding included: `residual` below is inflated so that no order in which an
// exact similarity is summed can exceed the bound.
#pragma once
#include <cstdint>
#include <vector>

namespace flashpair {

constexpr int64_t PANEL = 16;  // rows that stand side by side, one word (32 bits) of each in turn

// The rows of one side, padded with zeros to full panels.
struct Int8Rows {
  int64_t words;                            // of 32 bits, which hold a row's coordinates
  std::vector<int32_t> panels;              // (panels, words, PANEL)
  std::vector<int32_t> init;                // where products with this row as the signed factor start from
  std::vector<float> step, residual, norm;  // s, |r| and N above
  std::vector<float> half_sq_norm;          // half the squared norm for Euclidean distances, else 0

  Int8Rows(int64_t n, int64_t d, int64_t coords_per_word) : words((d + coords_per_word - 1) / coords_per_word) {
    const int64_t padded = (n + PANEL - 1) / PANEL * PANEL;
    panels.resize(padded * words), init.resize(padded);
    for (auto* numbers : {&step, &residual, &norm, &half_sq_norm}) numbers->resize(padded);
  }
};

// The similarities with which a pair is of no use to an anchor: at most `low` (N,), and, where not null, at least
// `high`. Distances stand as similarities minus half the squared norms, -d^2 / 2. NaN: there is no such bound.
struct Thresholds {
  const float *low, *high;
};

// A block of pairs: rows r0 + [0, rows) against columns c0 + [0, cols). symmetric: the columns' anchors use pairs, too.
struct Int8Tile {
  int64_t r0, rows, c0, cols;
  bool symmetric;
};

// The pairs of row i that are not of the reductions' side: the columns [pos_begin_i, pos_end_i), and i itself if
// `self`.
struct Excluded {
  const int64_t *pos_begin, *pos_end;  // (N,) or null
  bool self;
};

struct Int8Kernels {
  int64_t coords_per_word;
  // Round rows [first, last), where `first` begins a panel. sq_norm (N,): squared norms, null for dot products.
  void (*quantize_floats)(const float* x, int64_t first, int64_t last, int64_t d, const float* sq_norm, Int8Rows& to);
  void (*quantize_doubles)(const double* x, int64_t first, int64_t last, int64_t d, const double* sq_norm,
                           Int8Rows& to);
  // Lists the candidates, packed as row << 16 | column. Returns how many, or -1 where they exceed `capacity`.
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
