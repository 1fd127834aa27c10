// Forward: one tile's pairs folded into the running row reductions of its rows and, if mirrored, of its columns.
//
// Never stored: masks, windows, exponentials. A window that lets nothing of the tile through costs one comparison pass.
// State: logsumexp keeps (peak, total), value = log(total) + steepness * peak (types.h: Reduction); totals are double,
// so a row of a million references loses nothing. Order of the pairs of a row is fixed by the caller's order of tiles:
// same bits each time.
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

// e^(low - high) of exponents steepness * low and steepness * high, 0 for low = -inf.
template <class T>
INLINE T shrunk(const Reduction<T>& r, T low, T high) {
  return low > -INF<T> ? scalar_exp((low - high) * r.steepness()) : T(0);
}

// Fold (peak, total) of one tile into a row's state.
template <class T>
INLINE void merge(const Reduction<T>& r, int64_t row, T peak, T total) {
  if (!(peak > -INF<T>)) return;
  const T old = r.peak[row];
  if (peak > old) {
    r.total[row] = r.total[row] * static_cast<double>(shrunk(r, old, peak)) + total;
    r.peak[row] = peak;
  } else {
    r.total[row] += static_cast<double>(total) * shrunk(r, peak, old);
  }
}

// Whether one exponential, relative to the tile's highest peak, serves rows and columns alike. What it flushes to zero
// is e^-27 (float: 88 - 60 = 28) of a row's own peak at most; and its exponent is rounded by its distance from the
// highest, which must be nothing beside the rounding of each peak itself: a row whose peak is near 0 needs exponents of
// its own.
template <class T>
INLINE bool one_serves(T spread, T least) {
  return spread <= (sizeof(T) == 4 ? T(60) : T(600)) && spread <= 2 * least;
}

template <class T, bool LOWER, bool UPPER, bool MIRROR>
void logsumexp(const Problem<T>& p, const Reduction<T>& r, const Tile<T>& t) {
  using V = Vec<T>;
  Columns<T> lower, upper, peaks, totals, part;
  alignas(64) T row_peak[MAX_TILE], row_top[MAX_TILE];  // directed z: of the row's own pairs; of all that any side uses
  const T direction = r.direction(), steep = r.steepness();
  if (MIRROR) {
    lower.fill(r.lower, -INF<T>, t);
    upper.fill(r.upper, INF<T>, t);
    peaks.fill(nullptr, -INF<T>, t);
    totals.fill(nullptr, T(0), t), part.fill(nullptr, T(0), t);
  }
  const V none = splat(-INF<T>);
  T high = -INF<T>, low = INF<T>, least = INF<T>;
  auto widen = [&](T peak) {
    if (!(peak > -INF<T>)) return;
    high = peak > high ? peak : high;
    low = peak < low ? peak : low;
    least = magnitude(peak) < least ? magnitude(peak) : least;
  };
  // 1. peaks: what the windows let through, and how high it reaches
  for (int64_t i = 0; i < t.rows; ++i) {
    const T* z = t.z + i * t.ld;
    const V low_i = splat(lower_of(r, t.r0 + i)), up_i = splat(upper_of(r, t.r0 + i));
    V peak = none, top = none;
    sweep(p, r.side, t, i, [&](int64_t v, auto m) ALWAYS {
      const V zv = load(z + v), s = zv * direction;
      peak = maximum<T>(peak, select<T>(both<T>(inside<T, LOWER, UPPER>(zv, low_i, up_i), m), s, none));
      if constexpr (MIRROR) {
        const auto in = inside<T, LOWER, UPPER>(zv, lower.at(v), upper.at(v));
        const V c = select<T>(both<T>(in, m), s, none);
        top = maximum<T>(top, c);
        store<T>(peaks.data + v, maximum<T>(peaks.at(v), c));
      }
    });
    row_peak[i] = hmax<T>(peak);
    row_top[i] = MIRROR ? hmax<T>(maximum<T>(peak, top)) : row_peak[i];
    widen(row_peak[i]);
  }
  if (MIRROR)
    for (int64_t j = 0; j < t.cols; ++j) widen(peaks.data[j]);
  if (!(high > -INF<T>)) return;
  const bool shared = MIRROR && one_serves((high - low) * steep, least * steep);
  // 2. exponentials: one a pair where `shared`, else one for each direction
  for (int64_t i = 0; i < t.rows; ++i) {
    if (MIRROR && i % DRAINED == 0) part.drain(totals.data, t.cols);
    if (!(row_top[i] > -INF<T>)) continue;
    const T* z = t.z + i * t.ld;
    const V low_i = splat(lower_of(r, t.r0 + i)), up_i = splat(upper_of(r, t.r0 + i));
    const V shift = splat(shared ? high : row_peak[i]);
    RowSum<T> total;
    sweep(p, r.side, t, i, [&](int64_t v, auto m) ALWAYS {
      const V zv = load(z + v), s = zv * direction, e = exp((s - shift) * steep);
      total.add(v, select<T>(both<T>(inside<T, LOWER, UPPER>(zv, low_i, up_i), m), e, V{}));
      if constexpr (MIRROR) {
        const auto in = inside<T, LOWER, UPPER>(zv, lower.at(v), upper.at(v));
        const V c = shared ? e : exp((s - peaks.at(v)) * steep);
        store<T>(part.data + v, part.at(v) + select<T>(both<T>(in, m), c, V{}));
      }
    });
    if (row_peak[i] > -INF<T>) merge(r, t.r0 + i, shared ? high : row_peak[i], total.value());
  }
  if (MIRROR) part.drain(totals.data, t.cols);
  if (MIRROR)
    for (int64_t j = 0; j < t.cols; ++j)
      if (peaks.data[j] > -INF<T>) merge(r, t.c0 + j, shared ? high : peaks.data[j], totals.data[j]);
}

