// One pass over tiles, forward or backward: product, epilogue, product, with the tiles shared by threads.
//
// Never materialises more than one tile of similarities and one of weights a thread. Deterministic: tiles.h fixes the
// order of the tiles, runtime.h keeps it for tiles that touch the same rows, so any number of threads gives the same
// bits.
#pragma once
#include <cmath>
#include <cstring>
#include <limits>
#include <optional>
#include <vector>

#include "cpu/runtime.h"
#include "cpu/screen/sieve.h"
#include "cpu/transform/linear.h"
#include "tiles.h"

namespace flashpair {

template <class T>
bool all_finite(const T* x, int64_t size) {
  constexpr int64_t L = 16;
  T zero[L] = {}, rest = 0;
  int64_t k = 0;
  for (; k + L <= size; k += L)
    for (int64_t l = 0; l < L; ++l) zero[l] += x[k + l] * 0;
  for (; k < size; ++k) rest += x[k] * 0;
  for (T z : zero) rest += z;
  return rest == 0;
}

template <class T>
class Pass {
 public:
  Pass(Kernels<T> kernels, Problem<T> problem, const T* x, const T* y, int64_t d, int64_t size, int64_t lanes)
      : kernels_(kernels), p_(problem), x_(x), y_(y), d_(d), grid_{p_.n, p_.m, size, lanes, p_.square, p_.split} {
    int64_t positives = 0;
    for (int64_t i = 0; i < p_.n; ++i) positives += p_.hi[i] - p_.lo[i];
    wide_ = WIDE_BAND * positives > (p_.split ? 2 * p_.split * (p_.n - p_.split) : p_.n * p_.m);
  }

  // Forward state and gradients are filled in by `forward` and `backward`.
  void add(const Reduction<T>& r) { given_.push_back(r); }

  // How many rows `values` has: one a reduction, and two more for each logsumexp (core/problem.py).
  int64_t rows_of_values() const { return top_row(static_cast<int64_t>(given_.size())); }
  int64_t top_row(int64_t k) const {
    int64_t row = static_cast<int64_t>(given_.size());
    for (int64_t before = 0; before < k; ++before) row += given_[before].op == LOGSUMEXP ? 2 : 0;
    return row;
  }

