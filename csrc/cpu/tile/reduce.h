// Forward: accumulates one tile's pairs into the reductions' state of its rows and, if mirrored, of its columns.
//
// Never stored: masks, windows, exponentials. A window that lets nothing of the tile through costs one pass of
// comparisons.
// State: a logsumexp keeps (row_max, row_sum), and its value is log(row_sum) + steepness * row_max (types.h). Sums
// across tiles are double, so that a row of a million references loses nothing.
// Deterministic: the caller's order of tiles fixes the order of a row's pairs.
#pragma once
#include "cpu/transform/transforms.h"
#include "sweep.h"

namespace flashpair {
namespace {

INLINE float scalar_exp(float x) { return __builtin_expf(x); }
INLINE double scalar_exp(double x) { return __builtin_exp(x); }
template <class T>
INLINE T magnitude(T x) {
  return x < 0 ? -x : x;
}

// What a sum relative to `low` is multiplied by to be relative to `high`; 0 for low = -inf.
template <class T>
INLINE T rescale_factor(const Reduction<T>& r, T low, T high) {
  return low > -INF<T> ? scalar_exp((low - high) * r.steepness()) : T(0);
}

// Merges one tile's (max, sum) into a row's state.
template <class T>
INLINE void merge(const Reduction<T>& r, int64_t row, T max, T sum) {
  if (!(max > -INF<T>)) return;
  const T old = r.row_max[row];
  if (max > old) {
    r.row_sum[row] = r.row_sum[row] * static_cast<double>(rescale_factor(r, old, max)) + sum;
    r.row_max[row] = max;
  } else {
    r.row_sum[row] += static_cast<double>(sum) * rescale_factor(r, max, old);
  }
}

// Whether one exponential a pair, relative to the tile's largest maximum, serves the pair's row and its column alike.
// spread: from the smallest maximum to the largest; least: the smallest magnitude of a maximum.
// 1. It may flush to zero no more than e^-27 of any row's own maximum (float: 88 - 60 = 28).
// 2. Its exponent is rounded by the distance from the largest maximum, which must not exceed the rounding of each
//    maximum itself. So a row whose maximum is close to 0 needs exponents of its own.
template <class T>
INLINE bool one_exponential_serves(T spread, T least) {
  return spread <= (sizeof(T) == 4 ? T(60) : T(600)) && spread <= 2 * least;
}

template <class T, bool LOWER, bool UPPER, bool MIRROR>
void logsumexp(const Problem<T>& p, const Reduction<T>& r, const Tile<T>& t) {
  using V = Vec<T>;
  Columns<T> lower, upper, col_max, col_sum, col_part;
  // Directed z: the maximum of the row's own pairs, and of all pairs in the row that the row or a column uses.
  alignas(64) T row_max[MAX_TILE], used_max[MAX_TILE];
  const T direction = r.direction(), steep = r.steepness();
  if (MIRROR) {
    lower.fill(r.lower, -INF<T>, t);
    upper.fill(r.upper, INF<T>, t);
    col_max.fill(nullptr, -INF<T>, t);
    col_sum.fill(nullptr, T(0), t), col_part.fill(nullptr, T(0), t);
  }
  const V none = splat(-INF<T>);
  T high = -INF<T>, low = INF<T>, least = INF<T>;
  auto widen = [&](T max) {
    if (!(max > -INF<T>)) return;
    high = max > high ? max : high;
    low = max < low ? max : low;
    least = magnitude(max) < least ? magnitude(max) : least;
  };
  // 1. Maxima of what the windows let through.
  for (int64_t i = 0; i < t.rows; ++i) {
    const T* z = t.z + i * t.ld;
    const V low_i = splat(row_lower(r, t.r0 + i)), up_i = splat(row_upper(r, t.r0 + i));
    V max_i = none, max_j = none;
    sweep(p, r.side, t, i, [&](int64_t v, auto m) ALWAYS {
      const V zv = load(z + v), s = zv * direction;
      max_i = maximum<T>(max_i, select<T>(mask_and<T>(in_window<T, LOWER, UPPER>(zv, low_i, up_i), m), s, none));
      if constexpr (MIRROR) {
        const auto in = in_window<T, LOWER, UPPER>(zv, lower.at(v), upper.at(v));
        const V kept = select<T>(mask_and<T>(in, m), s, none);
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
  if (!(high > -INF<T>)) return;
  const bool shared = MIRROR && one_exponential_serves((high - low) * steep, least * steep);
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
      row_sum.add(v, select<T>(mask_and<T>(in_window<T, LOWER, UPPER>(zv, low_i, up_i), m), e, V{}));
      if constexpr (MIRROR) {
        const auto in = in_window<T, LOWER, UPPER>(zv, lower.at(v), upper.at(v));
        const V e_j = shared ? e : exp((s - col_max.at(v)) * steep);
        store<T>(col_part.data + v, col_part.at(v) + select<T>(mask_and<T>(in, m), e_j, V{}));
      }
    });
    if (row_max[i] > -INF<T>) merge(r, t.r0 + i, shared ? high : row_max[i], row_sum.value());
  }
  if (MIRROR) col_part.flush_to(col_sum.data, t.cols);
  if (MIRROR)
    for (int64_t j = 0; j < t.cols; ++j)
      if (col_max.data[j] > -INF<T>) merge(r, t.c0 + j, shared ? high : col_max.data[j], col_sum.data[j]);
}

template <class T, bool LOWER, bool UPPER, bool MIRROR, class Phi>
void sum(const Problem<T>& p, const Reduction<T>& r, const Tile<T>& t, const Phi& transform) {
  using V = Vec<T>;
  Columns<T> lower, upper, offset, ref_offset, col_sum;
  ref_offset.fill(r.ref_offset, T(0), t);
  if (MIRROR) {
    lower.fill(r.lower, -INF<T>, t);
    upper.fill(r.upper, INF<T>, t);
    offset.fill(r.offset, r.shift, t);
    col_sum.fill(nullptr, T(0), t);
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
      row_sum.add(v, select<T>(mask_and<T>(in_window<T, LOWER, UPPER>(zv, low_i, up_i), m), phi_i, V{}));
      if constexpr (MIRROR) {
        const auto in = in_window<T, LOWER, UPPER>(zv, lower.at(v), upper.at(v));
        const V phi_j = transform.template value<T>(s, offset.at(v), ref_offset_i);
        store<T>(col_sum.data + v, col_sum.at(v) + select<T>(mask_and<T>(in, m), phi_j, V{}));
      }
    });
    r.row_sum[row] += row_sum.value();
    if (MIRROR && flush_due(i, t.rows)) col_sum.flush_to(r.row_sum + t.c0, t.cols);
  }
}

// Max and min of z: sign * z is maximised. Equal extremes go to the lowest index in the caller's order, which is looked
// up only where a tile raises or equals a row's extreme (a few times a row).
template <class T, bool LOWER, bool UPPER, bool MIRROR>
void extreme(const Problem<T>& p, const Reduction<T>& r, const Tile<T>& t) {
  using V = Vec<T>;
  const T sign = r.op == MAX ? T(1) : T(-1);
  Columns<T> lower, upper, col_max;
  if (MIRROR) {
    lower.fill(r.lower, -INF<T>, t);
    upper.fill(r.upper, INF<T>, t);
    col_max.fill(nullptr, -INF<T>, t);
  }
  const V none = splat(-INF<T>);
  auto perm = [&](int64_t column) { return p.perm[column]; };
  // Whether the row's extreme, or with equal ones its index, may change.
  auto may_change = [&](int64_t row, T max) {
    const T old = sign * r.row_max[row];
    return max > -INF<T> && (max > old || (r.index && max == old));
  };
  auto update = [&](int64_t row, T max, int64_t winner) {
    if (r.index && (max > sign * r.row_max[row] || perm(winner) < perm(r.index[row]))) r.index[row] = winner;
    r.row_max[row] = sign * max;
  };
  // 1. The rows' extremes, and the columns' maxima beside them.
  for (int64_t i = 0; i < t.rows; ++i) {
    const int64_t row = t.r0 + i;
    const T* z = t.z + i * t.ld;
    const V low_i = splat(row_lower(r, row)), up_i = splat(row_upper(r, row));
    V max_i = none;
    sweep(p, r.side, t, i, [&](int64_t v, auto m) ALWAYS {
      const V zv = load(z + v), s = zv * sign;
      max_i = maximum<T>(max_i, select<T>(mask_and<T>(in_window<T, LOWER, UPPER>(zv, low_i, up_i), m), s, none));
      if constexpr (MIRROR) {
        const auto in = in_window<T, LOWER, UPPER>(zv, lower.at(v), upper.at(v));
        store<T>(col_max.data + v, maximum<T>(col_max.at(v), select<T>(mask_and<T>(in, m), s, none)));
      }
    });
    const T row_max = hmax<T>(max_i);
    if (!may_change(row, row_max)) continue;
    int64_t winner = -1;
    if (r.index)
      sweep(p, r.side, t, i, [&](int64_t v, auto m) {
        const V zv = load(z + v);
        const V kept = select<T>(mask_and<T>(in_window<T, LOWER, UPPER>(zv, low_i, up_i), m), zv * sign, none);
        for (int64_t k = 0; k < WIDTH<T>; ++k)
          if (kept[k] == row_max && (winner < 0 || perm(t.c0 + v + k) < perm(winner))) winner = t.c0 + v + k;
      });
    update(row, row_max, winner);
  }
  if (!MIRROR) return;
  // 2. The columns' extremes, and who attains them.
  for (int64_t j = 0; j < t.cols; ++j) {
    const int64_t row = t.c0 + j;
    if (!may_change(row, col_max.data[j])) continue;
    int64_t winner = -1;
    for (int64_t i = 0; r.index && i < t.rows; ++i) {
      const int64_t other = t.r0 + i;
      const T z = t.z[i * t.ld + j];
      const bool positive = other >= p.pos_begin[row] && other < p.pos_end[row];
      const bool in = (!LOWER || z > row_lower(r, row)) && (!UPPER || z < row_upper(r, row)) && other != row;
      const bool hit = in && sign * z == col_max.data[j] && (r.side == ALL || positive == (r.side == POSITIVES));
      if (hit && (winner < 0 || perm(other) < perm(winner))) winner = other;
    }
    update(row, col_max.data[j], winner);
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