template <class T, bool LOWER, bool UPPER, bool MIRROR, class Phi>
void sum(const Problem<T>& p, const Reduction<T>& r, const Tile<T>& t, const Phi& transform) {
  using V = Vec<T>;
  Columns<T> lower, upper, own, ref, totals;
  ref.fill(r.ref_offset, T(0), t);
  if (MIRROR) {
    lower.fill(r.lower, -INF<T>, t);
    upper.fill(r.upper, INF<T>, t);
    own.fill(r.offset, r.shift, t);
    totals.fill(nullptr, T(0), t);
  }
  for (int64_t i = 0; i < t.rows; ++i) {
    const int64_t row = t.r0 + i;
    const T* z = t.z + i * t.ld;
    const V low_i = splat(lower_of(r, row)), up_i = splat(upper_of(r, row));
    const V own_i = splat(r.offset ? r.offset[row] : r.shift);
    const V ref_i = splat(MIRROR && r.ref_offset ? r.ref_offset[row] : T(0));
    RowSum<T> total;
    sweep(p, r.side, t, i, [&](int64_t v, auto m) ALWAYS {
      const V zv = load(z + v), s = zv * r.scale;
      const V phi = transform.template value<T>(s, own_i, ref.at(v));
      total.add(v, select<T>(both<T>(inside<T, LOWER, UPPER>(zv, low_i, up_i), m), phi, V{}));
      if constexpr (MIRROR) {
        const auto in = inside<T, LOWER, UPPER>(zv, lower.at(v), upper.at(v));
        const V c = transform.template value<T>(s, own.at(v), ref_i);
        store<T>(totals.data + v, totals.at(v) + select<T>(both<T>(in, m), c, V{}));
      }
    });
    r.total[row] += total.value();
    if (MIRROR && drains(i, t.rows)) totals.drain(r.total + t.c0, t.cols);
  }
}

