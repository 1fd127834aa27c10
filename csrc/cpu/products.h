// The three products of a tile, for a process in which no BLAS is found. Plain, vectorised, no blocking.
#pragma once
#include "simd.h"
#include "types.h"

namespace flashpair {
namespace {

template <class T>
INLINE void add_scaled(T* to, const T* from, T by, int64_t d) {
  int64_t k = 0;
  for (; k + WIDTH<T> <= d; k += WIDTH<T>) store<T>(to + k, load(to + k) + load(from + k) * by);
  for (; k < d; ++k) to[k] += from[k] * by;
}

// The sum of a product of a and b, in an order that D alone decides.
template <class T>
INLINE T dot(const T* a, const T* b, int64_t d) {
  constexpr int64_t L = WIDTH<T>, CHAINS = 4;
  Vec<T> sum[CHAINS] = {};
  int64_t k = 0;
  for (; k + CHAINS * L <= d; k += CHAINS * L)
    for (int64_t c = 0; c < CHAINS; ++c) sum[c] += load(a + k + c * L) * load(b + k + c * L);
  for (; k + L <= d; k += L) sum[0] += load(a + k) * load(b + k);
  T lanes[L];
  store<T>(lanes, (sum[0] + sum[1]) + (sum[2] + sum[3]));
  for (int64_t half = L / 2; half; half /= 2)
    for (int64_t l = 0; l < half; ++l) lanes[l] += lanes[l + half];
  for (; k < d; ++k) lanes[0] += a[k] * b[k];
  return lanes[0];
}

// z (rows, cols) = x y^T, both with rows of d.
template <class T>
void dot_products(const T* x, int64_t rows, const T* y, int64_t cols, int64_t d, T* z, int64_t ld) {
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < cols; ++j) z[i * ld + j] = dot(x + i * d, y + j * d, d);
}

// dx (rows, d) += w y, where w (rows, cols) is read as its transpose if asked for.
template <class T>
void add_product(const T* w, int64_t ld, bool transpose, int64_t rows, const T* y, int64_t cols, int64_t d, T* dx) {
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < cols; ++j) {
      const T by = transpose ? w[j * ld + i] : w[i * ld + j];
      if (by != T(0)) add_scaled(dx + i * d, y + j * d, by, d);
    }
}

}  // namespace
}  // namespace flashpair
