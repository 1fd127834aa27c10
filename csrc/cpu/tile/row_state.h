// A row's forward state, and how the state of one tile, or of one lane, is merged into it.
//
// Of a logsumexp it is (row_max, row_sum), where row_sum is relative to row_max and double; of an extreme it is row_max
// and, where wanted, the column that attains it. Deterministic: the caller fixes the order of the merges.
#pragma once
#include "cpu/types.h"

namespace flashpair {
namespace {

INLINE float scalar_exp(float x) { return __builtin_expf(x); }
INLINE double scalar_exp(double x) { return __builtin_exp(x); }

// What a logsumexp's sum relative to `low` is multiplied by to be relative to `high`; 0 for low = -inf. A: the type
// that it is computed in.
template <class A, class T>
INLINE A rescale_factor(const Reduction<T>& r, T low, T high) {
  return low > -INF<T> ? scalar_exp((static_cast<A>(low) - static_cast<A>(high)) * static_cast<A>(r.steepness()))
                       : A(0);
}

// Merges another (max, sum) of the same row into a logsumexp's state.
template <class A, class T>
INLINE void merge(const Reduction<T>& r, T& row_max, double& row_sum, T max, A sum) {
  if (!(max > -INF<T>)) return;
  const T old = row_max;
  if (max > old) {
    row_sum = row_sum * static_cast<double>(rescale_factor<A>(r, old, max)) + sum;
    row_max = max;
  } else {
    row_sum += static_cast<double>(sum) * rescale_factor<A>(r, max, old);
  }
}

// The state of min and max. sign * z is maximised, and equal extremes go to the lowest index in the caller's order.
template <class T>
struct ExtremeState {
  const Problem<T>& p;
  const Reduction<T>& r;
  T sign;
  INLINE ExtremeState(const Problem<T>& problem, const Reduction<T>& reduction)
      : p(problem), r(reduction), sign(reduction.op == MAX ? T(1) : T(-1)) {}

  // Whether a maximum changes the row's state, or with an equal one may change its index.
  INLINE bool may_change(int64_t row, T max) const {
    const T old = sign * r.row_max[row];
    return max > -INF<T> && (max > old || (r.index && max == old));
  }
  // Takes a maximum that may change the state, and the column that attains it.
  INLINE void update(int64_t row, T max, int64_t column) const {
    if (r.index && (max > sign * r.row_max[row] || precedes(column, r.index[row]))) r.index[row] = column;
    r.row_max[row] = sign * max;
  }
  // Whether column a comes before column b in the caller's order.
  INLINE bool precedes(int64_t a, int64_t b) const { return p.perm[a] < p.perm[b]; }
};

}  // namespace
}  // namespace flashpair
