// Sums of dot products over all negatives, or over all pairs, without the pairs: sum_j <x_i, y_j> = <x_i, sum_j y_j>.
//
// A row excludes an interval of references, and intervals ascend as rows do. So two running sums of references, from
// the first one on and from the last one back, are all that is stored: O(D), in double. Nothing is subtracted from a
// total, so a row with few negatives beside many positives loses no digits, and a row without negatives has exactly 0.
// Deterministic: one order.
#pragma once
#include <algorithm>
#include <vector>

#include "cpu/dot.h"
#include "cpu/types.h"

namespace flashpair {

template <class T>
bool is_linear(const Problem<T>& p, const Reduction<T>& r) {
  const bool window = r.lower || r.upper || r.lower_of >= 0 || r.upper_of >= 0;
  const bool ascending = !p.split;  // with two groups the intervals do not ascend
  return ascending && r.op == SUM && r.transform == IDENTITY && r.side != POSITIVES && !window && !p.row_sq_norm;
}

template <class T>
class LinearSum {
 public:
  LinearSum(const Problem<T>& p, const Reduction<T>& r, const T* x, const T* y, int64_t d)
      : p_(p), r_(r), x_(x), y_(y), d_(d) {}

  // Adds the rows' sums to row_sum (N,).
  void forward(double* row_sum) const {
    for_each_row([&](int64_t i, const double* sum) { row_sum[i] += r_.scale * dot(x_ + i * d_, sum, d_); });
    for (int64_t i = 0; i < p_.n; ++i) row_sum[i] += count(i) * (r_.offset ? r_.offset[i] : r_.shift);
  }

  // Adds to dx (N, D) and dy (M, D), which is dx itself in a square problem (null: not wanted), and to the reduction's
  // own gradients.
  void backward(T* dx, T* dy) const {
    if (dx || r_.grad_scale)
      for_each_row([&](int64_t i, const double* sum) {
        if (r_.grad_scale) *r_.grad_scale += r_.grad[i] * dot(x_ + i * d_, sum, d_);
        if (dx) add_to(dx + i * d_, sum, double(r_.grad[i]) * r_.scale);
      });
    if (dy) for_each_reference([&](int64_t j, const double* sum) { add_to(dy + j * d_, sum, r_.scale); });
    for (int64_t i = 0; r_.grad_offset && i < p_.n; ++i) r_.grad_offset[i] += r_.grad[i] * static_cast<T>(count(i));
  }

 private:
  // Row i excludes the references [first, past). Both ascend with i.
  int64_t first(int64_t i) const {
    return std::min(p_.num_valid, r_.side == NEGATIVES ? p_.pos_begin[i] : p_.square ? i : p_.num_valid);
  }
  int64_t past(int64_t i) const {
    return std::min(p_.num_valid, r_.side == NEGATIVES ? p_.pos_end[i] : p_.square ? i + 1 : p_.num_valid);
  }
  int64_t count(int64_t i) const { return first(i) + p_.num_valid - past(i); }

  // Calls f(row, sum of the references before the excluded ones) for all rows; then, in reverse, f(row, sum of those
  // after them).
  template <class F>
  void for_each_row(F&& f) const {
    std::vector<double> sum(d_);
    for (int64_t i = 0, j = 0; i < p_.n; ++i) {
      for (; j < first(i); ++j) add(sum, y_ + j * d_, 1);
      f(i, sum.data());
    }
    std::fill(sum.begin(), sum.end(), 0);
    for (int64_t i = p_.n, j = p_.num_valid; i-- > 0;) {
      while (j > past(i)) add(sum, y_ + --j * d_, 1);
      f(i, sum.data());
    }
  }
  // The same with the roles exchanged: f(reference j, sum of g_i x_i over the rows whose excluded interval ends before
  // j), then over those whose interval begins after j.
  template <class F>
  void for_each_reference(F&& f) const {
    std::vector<double> sum(d_);
    for (int64_t j = 0, i = 0; j < p_.num_valid; ++j) {
      for (; i < p_.n && past(i) <= j; ++i) add(sum, x_ + i * d_, r_.grad[i]);
      f(j, sum.data());
    }
    std::fill(sum.begin(), sum.end(), 0);
    for (int64_t j = p_.num_valid, i = p_.n; j-- > 0;) {
      for (; i > 0 && first(i - 1) > j; --i) add(sum, x_ + (i - 1) * d_, r_.grad[i - 1]);
      f(j, sum.data());
    }
  }

  void add(std::vector<double>& sum, const T* row, double weight) const {
    for (int64_t k = 0; k < d_; ++k) sum[k] += weight * row[k];
  }
  void add_to(T* row, const double* sum, double weight) const {
    for (int64_t k = 0; k < d_; ++k) row[k] += static_cast<T>(weight * sum[k]);
  }

  const Problem<T>& p_;
  const Reduction<T>& r_;
  const T *x_, *y_;
  int64_t d_;
};

}  // namespace flashpair
