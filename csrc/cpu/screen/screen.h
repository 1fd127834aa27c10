// The pairs of a tile that int8 products cannot prove dead, for the reductions of one stage of a pass.
//
// Each anchor has one interval of similarities outside of which none of these reductions has a use for a pair: their
// windows, what a hinge lets through, and of a minimum or maximum what reaches the extreme found so far.
#pragma once
#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <vector>

#include "cpu/runtime.h"
#include "int8.h"

namespace flashpair {

// x (N, D) in whole numbers; square (N,): squared norms, null for dot products.
template <class T>
std::shared_ptr<Int8Rows> rounded_rows(const Int8Kernels& kernels, const T* x, int64_t n, int64_t d, const T* square,
                                       int threads) {
  auto rows = std::make_shared<Int8Rows>(n, d, kernels.depth);
  in_chunks(n, threads, [&](int64_t first, int64_t last) {
    if constexpr (sizeof(T) == 4)
      kernels.round_floats(x, first, last, d, square, *rows);
    else
      kernels.round_doubles(x, first, last, d, square, *rows);
  });
  return rows;
}

template <class T>
class Screen {
 public:
  // refs: the references' rows where they were rounded before, else null.
  Screen(const Int8Kernels& kernels, const Problem<T>& p, const T* x, const T* y, int64_t d, int threads,
         std::shared_ptr<const Int8Rows> refs)
      : kernels_(kernels), p_(p), x_(rounded_rows(kernels, x, p.n, d, p.row_square, threads)), y_(std::move(refs)) {
    if (p.square) y_ = x_;
    if (!y_) y_ = rounded_rows(kernels, y, p.m, d, p.ref_square, threads);
  }

  // The reductions from now on, with the state of each lane; all of one side.
  void want(const std::vector<std::vector<Reduction<T>>>& by_lane) {
    wanted_ = &by_lane;
    bool lower = true, upper = true, extremes = true, open = false;
    for (const Reduction<T>& r : by_lane[0]) {
      const bool hinge = hinged(r);
      extremes &= r.op == MIN || r.op == MAX;
      open |= (r.op == MIN && !r.upper) || (r.op == MAX && !r.lower);
      lower &= r.lower || r.op == MAX || (hinge && r.scale > 0);
      upper &= r.upper || r.op == MIN || (hinge && r.scale < 0);
    }
    running_ = extremes || open;
    high_wanted_ = p_.row_square ? lower : upper;
    stride_ = padded(p_.n);
    low_.assign(by_lane.size() * stride_, 0);
    high_.assign(high_wanted_ ? low_.size() : 0, 0);
    for (size_t lane = 0; lane < by_lane.size(); ++lane) renew(lane, 0, p_.n);
  }

  // Whether the intervals narrow as the pass goes on: with extremes that no window bounds, or nothing but extremes.
  bool running() const { return running_; }

  // To be called after each tile: extremes found in it narrow what its anchors want.
  void renew(const Tile<T>& t, int64_t lane) {
    if (!running_) return;
    renew(lane, t.r0, t.rows);
    if (t.mirror) renew(lane, t.c0, t.cols);
  }

  // row << 16 | column of the tile's pairs that may be of use to either anchor; -1: more than `capacity`.
  int64_t candidates(const Tile<T>& t, int64_t lane, int32_t* entry, int64_t capacity) const {
    const bool all = (*wanted_)[lane][0].side == ALL;
    const Thresholds window{low_.data() + lane * stride_, high_wanted_ ? high_.data() + lane * stride_ : nullptr};
    const Excluded none{all ? nullptr : p_.lo, p_.hi, p_.square};
    const Int8Tile tile{t.r0, t.rows, t.c0, std::max<int64_t>(0, std::min(t.cols, p_.end - t.c0)), t.symmetric};
    return kernels_.candidates(*x_, *y_, window, none, tile, entry, capacity);
  }

 private:
  static constexpr T INFINITE = std::numeric_limits<T>::infinity();
  static constexpr T SLACK = 16 * std::numeric_limits<T>::epsilon();  // of a few roundings of a threshold

  void renew(int64_t lane, int64_t first, int64_t count) {
    for (int64_t i = first; i < first + count; ++i) {
      T low = INFINITE, high = -INFINITE;
      for (const Reduction<T>& r : (*wanted_)[lane]) {
        const auto [a, b] = interval(r, i);
        low = std::min(low, a), high = std::max(high, b);
      }
      if (p_.row_square) {  // distances in (low, high) are similarities, less halves, in -(high^2, low^2) / 2
        const T near = low < 0 ? INFINITE : -squared(low) / 2 * (1 - SLACK);
        low = high <= 0 ? INFINITE : -squared(high) / 2 * (1 + SLACK);
        high = near;
      }
      low_[lane * stride_ + i] = bound(low, -1);
      if (high_wanted_) high_[lane * stride_ + i] = bound(high, 1);
    }
  }

  T squared(T z) const { return p_.squared ? z : z * z; }

  static bool hinged(const Reduction<T>& r) {
    return r.op == SUM && (r.transform == HINGE || r.transform == SQUARED_HINGE);
  }

  static int64_t padded(int64_t n) { return (n + PANEL - 1) / PANEL * PANEL; }

  // Every z that counts for anchor i lies strictly between these.
  std::pair<T, T> interval(const Reduction<T>& r, int64_t i) const {
    T low = r.lower ? r.lower[i] : -INFINITE, high = r.upper ? r.upper[i] : INFINITE;
    if (hinged(r) && r.scale != 0) {
      const T corner = -(r.offset ? r.offset[i] : r.shift) / r.scale;
      const T slack = std::isinf(corner) ? T(0) : std::abs(corner) * SLACK;
      if (r.scale > 0)
        low = std::max(low, corner - slack);
      else
        high = std::min(high, corner + slack);
    }
    if (r.op == MAX) low = std::max(low, std::nextafter(r.peak[i], -INFINITE));
    if (r.op == MIN) high = std::min(high, std::nextafter(r.peak[i], INFINITE));
    return {low, high};
  }

  // A threshold as float, moved outwards (sign) past what rounding and underflow can do; NaN for none.
  static float bound(T value, int sign) {
    constexpr float most = std::numeric_limits<float>::max();
    if (sign * value > most) return std::numeric_limits<float>::quiet_NaN();
    const float near = static_cast<float>(std::max<T>(-most, std::min<T>(most, value)));
    const float outwards = sign * std::numeric_limits<float>::infinity();
    return (sizeof(T) == 4 ? near : std::nextafter(near, outwards)) + sign * 1e-30f;
  }

  Int8Kernels kernels_;
  const Problem<T>& p_;
  std::shared_ptr<const Int8Rows> x_, y_;
  const std::vector<std::vector<Reduction<T>>>* wanted_ = nullptr;
  bool running_ = false, high_wanted_ = false;
  int64_t stride_ = 0;
  std::vector<float> low_, high_;
};

}  // namespace flashpair
