// Sums of dot products over all negatives, or over all pairs, without the pairs: sum_j <x_i, y_j> = <x_i, sum_j y_j>.
//
// What a row leaves out is an interval of references, and intervals follow each other as rows do, so two running sums,
// from the first reference on and from the last one back, are all that is stored: O(D), in double. Nothing is
// subtracted from a whole, so a row with few negatives beside many positives loses nothing, and a row without any has
// exactly 0. Deterministic: one order.
#pragma once
#include <algorithm>
#include <vector>

#include "cpu/types.h"

namespace flashpair {

template <class T>
bool is_linear(const Problem<T>& p, const Reduction<T>& r) {
  const bool window = r.lower || r.upper || r.lower_of >= 0 || r.upper_of >= 0;
  const bool in_order = !p.split;  // of two groups intervals do not follow each other
  return in_order && r.op == SUM && r.transform == IDENTITY && r.side != POSITIVES && !window && !p.row_square;
}

template <class T>
class LinearSum {
 public:
  LinearSum(const Problem<T>& p, const Reduction<T>& r, const T* x, const T* y, int64_t d)
      : p_(p), r_(r), x_(x), y_(y), d_(d) {}

  // Adds the rows' sums to total (N,).
  void forward(double* total) const {
    each_row([&](int64_t i, const double* sum) { total[i] += r_.scale * dot(x_ + i * d_, sum); });
    for (int64_t i = 0; i < p_.n; ++i) total[i] += count(i) * (r_.offset ? r_.offset[i] : r_.shift);
  }

  // Adds to dx (N, D) and dy (M, D), which of a square problem is dx itself; null where not wanted; and to what the
  // reduction points to.
  void backward(T* dx, T* dy) const {
    if (dx || r_.grad_scale)
      each_row([&](int64_t i, const double* sum) {
        if (r_.grad_scale) *r_.grad_scale += r_.grad[i] * dot(x_ + i * d_, sum);
        if (dx) add_to(dx + i * d_, sum, double(r_.grad[i]) * r_.scale);
      });
    if (dy) each_reference([&](int64_t j, const double* sum) { add_to(dy + j * d_, sum, r_.scale); });
    for (int64_t i = 0; r_.grad_offset && i < p_.n; ++i) r_.grad_offset[i] += r_.grad[i] * static_cast<T>(count(i));
  }

 private:
  // Row i leaves out [first, past); neither falls as i rises.
  int64_t first(int64_t i) const { return std::min(p_.end, r_.side == NEGATIVES ? p_.lo[i] : p_.square ? i : p_.end); }
  int64_t past(int64_t i) const {
    return std::min(p_.end, r_.side == NEGATIVES ? p_.hi[i] : p_.square ? i + 1 : p_.end);
  }
  int64_t count(int64_t i) const { return first(i) + p_.end - past(i); }

  // f(row, sum of the references before those left out), then, rows in reverse, of those after them.
  template <class F>
  void each_row(F&& f) const {
    std::vector<double> sum(d_);
    for (int64_t i = 0, j = 0; i < p_.n; ++i) {
      for (; j < first(i); ++j) add(sum, y_ + j * d_, 1);
      f(i, sum.data());
    }
    std::fill(sum.begin(), sum.end(), 0);
    for (int64_t i = p_.n, j = p_.end; i-- > 0;) {
      while (j > past(i)) add(sum, y_ + --j * d_, 1);
      f(i, sum.data());
    }
  }
  // The same from the other end: sums of rows, times their gradients, that leave out references before j, and after j.
  template <class F>
  void each_reference(F&& f) const {
    std::vector<double> sum(d_);
    for (int64_t j = 0, i = 0; j < p_.end; ++j) {
      for (; i < p_.n && past(i) <= j; ++i) add(sum, x_ + i * d_, r_.grad[i]);
      f(j, sum.data());
    }
    std::fill(sum.begin(), sum.end(), 0);
    for (int64_t j = p_.end, i = p_.n; j-- > 0;) {
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
  double dot(const T* row, const double* sum) const {
    constexpr int64_t L = 8;  // chains of additions, which need not wait for each other
    double part[L] = {}, rest = 0;
    int64_t k = 0;
    for (; k + L <= d_; k += L)
      for (int64_t l = 0; l < L; ++l) part[l] += row[k + l] * sum[k + l];
    for (; k < d_; ++k) rest += row[k] * sum[k];
    for (double p : part) rest += p;
    return rest;
  }

  const Problem<T>& p_;
  const Reduction<T>& r_;
  const T *x_, *y_;
  int64_t d_;
};

}  // namespace flashpair
