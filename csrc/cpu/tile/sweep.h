// Which pairs of a tile's row a reduction sees, one vector at a time.
//
// The mask of a side is computed from the row's interval of positives and is never stored. Mining windows, copies of
// the columns' arrays, and sums in a fixed order are here, too.
#pragma once
#include <type_traits>

#include "cpu/types.h"
#include "simd.h"

namespace flashpair {
namespace {

INLINE int64_t clamp(int64_t x, int64_t low, int64_t high) { return x < low ? low : x > high ? high : x; }

// Calls f(v, mask) for every vector of columns c0 + [v, v + WIDTH) that holds a pair of `side` for row `i` of the tile.
// Most tiles meet no positives: their full vectors come with NoMask, which costs nothing.
template <class T, class F>
INLINE void sweep(const Problem<T>& p, int side, const Tile<T>& t, int64_t i, F&& f) {
  constexpr int64_t L = WIDTH<T>;
  const int64_t row = t.r0 + i;
  const int64_t valid = clamp(p.num_valid - t.c0, 0, t.cols), full = valid / L * L;
  const int64_t pos_begin = clamp(p.pos_begin[row] - t.c0, 0, valid);
  const int64_t pos_end = clamp(p.pos_end[row] - t.c0, pos_begin, valid);
  const int64_t self = p.square ? row - t.c0 : -1;
  auto masked = [&](int64_t v) {
    const Mask<T> column = iota<T>(v);
    const Mask<T> positive =
        (column >= (typename VecTypes<T>::Int)pos_begin) & (column < (typename VecTypes<T>::Int)pos_end);
    Mask<T> m = column < (typename VecTypes<T>::Int)valid;
    if (side == POSITIVES) m &= positive;
    if (side == NEGATIVES) m &= ~positive;
    m &= column != (typename VecTypes<T>::Int)self;
    if (any<T>(m)) f(v, m);
  };
  // The vectors [first, last) are masked: those that meet positives. Without positives here there are none.
  const int64_t first = pos_begin < pos_end ? pos_begin / L * L : 0;
  const int64_t last = pos_begin < pos_end ? (pos_end + L - 1) / L * L : 0;
  if (side != POSITIVES)
    for (int64_t v = 0; v < (first < full ? first : full); v += L) f(v, NoMask{});
  for (int64_t v = first; v < last; v += L) masked(v);
  if (side == POSITIVES) return;
  int64_t v = last;
  for (; v < full; v += L) f(v, NoMask{});
  if (v < valid) masked(v);
}

// The tile's columns of an array, padded so that the tail vector reads nothing outside.
template <class T>
struct Columns {
  alignas(64) T data[MAX_TILE + WIDTH<T>];
  static int64_t padded(const Tile<T>& t) { return (t.cols + WIDTH<T> - 1) / WIDTH<T> * WIDTH<T>; }
  void fill(T value, const Tile<T>& t) {
    for (int64_t j = 0; j < padded(t); ++j) data[j] = value;
  }
  // `otherwise` stands where there is no array, and past the tile's columns.
  void fill(const T* from, T otherwise, const Tile<T>& t) {
    for (int64_t j = 0; j < padded(t); ++j) data[j] = from && j < t.cols ? from[t.c0 + j] : otherwise;
  }
  INLINE Vec<T> at(int64_t v) const { return load(data + v); }
  // Adds these numbers to `to` and sets them to zero. Column sums are flushed after a few rows, so that their rounding
  // errors do not pile up.
  template <class U>
  INLINE void flush_to(U* to, int64_t cols) {
    for (int64_t j = 0; j < cols; ++j) to[j] += data[j], data[j] = T(0);
  }
};
constexpr int64_t FLUSH_EVERY = 16;  // rows of a column sum, and vectors of a row sum
INLINE bool flush_due(int64_t i, int64_t rows) { return i % FLUSH_EVERY == FLUSH_EVERY - 1 || i == rows - 1; }

// The sum of a row's vectors, in parts of FLUSH_EVERY vectors.
template <class T>
struct RowSum {
  Vec<T> flushed{}, part{};
  INLINE void add(int64_t v, Vec<T> t) {
    part += t;
    if (v / WIDTH<T> % FLUSH_EVERY == FLUSH_EVERY - 1) flushed += part, part = Vec<T>{};
  }
  INLINE T value() const { return hsum<T>(flushed + part); }
};

// Whether z is inside a mining window, lower < z < upper, and of the mask `m`. A bound that is not asked for compiles
// to nothing.
template <class T, bool LOWER, bool UPPER, class M>
INLINE auto in_window(Vec<T> z, Vec<T> lower, Vec<T> upper, M m) {
  if constexpr (LOWER && UPPER)
    return mask_and<T>((z > lower) & (z < upper), m);
  else if constexpr (LOWER)
    return mask_and<T>(z > lower, m);
  else
    return mask_and<T>(NoMask{}, m);
}

template <class T>
INLINE T row_lower(const Reduction<T>& r, int64_t row) {
  return r.lower ? r.lower[row] : -INF<T>;
}
template <class T>
INLINE T row_upper(const Reduction<T>& r, int64_t row) {
  return r.upper ? r.upper[row] : INF<T>;
}

// The windows of the anchors that are a tile's columns.
template <class T>
struct ColumnWindows {
  Columns<T> lower, upper;
  void fill(const Reduction<T>& r, const Tile<T>& t) {
    lower.fill(r.lower, -INF<T>, t);
    upper.fill(r.upper, INF<T>, t);
  }
};

// Calls f(LOWER, UPPER, both_directions) with compile-time constants. It tests both bounds or none, which halves the
// code to compile. Only logsumexp, the hot one, has code of its own for a lower bound alone (mined negatives).
template <class T, class F>
INLINE void specialize(const Reduction<T>& r, bool both_directions, F&& f) {
  const auto yes = std::true_type{};
  const auto no = std::false_type{};
  auto with = [&](auto lower, auto upper) { both_directions ? f(lower, upper, yes) : f(lower, upper, no); };
  if (!r.lower && !r.upper)
    with(no, no);
  else if (r.op == LOGSUMEXP && !r.upper)
    with(yes, no);
  else
    with(yes, yes);
}

}  // namespace
}  // namespace flashpair
