// Forward: accumulates one tile's pairs into the reductions' state of its rows and, if mirrored, of its columns.
//
// Never stored: masks, windows, exponentials. A window that lets nothing of the tile through costs one comparison a
// pair. State: a logsumexp keeps (row_max, row_sum), and its value is log(row_sum) + steepness * row_max (types.h).
// Sums across tiles are double, so that a row of a million references loses nothing. Deterministic: the caller's order
// of tiles fixes the order of a row's pairs.
#pragma once
#include "cpu/transform/transforms.h"
#include "row_state.h"
#include "sweep.h"

namespace flashpair {
namespace {

template <class T>
INLINE T magnitude(T x) {
  return x < 0 ? -x : x;
}

// The values around which a tile's exponents lie: the maxima of rows and columns in forward, their log-sum-exps in
// backward. Times `steepness` they are exponents.
template <class T>
struct ExponentRange {
  T high = -INF<T>, low = INF<T>, least = INF<T>;  // least: the smallest magnitude

  INLINE void widen(T value, T size) {
    high = value > high ? value : high;
    low = value < low ? value : low;
    least = size < least ? size : least;
  }
  // Whether one exponential a pair, relative to a number in the range, serves the pair's row and its column alike.
  // 1. It may flush to zero no more than e^-27 of any row's own maximum (float: 88 - 60 = 28).
  // 2. Its exponent is rounded by the distance from that number, which must not exceed the rounding of each value. So a
  //    row whose value is close to 0 needs exponents of its own.
  INLINE bool one_exponential_serves(T steepness) const {
    const T spread = (high - low) * steepness;
    return spread <= (sizeof(T) == 4 ? T(60) : T(600)) && spread <= 2 * (least * steepness);
  }
};

template <class T, bool LOWER, bool UPPER, bool MIRROR>
void logsumexp(const Problem<T>& p, const Reduction<T>& r, const Tile<T>& t) {
  using V = Vec<T>;
  ColumnWindows<T> windows;
  Columns<T> col_max, col_sum, col_part;
  // Directed z: the maximum of the row's own pairs, and of all pairs in the row that the row or a column uses.
  alignas(64) T row_max[MAX_TILE], used_max[MAX_TILE];
  const T direction = r.direction(), steep = r.steepness();
  if (MIRROR) {
    windows.fill(r, t);
    col_max.fill(-INF<T>, t);
    col_sum.fill(T(0), t), col_part.fill(T(0), t);
  }
  const V none = splat(-INF<T>);
  ExponentRange<T> range;
  auto widen = [&](T max) {
    if (max > -INF<T>) range.widen(max, magnitude(max));
  };
  // 1. Maxima of what the windows let through.
  for (int64_t i = 0; i < t.rows; ++i) {
    const T* z = t.z + i * t.ld;
    const V low_i = splat(row_lower(r, t.r0 + i)), up_i = splat(row_upper(r, t.r0 + i));
    V max_i = none, max_j = none;
    sweep(p, r.side, t, i, [&](int64_t v, auto m) ALWAYS {
      const V zv = load(z + v), s = zv * direction;
      max_i = maximum<T>(max_i, select<T>(in_window<T, LOWER, UPPER>(zv, low_i, up_i, m), s, none));
      if constexpr (MIRROR) {
        const auto in = in_window<T, LOWER, UPPER>(zv, windows.lower.at(v), windows.upper.at(v), m);
        const V kept = select<T>(in, s, none);
        max_j = maximum<T>(max_j, kept);
        store<T>(col_max.data + v, maximum<T>(col_max.at(v), kept));
      }
    });
    row_max[i] = hmax<T>(max_i);
    used_max[i] = MIRROR ? hmax<T>(maximum<T>(max_i, max_j)) : row_max[i];
    widen(row_max[i]);
  }
  if (MIRROR)
    for (int64_t j = 0; j < t.cols; ++j) widen(col_max.data[j]);
  const T high = range.high;
  if (!(high > -INF<T>)) return;
  const bool shared = MIRROR && range.one_exponential_serves(steep);
  auto merge_row = [&](int64_t row, T max, T sum) { merge(r, r.row_max[row], r.row_sum[row], max, sum); };
  // 2. Sums of exponentials: one exponential a pair where it is shared, else one for each of its two ends.
  for (int64_t i = 0; i < t.rows; ++i) {
    if (MIRROR && i % FLUSH_EVERY == 0) col_part.flush_to(col_sum.data, t.cols);
    if (!(used_max[i] > -INF<T>)) continue;
    const T* z = t.z + i * t.ld;
    const V low_i = splat(row_lower(r, t.r0 + i)), up_i = splat(row_upper(r, t.r0 + i));
    const V max_i = splat(shared ? high : row_max[i]);
    RowSum<T> row_sum;
    sweep(p, r.side, t, i, [&](int64_t v, auto m) ALWAYS {
      const V zv = load(z + v), s = zv * direction, e = exp((s - max_i) * steep);
      row_sum.add(v, select<T>(in_window<T, LOWER, UPPER>(zv, low_i, up_i, m), e, V{}));
      if constexpr (MIRROR) {
        const auto in = in_window<T, LOWER, UPPER>(zv, windows.lower.at(v), windows.upper.at(v), m);
        const V e_j = shared ? e : exp((s - col_max.at(v)) * steep);
        store<T>(col_part.data + v, col_part.at(v) + select<T>(in, e_j, V{}));
      }
    });
    if (row_max[i] > -INF<T>) merge_row(t.r0 + i, shared ? high : row_max[i], row_sum.value());
  }
  if (MIRROR) col_part.flush_to(col_sum.data, t.cols);
  if (MIRROR)
    for (int64_t j = 0; j < t.cols; ++j)
      if (col_max.data[j] > -INF<T>) merge_row(t.c0 + j, shared ? high : col_max.data[j], col_sum.data[j]);
}

template <class T, bool LOWER, bool UPPER, bool MIRROR, class Phi>
void sum(const Problem<T>& p, const Reduction<T>& r, const Tile<T>& t, const Phi& transform) {
  using V = Vec<T>;
  ColumnWindows<T> windows;
  Columns<T> offset, ref_offset, col_sum;
  ref_offset.fill(r.ref_offset, T(0), t);
  if (MIRROR) {
    windows.fill(r, t);
    offset.fill(r.offset, r.shift, t);
    col_sum.fill(T(0), t);
  }
  for (int64_t i = 0; i < t.rows; ++i) {
    const int64_t row = t.r0 + i;
    const T* z = t.z + i * t.ld;
    const V low_i = splat(row_lower(r, row)), up_i = splat(row_upper(r, row));
    const V offset_i = splat(r.offset ? r.offset[row] : r.shift);
    const V ref_offset_i = splat(MIRROR && r.ref_offset ? r.ref_offset[row] : T(0));
    RowSum<T> row_sum;
    sweep(p, r.side, t, i, [&](int64_t v, auto m) ALWAYS {
      const V zv = load(z + v), s = zv * r.scale;
      const V phi_i = transform.template value<T>(s, offset_i, ref_offset.at(v));
      row_sum.add(v, select<T>(in_window<T, LOWER, UPPER>(zv, low_i, up_i, m), phi_i, V{}));
      if constexpr (MIRROR) {
        const auto in = in_window<T, LOWER, UPPER>(zv, windows.lower.at(v), windows.upper.at(v), m);
        const V phi_j = transform.template value<T>(s, offset.at(v), ref_offset_i);
        store<T>(col_sum.data + v, col_sum.at(v) + select<T>(in, phi_j, V{}));
      }
    });
    r.row_sum[row] += row_sum.value();
    if (MIRROR && flush_due(i, t.rows)) col_sum.flush_to(r.row_sum + t.c0, t.cols);
  }
}

// Max and min of z. The column that attains an extreme is looked up only where a tile raises or equals a row's extreme
// (a few times a row).
template <class T, bool LOWER, bool UPPER, bool MIRROR>
void extreme(const Problem<T>& p, const Reduction<T>& r, const Tile<T>& t) {
  using V = Vec<T>;
  const ExtremeState<T> state(p, r);
  const T sign = state.sign;
  ColumnWindows<T> windows;
  Columns<T> col_max;
  if (MIRROR) {
    windows.fill(r, t);
    col_max.fill(-INF<T>, t);
  }
  const V none = splat(-INF<T>);
  // 1. The rows' extremes, and the columns' maxima beside them.
  for (int64_t i = 0; i < t.rows; ++i) {
    const int64_t row = t.r0 + i;
    const T* z = t.z + i * t.ld;
    const V low_i = splat(row_lower(r, row)), up_i = splat(row_upper(r, row));
    V max_i = none;
    sweep(p, r.side, t, i, [&](int64_t v, auto m) ALWAYS {
      const V zv = load(z + v), s = zv * sign;
      max_i = maximum<T>(max_i, select<T>(in_window<T, LOWER, UPPER>(zv, low_i, up_i, m), s, none));
      if constexpr (MIRROR) {
        const auto in = in_window<T, LOWER, UPPER>(zv, windows.lower.at(v), windows.upper.at(v), m);
        store<T>(col_max.data + v, maximum<T>(col_max.at(v), select<T>(in, s, none)));
      }
    });
    const T row_max = hmax<T>(max_i);
    if (!state.may_change(row, row_max)) continue;
    int64_t winner = -1;
    if (r.index)
      sweep(p, r.side, t, i, [&](int64_t v, auto m) {
        const V zv = load(z + v);
        const V kept = select<T>(in_window<T, LOWER, UPPER>(zv, low_i, up_i, m), zv * sign, none);
        for (int64_t k = 0; k < WIDTH<T>; ++k)
          if (kept[k] == row_max && (winner < 0 || state.precedes(t.c0 + v + k, winner))) winner = t.c0 + v + k;
      });
    state.update(row, row_max, winner);
  }
  if (!MIRROR) return;
  // 2. The columns' extremes, and who attains them.
  for (int64_t j = 0; j < t.cols; ++j) {
    const int64_t row = t.c0 + j;
    if (!state.may_change(row, col_max.data[j])) continue;
    int64_t winner = -1;
    for (int64_t i = 0; r.index && i < t.rows; ++i) {
      const int64_t other = t.r0 + i;
      const T z = t.z[i * t.ld + j];
      const bool positive = other >= p.pos_begin[row] && other < p.pos_end[row];
      const bool in = (!LOWER || z > row_lower(r, row)) && (!UPPER || z < row_upper(r, row)) && other != row;
      const bool hit = in && sign * z == col_max.data[j] && (r.side == ALL || positive == (r.side == POSITIVES));
      if (hit && (winner < 0 || state.precedes(other, winner))) winner = other;
    }
    state.update(row, col_max.data[j], winner);
  }
}

// A count is the sum of this transform.
struct One {
  template <class T>
  static INLINE Vec<T> value(Vec<T>, Vec<T>, Vec<T>) {
    return splat(T(1));
  }
};

// A logsumexp of a transform: calls f(tile of phi, its first row) for some rows of the tile at a time, so that phi of
// the whole tile is never stored.
constexpr int64_t TRANSFORMED_ROWS = 16;
template <class T, class Phi, class F>
void for_each_transformed(const Reduction<T>& r, const Tile<T>& t, const Phi& transform, F&& f) {
  alignas(64) T phi[TRANSFORMED_ROWS * MAX_TILE];
  const Vec<T> offset = splat(r.shift);
  for (int64_t first = 0; first < t.rows; first += TRANSFORMED_ROWS) {
    const int64_t rows = clamp(t.rows - first, 0, TRANSFORMED_ROWS);
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t v = 0; v < t.cols; v += WIDTH<T>) {
        const Vec<T> s = load(t.z + (first + i) * t.ld + v) * r.scale;
        store<T>(phi + i * MAX_TILE + v, transform.template value<T>(s, offset, Vec<T>{}));
      }
    f(Tile<T>{phi, MAX_TILE, t.r0 + first, rows, t.c0, t.cols, t.symmetric, t.mirror}, first);
  }
}
// The reduction to be run over such a tile: phi has the scale in it.
template <class T>
Reduction<T> over_transformed(Reduction<T> r) {
  r.scale = T(1), r.grad_scale = nullptr;
  return r;
}

template <class T>
void reduce_one(const Problem<T>& p, const Reduction<T>& r, const Tile<T>& t) {
  if (r.op == LOGSUMEXP && r.transform != IDENTITY) {
    const Reduction<T> plain = over_transformed(r);
    return with_transform(r, [&](auto phi) {
      for_each_transformed(r, t, phi, [&](const Tile<T>& transformed, int64_t) {
        t.mirror ? logsumexp<T, false, false, true>(p, plain, transformed)
                 : logsumexp<T, false, false, false>(p, plain, transformed);
      });
    });
  }
  specialize(r, t.mirror, [&](auto lower, auto upper, auto mirror) {
    constexpr bool LOWER = decltype(lower)::value, UPPER = decltype(upper)::value, MIRROR = decltype(mirror)::value;
    if (r.op == LOGSUMEXP) return logsumexp<T, LOWER, UPPER, MIRROR>(p, r, t);
    if (r.op == MIN || r.op == MAX) return extreme<T, LOWER, UPPER, MIRROR>(p, r, t);
    if (r.op == COUNT) return sum<T, LOWER, UPPER, MIRROR>(p, r, t, One{});
    with_transform(r, [&](auto phi) { sum<T, LOWER, UPPER, MIRROR>(p, r, t, phi); });
  });
}

}  // namespace
}  // namespace flashpair