  // Values (rows of tiled.py's values, N) and, where not null, the extremes' references (K, N). `listed`: the reduction
  // whose live pairs go to `live`, or -1. Screened, pairs of all reductions off the band are listed.
  void forward(int threads, T* values, int64_t* index, const LiveLists<T>& live, int listed,
               const Screening& screening = {}) {
    const int64_t count = static_cast<int64_t>(given_.size()), n = p_.n, lanes = grid_.lanes;
    const T inf = std::numeric_limits<T>::infinity();
    std::vector<T> peak(lanes * count * n);
    std::vector<double> total(lanes * count * n);
    std::vector<int64_t> found(index ? lanes * count * n : 0, -1);
    for (int64_t lane = 0; lane < lanes; ++lane)
      for (int64_t k = 0; k < count; ++k)
        std::fill_n(peak.data() + (lane * count + k) * n, n, given_[k].op == MIN ? inf : -inf);
    std::vector<std::vector<T>> bounds;
    const bool is_finite = finite();
    std::optional<Sieve<T>> sieve;
    if (screening.int8 && is_finite && !wide_) sieve.emplace(screening, kernels_, p_, x_, y_, d_, grid_, threads);
    for (int stage = 0, last = 0; stage <= last; ++stage) {
      auto with_state = [&](bool band) {
        std::vector<std::vector<Reduction<T>>> by_lane(lanes);
        for (int64_t k = 0; k < count; ++k) {
          last = std::max(last, stage_of(k));
          if (stage_of(k) != stage || over_band(given_[k]) != band || is_linear(p_, given_[k])) continue;
          Reduction<T> r = bounded(given_[k], values, bounds);
          for (int64_t lane = 0; lane < lanes; ++lane) {
            const int64_t at = (lane * count + k) * n;
            r.peak = peak.data() + at, r.total = total.data() + at;
            r.index = index && given_[k].index ? found.data() + at : nullptr;
            by_lane[lane].push_back(r);
          }
        }
        return by_lane;
      };
      const auto band = with_state(true), grid = with_state(false);
      const bool list = listed >= 0 && stage_of(listed) == stage && !(wide_ && weighs_positives());
      const Reduction<T> to_list = list ? bounded(given_[listed], values, bounds) : Reduction<T>{};
      auto reduce = [&](const std::vector<Reduction<T>>& reductions, const Tile<T>& t, T* scratch) {
        similarities(t, scratch);
        kernels_.reduce(p_, reductions.data(), static_cast<int>(reductions.size()), t);
      };
      if (!band[0].empty())
        each_band_block(threads, false, [&](const Tile<T>& t, int64_t, T* scratch) { reduce(band[0], t, scratch); });
      const bool sift = sieve && !grid[0].empty() && sieve->begin(grid);
      if (!grid[0].empty())
        each_grid_tile(
            threads, grid[0], false, [](int64_t) { return true; },
            [&](const Tile<T>& t, const Place& place, T* scratch) {
              const bool sifted = sift && sieve->sift(grid[place.lane], t, place, scratch, live);
              if (!sifted) reduce(grid[place.lane], t, scratch);
              if (sift) sieve->renew(t, place);
              if (!list || sifted) return;
              const int64_t slot = grid_.slot(place);
              Live<T> few = live.at(slot);
              if (sieve) few.capacity /= SCREENED_TO_LISTED;
              live.count[slot] = static_cast<int32_t>(kernels_.list_live(p_, to_list, t, few));
            });
      for (int64_t k = 0; k < count; ++k) {
        if (stage_of(k) != stage) continue;
        if (is_linear(p_, given_[k])) LinearSum<T>(p_, given_[k], x_, y_, d_).forward(total.data() + k * n);
        finish(given_[k], k, peak, total, found, values, index ? index + k * n : nullptr);
      }
    }
    // An entry that is not finite makes every value NaN: no mining comparison may swallow it.
    if (!is_finite) std::fill_n(values, rows_of_values() * n, std::numeric_limits<T>::quiet_NaN());
  }

  // z (count,) of row rows[k] and reference cols[k].
  void similarities(int threads, int64_t count, const int64_t* rows, const int64_t* cols, T* z) const {
    in_chunks(count, threads, [&](int64_t first, int64_t last) {
      kernels_.pair_similarities(p_, x_, y_, d_, last - first, rows + first, cols + first, z + first);
    });
  }

