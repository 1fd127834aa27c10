// Embeddings on their way in and their gradients on the way out: gathered in label order, L2-normalised, and back.
#pragma once
#include <cmath>
#include <cstdint>
#include <limits>

#include "cpu/runtime.h"

namespace flashpair {

// y (N, D): row order[i] of x, times inverse[i] = 1 / |row| if `inverse` (N,) is given. As similarity.py's normalize: a
// norm whose square underflows T counts as 0 and gives a zero row, one whose square overflows gives NaN.
template <class T>
void sorted_rows(const T* x, const int64_t* order, int64_t n, int64_t d, T* y, T* inverse, int threads) {
  const double low = std::sqrt(static_cast<double>(std::numeric_limits<T>::min()));
  const double high = std::sqrt(static_cast<double>(std::numeric_limits<T>::max()));
  in_chunks(n, threads, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const T* from = x + order[i] * d;
      T by = 1;
      if (inverse) {
        double lanes[8] = {}, square = 0;
        int64_t k = 0;
        for (; k + 8 <= d; k += 8)
          for (int64_t l = 0; l < 8; ++l) lanes[l] += static_cast<double>(from[k + l]) * from[k + l];
        for (; k < d; ++k) square += static_cast<double>(from[k]) * from[k];
        for (double lane : lanes) square += lane;
        const double norm = std::sqrt(square);
        by = norm <= low ? T(0) : norm < high ? static_cast<T>(1 / norm) : std::numeric_limits<T>::quiet_NaN();
        inverse[i] = by;
      }
      for (int64_t k = 0; k < d; ++k) y[i * d + k] = from[k] * by;
    }
  });
}

// dx (N, D) from g = dL/dy: row order[i] is (g - y <y, g>) inverse[i], or g itself.
template <class T>
void sorted_rows_backward(const T* g, const T* y, const T* inverse, const int64_t* order, int64_t n, int64_t d, T* dx,
                          int threads) {
  in_chunks(n, threads, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const T *gi = g + i * d, *yi = y + i * d;
      T* to = dx + order[i] * d;
      double lanes[8] = {}, along = 0;
      int64_t k = 0;
      for (; inverse && k + 8 <= d; k += 8)
        for (int64_t l = 0; l < 8; ++l) lanes[l] += static_cast<double>(gi[k + l]) * yi[k + l];
      for (; inverse && k < d; ++k) along += static_cast<double>(gi[k]) * yi[k];
      for (double lane : lanes) along += lane;
      const T by = inverse ? inverse[i] : T(1), part = static_cast<T>(along);
      for (int64_t j = 0; j < d; ++j) to[j] = (gi[j] - yi[j] * part) * by;
    }
  });
}

}  // namespace flashpair
