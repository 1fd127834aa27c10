// Euclidean distances, or their squares, from dot products, and the way back: D^2 = |x|^2 + |y|^2 - 2 x.y, dD/dS =
// -1/D, and along the rows' own vectors dD/dx = x/D - y/D. A distance under rounding noise is 0 and has no direction:
// its gradient is 0, as is that of a square at 0.
#pragma once
#include "sweep.h"

namespace flashpair {
namespace {

template <class T>
constexpr T ZERO_DISTANCE = sizeof(T) == 4 ? T(8 * 1.1920928955078125e-7) : T(8 * 2.220446049250313e-16);

INLINE float root(float x) { return __builtin_sqrtf(x); }
INLINE double root(double x) { return __builtin_sqrt(x); }

template <class T>
INLINE T distance(T product, T squares) {
  const T d2 = squares - 2 * product;
  return d2 > ZERO_DISTANCE<T> * squares ? root(d2) : T(0);
}

template <class T>
INLINE T separation(const Problem<T>& p, T product, T squares) {
  if (!p.squared) return distance(product, squares);
  const T d2 = squares - 2 * product;
  return d2 < T(0) ? T(0) : d2;
}

// -dz/dS of a pair at z, which is also how much each of its rows is pulled along itself.
template <class T>
INLINE T pull_of(const Problem<T>& p, T z, T w) {
  if (z == T(0) || w == T(0)) return T(0);
  return p.squared ? 2 * w : w / z;
}

template <class T>
void distances(const Problem<T>& p, const Tile<T>& t) {
  if (!p.row_square) return;
  for (int64_t i = 0; i < t.rows; ++i) {
    T* z = t.z + i * t.ld;
    const T xx = p.row_square[t.r0 + i];
    const T* yy = p.ref_square + t.c0;
    if (p.squared)
      for (int64_t j = 0; j < t.cols; ++j) {
        const T d2 = xx + yy[j] - 2 * z[j];
        z[j] = d2 < T(0) ? T(0) : d2;
      }
    else
      for (int64_t j = 0; j < t.cols; ++j) z[j] = distance(z[j], xx + yy[j]);
  }
}

// In: w = dL/dz, 0 past the tile's columns. Out: w = dL/dS, and the pull of each pair on its own two rows.
template <class T>
void pull(const Problem<T>& p, const Tile<T>& t, T* w, T* row_pull, T* ref_pull) {
  using V = Vec<T>;
  Columns<T> refs;
  refs.fill(nullptr, T(0), t);
  for (int64_t i = 0; i < t.rows; ++i) {
    const T* z = t.z + i * t.ld;
    T* wi = w + i * t.ld;
    V total{};
    for (int64_t v = 0; v < t.cols; v += WIDTH<T>) {
      const V zv = load(z + v), wv = load(wi + v);
      const V u = (zv == T(0)) | (wv == T(0)) ? V{} : p.squared ? T(2) * wv : wv / zv;
      store<T>(wi + v, -u);
      total += u;
      store<T>(refs.data + v, refs.at(v) + u);
    }
    if (row_pull) row_pull[t.r0 + i] += hsum<T>(total);
  }
  for (int64_t j = 0; ref_pull && j < t.cols; ++j) ref_pull[t.c0 + j] += refs.data[j];
}

}  // namespace
}  // namespace flashpair