  // Adds to the gradients, which come zeroed: dx (N, D), dy (M, D) (null: not wanted; never for a square problem), and
  // what the reductions point to. Reductions whose grad is null have no part.
  void backward(int threads, const T* values, T* dx, T* dy, const LiveLists<T>& live) {
    const int64_t n = p_.n, lanes = grid_.lanes;
    const int64_t blocks = std::max(band_of_rows().count(), grid_.row_blocks());
    std::vector<T> lane_dx(dx && lanes > 1 ? lanes * n * d_ : 0), pull(p_.row_square ? lanes * n : 0);
    std::vector<T> ref_pull(p_.row_square && dy ? p_.m : 0);
    std::vector<std::vector<T>> lane_offset(given_.size());
    std::vector<std::vector<double>> block_scale(given_.size());
    std::vector<std::vector<T>> bounds;
    bool columns_written = dy != nullptr;
    auto with_gradients = [&](bool band) {
      std::vector<std::vector<Reduction<T>>> by_lane(lanes);
      for (size_t k = 0; k < given_.size(); ++k) {
        const Reduction<T>& g = given_[k];
        if (!g.grad || (g.op != LOGSUMEXP && g.op != SUM) || over_band(g) != band || is_linear(p_, g)) continue;
        columns_written |= g.grad_ref_offset != nullptr;
        if (g.grad_offset) lane_offset[k].resize(lanes * n);
        if (g.grad_scale) block_scale[k].resize(lanes * blocks);
        Reduction<T> r = bounded(g, values, bounds);
        for (int64_t lane = 0; lane < lanes; ++lane) {
          if (g.grad_offset) r.grad_offset = lane_offset[k].data() + lane * n;
          if (g.grad_scale) r.grad_scale = block_scale[k].data() + lane * blocks;
          by_lane[lane].push_back(r);
        }
      }
      return by_lane;
    };
    const auto band = with_gradients(true), grid = with_gradients(false);
    auto dx_of = [&](int64_t lane) { return lanes > 1 && dx ? lane_dx.data() + lane * n * d_ : dx; };
    auto pull_of = [&](int64_t lane) { return p_.row_square ? pull.data() + lane * n : nullptr; };
    T* other_pull = ref_pull.empty() ? nullptr : ref_pull.data();
    auto spread = [&](const std::vector<Reduction<T>>& reductions, const Tile<T>& t, int64_t block, int64_t lane,
                      T* w) {
      similarities(t, w);
      T* mine = pull_of(lane);
      const Weights found = kernels_.weigh(p_, reductions.data(), static_cast<int>(reductions.size()), t, block, w,
                                           mine, t.mirror ? mine : other_pull);
      T *own = dx_of(lane), *to = t.mirror && dx ? dx : dy;
      if (found.near) kernels_.scatter_near(t, x_, y_, d_, own, to);
      if (!found.any) return;
      if (dx) add_product(w, t.ld, false, t.rows, y_ + t.c0 * d_, t.cols, own + t.r0 * d_);
      if (to) add_product(w, t.ld, true, t.cols, x_ + t.r0 * d_, t.rows, to + t.c0 * d_);
    };
    if (!band[0].empty())
      each_band_block(threads, columns_written,
                      [&](const Tile<T>& t, int64_t block, T* w) { spread(band[0], t, block, 0, w); });
    if (!grid[0].empty())
      each_grid_tile(
          threads, grid[0], columns_written, [&](int64_t slot) { return !live.count || live.count[slot] != 0; },
          [&](const Tile<T>& t, const Place& place, T* w) {
            const int64_t slot = grid_.slot(place);
            if (!live.count || live.count[slot] < 0) return spread(grid[place.lane], t, place.row_block, place.lane, w);
            T* to = dx_of(place.lane);
            for (const Reduction<T>& r : grid[place.lane])
              kernels_.scatter(p_, r, t, live.at(slot), live.count[slot], place.row_block, x_, y_, d_, to,
                               t.mirror ? to : dy);
          });
    for (size_t k = 0; k < given_.size(); ++k) {
      for (double part : block_scale[k]) *given_[k].grad_scale += part;
      for (size_t i = 0; i < lane_offset[k].size(); ++i) given_[k].grad_offset[i % n] += lane_offset[k][i];
      if (given_[k].grad && given_[k].index) extreme_gradient(given_[k], dx, dy);
      if (given_[k].grad && is_linear(p_, given_[k]))
        LinearSum<T>(p_, given_[k], x_, y_, d_).backward(dx, p_.square ? dx : dy);
    }
    for (size_t i = 0; i < lane_dx.size(); ++i) dx[i % (n * d_)] += lane_dx[i];
    if (dx) add_pull(pull, x_, n, dx);
    if (dy) add_pull(ref_pull, y_, p_.m, dy);
    if (finite()) return;
    const T nan = std::numeric_limits<T>::quiet_NaN();
    if (dx) std::fill_n(dx, n * d_, nan);
    if (dy) std::fill_n(dy, p_.m * d_, nan);
    for (const Reduction<T>& r : given_) {
      if (r.grad_scale) *r.grad_scale = nan;
      if (r.grad_offset) std::fill_n(r.grad_offset, n, nan);
      if (r.grad_ref_offset) std::fill_n(r.grad_ref_offset, p_.m, nan);
    }
  }

 protected:
  static constexpr int64_t NARROW_BAND_WORK = int64_t{1} << 27;  // multiply-adds
  static constexpr int64_t WIDE_BAND = 4;  // positives of over 1 / 4 of all pairs go over the grid, not the band

  static constexpr int64_t SCREENED_TO_LISTED = 16;  // room for pairs of a screened tile, and of one computed whole

  bool over_band(const Reduction<T>& r) const { return r.side == POSITIVES && !wide_; }

