// The rule for entries that are not finite: one such embedding makes every result of its call NaN. Otherwise a mining
// comparison could hide it.
#pragma once
#include <algorithm>
#include <cstdint>
#include <limits>

namespace flashpair {

template <class T>
bool all_finite(const T* x, int64_t size) {
  constexpr int64_t L = 16;
  T zero[L] = {}, tail = 0;
  int64_t k = 0;
  for (; k + L <= size; k += L)
    for (int64_t l = 0; l < L; ++l) zero[l] += x[k + l] * 0;
  for (; k < size; ++k) tail += x[k] * 0;
  for (T z : zero) tail += z;
  return tail == 0;
}

// A null pointer is a result that is not wanted.
template <class T>
void fill_nan(T* to, int64_t count) {
  if (to) std::fill_n(to, count, std::numeric_limits<T>::quiet_NaN());
}

}  // namespace flashpair
