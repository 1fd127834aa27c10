// Embeddings on their way in and their gradients on the way out: gathered in label order, L2-normalised, and back.
//
// Stores the sorted rows and one inverse norm a row. Norms are summed in double. Deterministic: rows are independent.
#pragma once
#include <cmath>
#include <cstdint>
#include <limits>

#include "cpu/dot.h"
#include "cpu/runtime.h"

namespace flashpair {

// y (N, D): row perm[i] of x, times inverse_norm[i] = 1 / |row| where inverse_norm (N,) is not null. As normalize of
// core/similarity.py: a norm whose square underflows T counts as 0 and gives a zero row, and one whose square overflows
// gives NaN.
template <class T>
void sorted_rows(const T* x, const int64_t* perm, int64_t n, int64_t d, T* y, T* inverse_norm, int threads) {
  const double smallest = std::sqrt(static_cast<double>(std::numeric_limits<T>::min()));
  const double largest = std::sqrt(static_cast<double>(std::numeric_limits<T>::max()));
  parallel_chunks(n, threads, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const T* from = x + perm[i] * d;
      T scale = 1;
      if (inverse_norm) {
        const double norm = std::sqrt(dot(from, from, d));
        scale = norm <= smallest ? T(0)
                : norm < largest ? static_cast<T>(1 / norm)
                                 : std::numeric_limits<T>::quiet_NaN();
        inverse_norm[i] = scale;
      }
      for (int64_t k = 0; k < d; ++k) y[i * d + k] = from[k] * scale;
    }
  });
}

// dx (N, D) from g = dL/dy: row perm[i] is (g - y <y, g>) inverse_norm[i], or g itself without norms.
template <class T>
void sorted_rows_backward(const T* g, const T* y, const T* inverse_norm, const int64_t* perm, int64_t n, int64_t d,
                          T* dx, int threads) {
  parallel_chunks(n, threads, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const T *gi = g + i * d, *yi = y + i * d;
      T* to = dx + perm[i] * d;
      const T scale = inverse_norm ? inverse_norm[i] : T(1);
      const T radial = inverse_norm ? static_cast<T>(dot(gi, yi, d)) : T(0);
      for (int64_t j = 0; j < d; ++j) to[j] = (gi[j] - yi[j] * radial) * scale;
    }
  });
}

}  // namespace flashpair
