// The screen: which pairs of a tile int8 products cannot prove irrelevant to the reductions of one stage of a pass.
//
// Each anchor has one open interval of similarities that can matter to any of these reductions: their mining windows,
// what a hinge lets through, and of a minimum or maximum what reaches the extreme found so far. A pair outside of the
// intervals of its anchors is irrelevant. Stores two float32 thresholds a row and lane.
// Deterministic: the exact similarities decide; a screen only leaves out what cannot matter.
#pragma once
#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <vector>

#include "cpu/runtime.h"
#include "int8.h"

namespace flashpair {

// x (N, D) in int8. sq_norm (N,): squared norms, null for dot products.
template <class T>
std::shared_ptr<Int8Rows> quantize_rows(const Int8Kernels& kernels, const T* x, int64_t n, int64_t d, const T* sq_norm,
                                        int threads) {
  auto rows = std::make_shared<Int8Rows>(n, d, kernels.coords_per_word);
  parallel_chunks(n, threads, [&](int64_t first, int64_t last) {
    if constexpr (sizeof(T) == 4)
      kernels.quantize_floats(x, first, last, d, sq_norm, *rows);
    else
      kernels.quantize_doubles(x, first, last, d, sq_norm, *rows);
  });
  return rows;
}

template <class T>
class Screen {
 public:
  // refs: the references' int8 rows where they are at hand, else null.
  Screen(const Int8Kernels& kernels, const Problem<T>& p, const T* x, const T* y, int64_t d, int threads,
         std::shared_ptr<const Int8Rows> refs)
      : kernels_(kernels), p_(p), x_(quantize_rows(kernels, x, p.n, d, p.row_sq_norm, threads)), y_(std::move(refs)) {
    if (p.square) y_ = x_;
    if (!y_) y_ = quantize_rows(kernels, y, p.m, d, p.ref_sq_norm, threads);
  }

  // The reductions from now on, all of one side, with the state of each lane.
  void set_reductions(const std::vector<std::vector<Reduction<T>>>& by_lane) {
    by_lane_ = &by_lane;
    // Whether every reduction has a lower and an upper bound, whether all are extremes, and whether an extreme has no
    // bound on the side from which it comes.
    bool lower = true, upper = true, extremes = true, open = false;
    for (const Reduction<T>& r : by_lane[0]) {
      const bool hinge = is_hinge(r);
      extremes &= r.op == MIN || r.op == MAX;
      open |= (r.op == MIN && !r.upper) || (r.op == MAX && !r.lower);
      lower &= r.lower || r.op == MAX || (hinge && r.scale > 0);
      upper &= r.upper || r.op == MIN || (hinge && r.scale < 0);
    }
    narrows_ = extremes || open;
    has_high_ = p_.row_sq_norm ? lower : upper;
    stride_ = padded(p_.n);
    low_.assign(by_lane.size() * stride_, 0);
    high_.assign(has_high_ ? low_.size() : 0, 0);
    for (size_t lane = 0; lane < by_lane.size(); ++lane) update_rows(lane, 0, p_.n);
  }

  // Whether the intervals narrow as the pass goes on: with extremes that no window bounds, or nothing but extremes.
  bool narrows() const { return narrows_; }

  // To be called after each tile: extremes that were found in it narrow their anchors' intervals.
  void update(const Tile<T>& t, int64_t lane) {
    if (!narrows_) return;
    update_rows(lane, t.r0, t.rows);
    if (t.mirror) update_rows(lane, t.c0, t.cols);
  }

  // Lists the tile's candidates, packed as row << 16 | column: the pairs that may matter to either anchor. Returns how
  // many, or -1 where they exceed `capacity`.
  int64_t candidates(const Tile<T>& t, int64_t lane, int32_t* entry, int64_t capacity) const {
    const bool all = (*by_lane_)[lane][0].side == ALL;
    const Thresholds window{low_.data() + lane * stride_, has_high_ ? high_.data() + lane * stride_ : nullptr};
    const Excluded excluded{all ? nullptr : p_.pos_begin, p_.pos_end, p_.square};
    const Int8Tile tile{t.r0, t.rows, t.c0, std::max<int64_t>(0, std::min(t.cols, p_.num_valid - t.c0)), t.symmetric};
    return kernels_.candidates(*x_, *y_, window, excluded, tile, entry, capacity);
  }

 private:
  static constexpr T INFINITE = std::numeric_limits<T>::infinity();
  static constexpr T SLACK = 16 * std::numeric_limits<T>::epsilon();  // for a few roundings of a threshold

  void update_rows(int64_t lane, int64_t first, int64_t count) {
    for (int64_t i = first; i < first + count; ++i) {
      T low = INFINITE, high = -INFINITE;
      for (const Reduction<T>& r : (*by_lane_)[lane]) {
        const auto [a, b] = interval(r, i);
        low = std::min(low, a), high = std::max(high, b);
      }
      // Distances in (low, high) are similarities, minus half the squared norms, in -(high^2, low^2) / 2.
      if (p_.row_sq_norm) {
        const T closest = low < 0 ? INFINITE : -squared(low) / 2 * (1 - SLACK);
        low = high <= 0 ? INFINITE : -squared(high) / 2 * (1 + SLACK);
        high = closest;
      }
      low_[lane * stride_ + i] = round_outwards(low, -1);
      if (has_high_) high_[lane * stride_ + i] = round_outwards(high, 1);
    }
  }

  T squared(T z) const { return p_.squared ? z : z * z; }

  static bool is_hinge(const Reduction<T>& r) {
    return r.op == SUM && (r.transform == HINGE || r.transform == SQUARED_HINGE);
  }

  static int64_t padded(int64_t n) { return (n + PANEL - 1) / PANEL * PANEL; }

  // Every z that matters to anchor i lies strictly between these.
  std::pair<T, T> interval(const Reduction<T>& r, int64_t i) const {
    T low = r.lower ? r.lower[i] : -INFINITE, high = r.upper ? r.upper[i] : INFINITE;
    if (is_hinge(r) && r.scale != 0) {
      const T corner = -(r.offset ? r.offset[i] : r.shift) / r.scale;
      const T slack = std::isinf(corner) ? T(0) : std::abs(corner) * SLACK;
      if (r.scale > 0)
        low = std::max(low, corner - slack);
      else
        high = std::min(high, corner + slack);
    }
    if (r.op == MAX) low = std::max(low, std::nextafter(r.row_max[i], -INFINITE));
    if (r.op == MIN) high = std::min(high, std::nextafter(r.row_max[i], INFINITE));
    return {low, high};
  }

  // A threshold as float, moved outwards (by `sign`) past what rounding and underflow can do; NaN for none.
  static float round_outwards(T value, int sign) {
    constexpr float largest = std::numeric_limits<float>::max();
    if (sign * value > largest) return std::numeric_limits<float>::quiet_NaN();
    const float rounded = static_cast<float>(std::max<T>(-largest, std::min<T>(largest, value)));
    const float outwards = sign * std::numeric_limits<float>::infinity();
    return (sizeof(T) == 4 ? rounded : std::nextafter(rounded, outwards)) + sign * 1e-30f;
  }

  Int8Kernels kernels_;
  const Problem<T>& p_;
  std::shared_ptr<const Int8Rows> x_, y_;
  const std::vector<std::vector<Reduction<T>>>* by_lane_ = nullptr;
  bool narrows_ = false, has_high_ = false;
  int64_t stride_ = 0;
  std::vector<float> low_, high_;  // (lanes, stride)
};

}  // namespace flashpair