  bool finite() const { return all_finite(x_, p_.n * d_) && (p_.square || all_finite(y_, p_.m * d_)); }
  bool weighs_positives() const {
    for (const Reduction<T>& r : given_)
      if (r.side == POSITIVES && (r.op == LOGSUMEXP || r.op == SUM)) return true;
    return false;
  }
  // 0 for a reduction whose window needs no other's values, else one more than theirs.
  int stage_of(int64_t k) const {
    const Reduction<T>& r = given_[k];
    const int low = r.lower_of < 0 ? 0 : 1 + stage_of(r.lower_of), up = r.upper_of < 0 ? 0 : 1 + stage_of(r.upper_of);
    return std::max(low, up);
  }
  // The reduction with its window's bounds computed from `values` (K, N) into `bounds`.
  Reduction<T> bounded(Reduction<T> r, const T* values, std::vector<std::vector<T>>& bounds) const {
    auto shifted = [&](int of, double by) {
      std::vector<T> bound(values + of * p_.n, values + (of + 1) * p_.n);
      for (T& v : bound) v += static_cast<T>(by);
      bounds.push_back(std::move(bound));
      return static_cast<const T*>(bounds.back().data());
    };
    if (r.lower_of >= 0) r.lower = shifted(r.lower_of, r.lower_shift);
    if (r.upper_of >= 0) r.upper = shifted(r.upper_of, r.upper_shift);
    return r;
  }

  void similarities(const Tile<T>& t, T* scratch) const {
    kernels_.similarities(p_, t, x_, y_, d_, scratch, scratch + grid_.area());
  }
  Band<T> band_of_rows() const { return {p_, grid_.size, grid_.stride()}; }
  // A tile, one more, and the columns of one as `similarities` reads them.
  int64_t room() const { return 2 * grid_.area() + std::min(d_, DEPTH) * grid_.stride(); }

  // to (rows, D) += w from, or w^T from: w is (rows, inner), or (inner, rows) and read transposed.
  void add_product(const T* w, int64_t ld, bool transpose, int64_t rows, const T* from, int64_t inner, T* to) const {
    const Gemm<T> gemm = kernels_.quick_products ? nullptr : runtime().gemm<T>();
    if (gemm) {
      const int m = static_cast<int>(d_), n = static_cast<int>(rows), k = static_cast<int>(inner),
                stride = static_cast<int>(ld);
      const T one = 1;
      gemm("N", transpose ? "T" : "N", &m, &n, &k, &one, from, &m, w, &stride, &one, to, &m);
    } else {
      kernels_.add_product(w, ld, transpose, rows, from, inner, d_, to);
    }
  }

  template <class Visit>
  void each_band_block(int threads, bool columns_written, Visit&& visit) {
    const Band<T> band = band_of_rows();
    // Neighbouring blocks share columns; and a narrow band is not worth waking threads for.
    if ((columns_written && !p_.square) || band.pairs() * d_ < NARROW_BAND_WORK) threads = 1;
    in_order(
        band.count(), band.count(), threads, [](int64_t k) { return std::make_pair(k, int64_t{-1}); },
        [&](int64_t k) {
          Buffers memory(room() * sizeof(T));
          T* z = static_cast<T*>(memory.get());
          band.visit(k, z, [&](const Tile<T>& t) { visit(t, k, z + grid_.area()); });
        });
  }

  template <class Wanted, class Visit>
  void each_grid_tile(int threads, const std::vector<Reduction<T>>& reductions, bool columns_written, Wanted&& wanted,
                      Visit&& visit) {
    bool positives_only = true;
    for (const Reduction<T>& r : reductions) positives_only &= r.side == POSITIVES;
    const int64_t rows = grid_.row_blocks() * grid_.lanes;
    in_order(
        grid_.count(), rows + grid_.col_blocks(), threads,
        [&](int64_t k) {
          Place place;
          if (!grid_.at(k, place)) return std::make_pair(int64_t{-1}, int64_t{-1});
          const int64_t row = place.lane * grid_.row_blocks() + place.row_block;
          if (grid_.triangle())
            return std::make_pair(row, place.row_block == place.col_block ? int64_t{-1} : place.col_block);
          const bool columns_touched = columns_written || p_.square;  // of two groups: the other's rows
          return std::make_pair(row, columns_touched ? rows + place.col_block : int64_t{-1});
        },
        [&](int64_t k) {
          Place place;
          if (!grid_.at(k, place) || !wanted(grid_.slot(place))) return;
          Buffers memory(room() * sizeof(T));
          T* z = static_cast<T*>(memory.get());
          const Tile<T> t = grid_.tile(place, z);
          if (positives_only && (p_.lo[t.r0] >= t.c0 + t.cols || p_.hi[t.r0 + t.rows - 1] <= t.c0)) return;
          visit(t, place, z + grid_.area());
        });
  }

