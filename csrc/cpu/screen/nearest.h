// The k nearest references of each row, exactly: a row's k-th best so far is what a pair has to reach to be computed.
//
// Never materialises more than one tile of similarities a thread. Deterministic, as pass.h: equal ones rank by index.
#pragma once
#include <utility>

#include "cpu/tile/pass.h"

namespace flashpair {

template <class T>
class Nearest : Pass<T> {
 public:
  explicit Nearest(const Pass<T>& pass) : Pass<T>(pass) {}

  // Best first: similarities, or distances, (N, k), and references (N, k). k is at most the pairs of a row, M below
  // 2^31.
  void run(int threads, const Int8Kernels& int8, int64_t k, T* value, int64_t* index) {
    const bool finite = this->finite();
    if (k == 0 || !finite) {
      std::fill_n(value, p_.n * k, std::numeric_limits<T>::quiet_NaN());
      std::fill_n(index, p_.n * k, int64_t{-1});
      return;
    }
    sign_ = p_.row_square ? T(-1) : T(1);
    k_ = k;
    room_ = k + std::max(k, LEAST_SPARE);
    best_.resize(p_.n * room_), held_.assign(p_.n, 0);
    worst_.assign(p_.n, -sign_ * std::numeric_limits<T>::infinity());
    Reduction<T> reach{};
    reach.op = p_.row_square ? MIN : MAX, reach.side = ALL, reach.peak = worst_.data();
    const std::vector<std::vector<Reduction<T>>> wanted(this->grid_.lanes, {reach});
    Screen<T> screen(int8, p_, this->x_, this->y_, this->d_, threads, nullptr);
    screen.want(wanted);
    this->each_grid_tile(
        threads, wanted[0], false, [](int64_t) { return true; },
        [&](const Tile<T>& t, const Place&, T* scratch) {
          look(screen, t, reinterpret_cast<int32_t*>(scratch));
          screen.renew(t, 0);
        });
    in_chunks(p_.n, threads, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        Found* row = best_.data() + i * room_;
        if (held_[i] > k) std::nth_element(row, row + k - 1, row + held_[i]);
        std::sort(row, row + k);
        for (int64_t j = 0; j < k; ++j) value[i * k + j] = sign_ * -row[j].first, index[i * k + j] = row[j].second;
      }
    });
  }

 private:
  using Found = std::pair<T, int32_t>;  // minus what is maximised, and the reference: the best is the least
  using Pass<T>::p_;

  void look(const Screen<T>& screen, const Tile<T>& t, int32_t* entry) {
    const int64_t most = this->grid_.size * this->grid_.size / MOST_CANDIDATES;
    const int64_t found = screen.candidates(t, 0, entry, most);
    auto meet = [&](int64_t row, int64_t column, T z) {
      enter(row, column, z);
      if (t.mirror) enter(column, row, z);
    };
    if (found >= 0) {
      this->kernels_.similar(p_, t, entry, found, this->x_, this->y_, this->d_, t.z);
      for (int64_t e = 0; e < found; ++e) meet(t.r0 + (entry[e] >> 16), t.c0 + (entry[e] & 0xffff), t.z[e]);
      return;
    }
    this->similarities(t, reinterpret_cast<T*>(entry));
    for (int64_t i = 0; i < t.rows; ++i)
      for (int64_t j = 0; j < t.cols; ++j)
        if (!p_.square || t.r0 + i != t.c0 + j) meet(t.r0 + i, t.c0 + j, t.z[i * t.ld + j]);
  }

  // What may be among the best is kept until a row is full, then the k best of it: a constant number of steps each.
  void enter(int64_t row, int64_t other, T z) {
    Found* best = best_.data() + row * room_;
    const Found now{-sign_ * z, static_cast<int32_t>(other)};
    int64_t& held = held_[row];
    if (-sign_ * worst_[row] < now.first) return;
    best[held++] = now;
    if (held < room_) return;
    std::nth_element(best, best + k_ - 1, best + held);
    held = k_;
    worst_[row] = -sign_ * best[k_ - 1].first;
  }

  T sign_ = 1;
  static constexpr int64_t LEAST_SPARE = 16;
  int64_t k_ = 0, room_ = 0;
  std::vector<Found> best_;    // (N, room), of which `held`: the k best so far are among them
  std::vector<int64_t> held_;  // (N,)
  std::vector<T> worst_;       // (N,) what a row's next has to reach
};

}  // namespace flashpair