// Max and min of z: SIGN * z is maximised, and equal extremes go to the lowest index in the
// caller's order, looked up only where a tile raises or equals a row's extreme (a few times a row).
template <class T, bool LOWER, bool UPPER, bool MIRROR>
void extreme(const Problem<T>& p, const Reduction<T>& r, const Tile<T>& t) {
  using V = Vec<T>;
  const T sign = r.op == MAX ? T(1) : T(-1);
  Columns<T> lower, upper, peaks;
  if (MIRROR) {
    lower.fill(r.lower, -INF<T>, t);
    upper.fill(r.upper, INF<T>, t);
    peaks.fill(nullptr, -INF<T>, t);
  }
  const V none = splat(-INF<T>);
  auto order = [&](int64_t column) { return p.order[column]; };
  // True when the row's extreme, or with equal ones its index, may change.
  auto reaches = [&](int64_t row, T peak) {
    const T old = sign * r.peak[row];
    return peak > -INF<T> && (peak > old || (r.index && peak == old));
  };
  auto keep = [&](int64_t row, T peak, int64_t first) {
    if (r.index && (peak > sign * r.peak[row] || order(first) < order(r.index[row]))) r.index[row] = first;
    r.peak[row] = sign * peak;
  };
  for (int64_t i = 0; i < t.rows; ++i) {
    const int64_t row = t.r0 + i;
    const T* z = t.z + i * t.ld;
    const V low_i = splat(lower_of(r, row)), up_i = splat(upper_of(r, row));
    V peak = none;
    sweep(p, r.side, t, i, [&](int64_t v, auto m) ALWAYS {
      const V zv = load(z + v), s = zv * sign;
      peak = maximum<T>(peak, select<T>(both<T>(inside<T, LOWER, UPPER>(zv, low_i, up_i), m), s, none));
      if constexpr (MIRROR) {
        const auto in = inside<T, LOWER, UPPER>(zv, lower.at(v), upper.at(v));
        store<T>(peaks.data + v, maximum<T>(peaks.at(v), select<T>(both<T>(in, m), s, none)));
      }
    });
    const T found = hmax<T>(peak);
    if (!reaches(row, found)) continue;
    int64_t first = -1;
    if (r.index)
      sweep(p, r.side, t, i, [&](int64_t v, auto m) {
        const V zv = load(z + v);
        const V hit = select<T>(both<T>(inside<T, LOWER, UPPER>(zv, low_i, up_i), m), zv * sign, none);
        for (int64_t k = 0; k < WIDTH<T>; ++k)
          if (hit[k] == found && (first < 0 || order(t.c0 + v + k) < order(first))) first = t.c0 + v + k;
      });
    keep(row, found, first);
  }
  if (!MIRROR) return;
  for (int64_t j = 0; j < t.cols; ++j) {
    const int64_t row = t.c0 + j;
    if (!reaches(row, peaks.data[j])) continue;
    int64_t first = -1;
    for (int64_t i = 0; r.index && i < t.rows; ++i) {
      const int64_t other = t.r0 + i;
      const T z = t.z[i * t.ld + j];
      const bool positive = other >= p.lo[row] && other < p.hi[row];
      const bool in = (!LOWER || z > lower_of(r, row)) && (!UPPER || z < upper_of(r, row)) && other != row;
      const bool hit = in && sign * z == peaks.data[j] && (r.side == ALL || positive == (r.side == POSITIVES));
      if (hit && (first < 0 || order(other) < order(first))) first = other;
    }
    keep(row, peaks.data[j], first);
  }
}

struct One {
  template <class T>
  static INLINE Vec<T> value(Vec<T>, Vec<T>, Vec<T>) {
    return splat(T(1));
  }
};

// logsumexp of a transform: phi of some rows of the tile at a time, in its place. f(rows of phi, first).
constexpr int64_t MAPPED_ROWS = 16;
template <class T, class Phi, class F>
void each_mapped(const Reduction<T>& r, const Tile<T>& t, const Phi& transform, F&& f) {
  alignas(64) T phi[MAPPED_ROWS * MAX_TILE];
  const Vec<T> own = splat(r.shift);
  for (int64_t first = 0; first < t.rows; first += MAPPED_ROWS) {
    const int64_t rows = clamp(t.rows - first, 0, MAPPED_ROWS);
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t v = 0; v < t.cols; v += WIDTH<T>) {
        const Vec<T> s = load(t.z + (first + i) * t.ld + v) * r.scale;
        store<T>(phi + i * MAX_TILE + v, transform.template value<T>(s, own, Vec<T>{}));
      }
    f(Tile<T>{phi, MAX_TILE, t.r0 + first, rows, t.c0, t.cols, t.symmetric, t.mirror}, first);
  }
}
template <class T>
Reduction<T> of_mapped(Reduction<T> r) {
  r.scale = T(1), r.grad_scale = nullptr;
  return r;
}

template <class T>
void reduce_one(const Problem<T>& p, const Reduction<T>& r, const Tile<T>& t) {
  if (r.op == LOGSUMEXP && r.transform != IDENTITY) {
    const Reduction<T> plain = of_mapped(r);
    return with_transform(r, [&](auto phi) {
      each_mapped(r, t, phi, [&](const Tile<T>& mapped, int64_t) {
        t.mirror ? logsumexp<T, false, false, true>(p, plain, mapped)
                 : logsumexp<T, false, false, false>(p, plain, mapped);
      });
    });
  }
  specialize(r, t.mirror, [&](auto low, auto up, auto sym) {
    constexpr bool A = decltype(low)::value, B = decltype(up)::value, S = decltype(sym)::value;
    if (r.op == LOGSUMEXP) return logsumexp<T, A, B, S>(p, r, t);
    if (r.op == MIN || r.op == MAX) return extreme<T, A, B, S>(p, r, t);
    if (r.op == COUNT) return sum<T, A, B, S>(p, r, t, One{});
    with_transform(r, [&](auto phi) { sum<T, A, B, S>(p, r, t, phi); });
  });
}

}  // namespace
}  // namespace flashpair