  // The lanes' states merged in order; equal extremes go to the lowest index in the caller's order.
  void finish(const Reduction<T>& r, int64_t k, const std::vector<T>& peak, const std::vector<double>& total,
              const std::vector<int64_t>& found, T* values, int64_t* index) const {
    const int64_t n = p_.n, count = static_cast<int64_t>(given_.size());
    T *top = values + top_row(k) * n, *rest = top + n;
    values += k * n;
    constexpr T infinite = std::numeric_limits<T>::infinity();
    for (int64_t i = 0; i < n; ++i) {
      T best = peak[k * n + i];
      double sum = total[k * n + i];
      int64_t at = found.empty() ? -1 : found[k * n + i];
      for (int64_t lane = 1; lane < grid_.lanes; ++lane) {
        const int64_t other = (lane * count + k) * n + i;
        const T p = peak[other];
        if (r.op == SUM || r.op == COUNT) {
          sum += total[other];
        } else if (r.op == LOGSUMEXP) {
          const T high = std::max(best, p);
          auto shrunk = [&](T low) {
            const double below = static_cast<double>(low) - high;
            return low > -infinite ? std::exp(below * r.steepness()) : 0.0;
          };
          sum = sum * shrunk(best) + total[other] * shrunk(p);
          best = high;
        } else {
          const bool better = r.op == MAX ? p > best : p < best;
          const bool same = p == best && at >= 0 && found[other] >= 0 && order(found[other]) < order(at);
          if (!found.empty() && (better || same)) at = found[other];
          best = better ? p : best;
        }
      }
      if (r.op == LOGSUMEXP) {
        const bool some = best > -infinite;
        const double log = std::log(sum), steep = r.steepness();
        values[i] = some ? static_cast<T>(log + steep * best) : -infinite;
        top[i] = some ? r.direction() * best : T(0);
        rest[i] = some ? static_cast<T>(log) : infinite;
      } else {
        values[i] = r.op == SUM || r.op == COUNT ? static_cast<T>(sum) : best;
      }
      if (index) index[i] = at;
    }
  }
  int64_t order(int64_t column) const { return p_.order[column]; }

  // A min's or max's gradient goes to the one pair that attained it.
  void extreme_gradient(const Reduction<T>& r, T* dx, T* dy) const {
    T* other = p_.square ? dx : dy;
    for (int64_t i = 0; i < p_.n; ++i) {
      const int64_t j = r.index[i];
      if (j < 0) continue;
      const T *x = x_ + i * d_, *y = y_ + j * d_;
      T w = r.grad[i];
      if (p_.row_square) w = r.value[i] == T(0) ? T(0) : p_.squared ? 2 * w : w / r.value[i];
      for (int64_t k = 0; k < d_; ++k) {
        if (dx) dx[i * d_ + k] += w * (p_.row_square ? x[k] - y[k] : y[k]);
        if (other) other[j * d_ + k] += w * (p_.row_square ? y[k] - x[k] : x[k]);
      }
    }
  }
  // Euclidean distances: what every pair of a row pulls along the row's own vector.
  void add_pull(const std::vector<T>& pull, const T* x, int64_t rows, T* to) const {
    for (size_t i = 0; i < pull.size(); ++i)
      for (int64_t k = 0; k < d_; ++k) to[i % rows * d_ + k] += pull[i] * x[i % rows * d_ + k];
  }

  Kernels<T> kernels_;
  Problem<T> p_;
  const T *x_, *y_;
  int64_t d_;
  Grid grid_;
  bool wide_;
  std::vector<Reduction<T>> given_;
};

}  // namespace flashpair
