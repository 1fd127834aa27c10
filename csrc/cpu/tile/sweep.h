// Which pairs of a tile's row a reduction sees, a vector at a time, from the row's interval of positives alone.
#pragma once
#include <type_traits>

#include "cpu/types.h"
#include "simd.h"

namespace flashpair {
namespace {

INLINE int64_t clamp(int64_t x, int64_t low, int64_t high) { return x < low ? low : x > high ? high : x; }

// Calls f(v, mask) for every vector of columns c0 + [v, v + WIDTH) that holds a pair of `side` for row `i` of the tile.
// Most tiles meet no positives: their vectors come with the mask AllLanes, which costs nothing.
template <class T, class F>
INLINE void sweep(const Problem<T>& p, int side, const Tile<T>& t, int64_t i, F&& f) {
  constexpr int64_t L = WIDTH<T>;
  const int64_t row = t.r0 + i;
  const int64_t end = clamp(p.end - t.c0, 0, t.cols), whole = end / L * L;
  const int64_t lo = clamp(p.lo[row] - t.c0, 0, end), hi = clamp(p.hi[row] - t.c0, lo, end);
  const int64_t self = p.square ? row - t.c0 : -1;
  auto mixed = [&](int64_t v) {
    const Mask<T> column = iota<T>(v);
    const Mask<T> positive = (column >= (typename Lanes<T>::Int)lo) & (column < (typename Lanes<T>::Int)hi);
    Mask<T> m = column < (typename Lanes<T>::Int)end;
    if (side == POSITIVES) m &= positive;
    if (side == NEGATIVES) m &= ~positive;
    m &= column != (typename Lanes<T>::Int)self;
    if (any<T>(m)) f(v, m);
  };
  // With no positives here the mixed part [a, b) is empty, else it is the vectors that [lo, hi) touches.
  const int64_t a = lo < hi ? lo / L * L : 0, b = lo < hi ? (hi + L - 1) / L * L : 0;
  if (side != POSITIVES)
    for (int64_t v = 0; v < (a < whole ? a : whole); v += L) f(v, AllLanes{});
  for (int64_t v = a; v < b; v += L) mixed(v);
  if (side == POSITIVES) return;
  int64_t v = b;
  for (; v < whole; v += L) f(v, AllLanes{});
  if (v < end) mixed(v);
}

// The columns' copies of row arrays, padded so that a last ragged vector reads no memory outside.
template <class T>
struct Columns {
  alignas(64) T data[MAX_TILE + WIDTH<T>];
  void fill(const T* from, T otherwise, const Tile<T>& t) {
    const int64_t padded = (t.cols + WIDTH<T> - 1) / WIDTH<T> * WIDTH<T>;
    for (int64_t j = 0; j < padded; ++j) data[j] = from && j < t.cols ? from[t.c0 + j] : otherwise;
  }
  INLINE Vec<T> at(int64_t v) const { return load(data + v); }
  // Adds what is here to some other numbers, and begins anew: column sums of few rows each, whose roundings do not pile
  // up.
  template <class U>
  INLINE void drain(U* to, int64_t cols) {
    for (int64_t j = 0; j < cols; ++j) to[j] += data[j], data[j] = T(0);
  }
};
constexpr int64_t DRAINED = 16;  // rows after which column sums are, and vectors after which a row's sum is
INLINE bool drains(int64_t i, int64_t rows) { return i % DRAINED == DRAINED - 1 || i == rows - 1; }

// The sum of a row's vectors, some at a time.
template <class T>
struct RowSum {
  Vec<T> whole{}, part{};
  INLINE void add(int64_t v, Vec<T> t) {
    part += t;
    if (v / WIDTH<T> % DRAINED == DRAINED - 1) whole += part, part = Vec<T>{};
  }
  INLINE T value() const { return hsum<T>(whole + part); }
};

// A mining window's bounds for a row, or for a vector of columns: none, the lower, or both; none compiles to nothing.
template <class T, bool LOWER, bool UPPER>
INLINE auto inside(Vec<T> z, Vec<T> lower, Vec<T> upper) {
  if constexpr (LOWER && UPPER)
    return (z > lower) & (z < upper);
  else if constexpr (LOWER)
    return z > lower;
  else
    return AllLanes{};
}

template <class T>
INLINE T lower_of(const Reduction<T>& r, int64_t row) {
  return r.lower ? r.lower[row] : -INF<T>;
}
template <class T>
INLINE T upper_of(const Reduction<T>& r, int64_t row) {
  return r.upper ? r.upper[row] : INF<T>;
}

// Calls f(LOWER, UPPER, both_directions) with compile-time truths. Both bounds are tested or none, which halves what
// there is to compile; but logsumexp, the hot one, has code of its own for a lower bound alone (mined negatives).
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
