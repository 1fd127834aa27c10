// The k nearest references of each row, exactly. Only pairs that may reach a row's k-th best so far are computed.
//
// Never materialises: more than one tile of similarities a thread. Deterministic: as pass.h, and equal similarities
// rank by index.
#pragma once
#include <utility>

#include "cpu/tile/pass.h"

namespace flashpair {

template <class T>
class Nearest : Pass<T> {
 public:
  explicit Nearest(const Pass<T>& pass) : Pass<T>(pass) {}

  // Writes similarities, or distances, (N, k) and references (N, k), best first. k is at most the pairs of a row, M is
  // below 2^31.
  void run(int threads, const Int8Kernels& int8, int64_t k, T* value, int64_t* index) {
    const bool finite = this->finite();
    if (k == 0 || !finite) {
      fill_nan(value, p_.n * k);
      std::fill_n(index, p_.n * k, int64_t{-1});
      return;
    }
    // 1. The screen: a maximum (of distances a minimum) whose state is each row's k-th best so far.
    sign_ = p_.row_sq_norm ? T(-1) : T(1);
    k_ = k;
    capacity_ = k + std::max(k, LEAST_SPARE);
    nearest_.resize(p_.n * capacity_), count_.assign(p_.n, 0);
    kth_best_.assign(p_.n, -sign_ * std::numeric_limits<T>::infinity());
    Reduction<T> extreme{};
    extreme.op = p_.row_sq_norm ? MIN : MAX, extreme.side = ALL, extreme.row_max = kth_best_.data();
    const std::vector<std::vector<Reduction<T>>> by_lane(this->grid_.lanes, {extreme});
    Screen<T> screen(int8, p_, this->x_, this->y_, this->d_, threads, nullptr);
    screen.set_reductions(by_lane);
    // 2. All tiles.
    this->for_each_grid_tile(
        threads, by_lane[0], false, [](int64_t) { return true; },
        [&](const Tile<T>& t, const TileIndex&, T* scratch) {
          search_tile(screen, t, reinterpret_cast<int32_t*>(scratch));
          screen.update(t, 0);
        });
    // 3. The best k of each row, in order.
    parallel_chunks(p_.n, threads, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        Neighbor* row = nearest_.data() + i * capacity_;
        if (count_[i] > k) std::nth_element(row, row + k - 1, row + count_[i]);
        std::sort(row, row + k);
        for (int64_t j = 0; j < k; ++j) value[i * k + j] = sign_ * -row[j].first, index[i * k + j] = row[j].second;
      }
    });
  }

 private:
  using Neighbor = std::pair<T, int32_t>;  // minus what is maximised, and the reference: the best is the least
  using Pass<T>::p_;

  void search_tile(const Screen<T>& screen, const Tile<T>& t, int32_t* entry) {
    const int64_t capacity = this->grid_.size * this->grid_.size / CANDIDATES_PAY;
    const int64_t num_candidates = screen.candidates(t, 0, entry, capacity);
    auto offer_pair = [&](int64_t row, int64_t column, T z) {
      offer(row, column, z);
      if (t.mirror) offer(column, row, z);
    };
    if (num_candidates >= 0) {
      this->kernels_.candidate_similarities(p_, t, entry, num_candidates, this->x_, this->y_, this->d_, t.z);
      for (int64_t e = 0; e < num_candidates; ++e)
        offer_pair(t.r0 + entry_row(entry[e]), t.c0 + entry_column(entry[e]), t.z[e]);
      return;
    }
    this->similarities(t, reinterpret_cast<T*>(entry));
    for (int64_t i = 0; i < t.rows; ++i)
      for (int64_t j = 0; j < t.cols; ++j)
        if (!p_.square || t.r0 + i != t.c0 + j) offer_pair(t.r0 + i, t.c0 + j, t.z[i * t.ld + j]);
  }

  // Appends a pair that may be among the row's best. When the row is full, only its k best stay, so that each pair
  // costs a constant number of steps.
  void offer(int64_t row, int64_t other, T z) {
    Neighbor* best = nearest_.data() + row * capacity_;
    const Neighbor now{-sign_ * z, static_cast<int32_t>(other)};
    int64_t& count = count_[row];
    if (-sign_ * kth_best_[row] < now.first) return;
    best[count++] = now;
    if (count < capacity_) return;
    std::nth_element(best, best + k_ - 1, best + count);
    count = k_;
    kth_best_[row] = -sign_ * best[k_ - 1].first;
  }

  T sign_ = 1;
  static constexpr int64_t LEAST_SPARE = 16;
  int64_t k_ = 0, capacity_ = 0;
  std::vector<Neighbor> nearest_;  // (N, capacity), of which the first count_ are set: the k best are among them
  std::vector<int64_t> count_;     // (N,)
  std::vector<T> kth_best_;        // (N,) what the next pair of a row has to reach
};

}  // namespace flashpair
