// A dot product in double, whatever the vectors' types. Deterministic: one order.
#pragma once
#include "cpu/types.h"

namespace flashpair {

template <class A, class B>
INLINE double dot(const A* a, const B* b, int64_t d) {
  constexpr int64_t L = 8;  // chains of additions, which need not wait for each other
  double part[L] = {}, total = 0;
  int64_t k = 0;
  for (; k + L <= d; k += L)
    for (int64_t l = 0; l < L; ++l) part[l] += static_cast<double>(a[k + l]) * b[k + l];
  for (; k < d; ++k) total += static_cast<double>(a[k]) * b[k];
  for (double p : part) total += p;
  return total;
}

}  // namespace flashpair
