// One pass over tiles, forward or backward: similarities, the reductions' epilogue, and in backward gradient products.
// Threads share the tiles.
//
// Never materialises: more than one tile of similarities and one of weights a thread.
// Deterministic: tiles.h fixes the order of the tiles, and runtime.h keeps it for tiles that touch the same rows. So
// any number of threads gives the same bits.
#pragma once
#include <cmath>
#include <cstring>
#include <limits>
#include <optional>
#include <vector>

#include "cpu/nonfinite.h"
#include "cpu/runtime.h"
#include "cpu/screen/screened_tiles.h"
#include "cpu/transform/linear.h"
#include "row_state.h"
#include "tiles.h"

namespace flashpair {

template <class T>
class Pass {
 public:
  Pass(Kernels<T> kernels, Problem<T> problem, const T* x, const T* y, int64_t d, int64_t size, int64_t lanes)
      : kernels_(kernels), p_(problem), x_(x), y_(y), d_(d), grid_{p_.n, p_.m, size, lanes, p_.square, p_.split} {
    int64_t positives = 0;
    for (int64_t i = 0; i < p_.n; ++i) positives += p_.pos_end[i] - p_.pos_begin[i];
    dense_positives_ = DENSE_POSITIVES * positives > (p_.split ? 2 * p_.split * (p_.n - p_.split) : p_.n * p_.m);
  }

  // `forward` and `backward` fill in the reduction's state.
  void add(const Reduction<T>& r) { reductions_.push_back(r); }

  // How many rows `values` has: one a reduction, and two more for each logsumexp (core/problem.py).
  int64_t num_value_rows() const { return top_z_row(static_cast<int64_t>(reductions_.size())); }
  // The row of reduction k's top_z; its log_sum follows.
  int64_t top_z_row(int64_t k) const {
    int64_t row = static_cast<int64_t>(reductions_.size());
    for (int64_t before = 0; before < k; ++before) row += reductions_[before].op == LOGSUMEXP ? 2 : 0;
    return row;
  }

  // Writes values (num_value_rows, N) and, where not null, the extremes' columns index (K, N). Reduction `listed` has
  // its kept pairs listed in `kept`; -1: none. Where tiles are screened, pairs of all reductions that are not over the
  // positives' tiles are listed.
  void forward(int threads, T* values, int64_t* index, const KeptLists<T>& kept, int listed,
               const Screening& screening = {}) {
    const int64_t count = static_cast<int64_t>(reductions_.size()), n = p_.n, lanes = grid_.lanes;
    const T inf = std::numeric_limits<T>::infinity();
    // 1. The state of each lane, reduction and row.
    std::vector<T> row_max(lanes * count * n);
    std::vector<double> row_sum(lanes * count * n);
    std::vector<int64_t> winner(index ? lanes * count * n : 0, -1);
    for (int64_t lane = 0; lane < lanes; ++lane)
      for (int64_t k = 0; k < count; ++k)
        std::fill_n(row_max.data() + (lane * count + k) * n, n, reductions_[k].op == MIN ? inf : -inf);
    std::vector<std::vector<T>> bounds;
    const bool is_finite = finite();
    std::optional<ScreenedTiles<T>> screened;
    if (screening.int8 && is_finite && !dense_positives_)
      screened.emplace(screening, kernels_, p_, x_, y_, d_, grid_, threads);
    // 2. The stages: a reduction whose window is bound to another's values comes one stage later.
    for (int stage = 0, last = 0; stage <= last; ++stage) {
      auto with_state = [&](bool over_positives) {
        std::vector<std::vector<Reduction<T>>> by_lane(lanes);
        for (int64_t k = 0; k < count; ++k) {
          last = std::max(last, stage_of(k));
          if (stage_of(k) != stage || on_positive_tiles(reductions_[k]) != over_positives ||
              is_linear(p_, reductions_[k]))
            continue;
          Reduction<T> r = with_bounds(reductions_[k], values, bounds);
          for (int64_t lane = 0; lane < lanes; ++lane) {
            const int64_t at = (lane * count + k) * n;
            r.row_max = row_max.data() + at, r.row_sum = row_sum.data() + at;
            r.index = index && reductions_[k].index ? winner.data() + at : nullptr;
            by_lane[lane].push_back(r);
          }
        }
        return by_lane;
      };
      const auto positives = with_state(true), all = with_state(false);
      const bool list = listed >= 0 && stage_of(listed) == stage && !(dense_positives_ && weights_positives());
      const Reduction<T> to_list = list ? with_bounds(reductions_[listed], values, bounds) : Reduction<T>{};
      auto reduce = [&](const std::vector<Reduction<T>>& reductions, const Tile<T>& t, T* scratch) {
        similarities(t, scratch);
        kernels_.reduce(p_, reductions.data(), static_cast<int>(reductions.size()), t);
      };
      // 2a. Positives, over the few tiles that hold them.
      if (!positives[0].empty())
        for_each_positive_block(threads, false,
                                [&](const Tile<T>& t, int64_t, T* scratch) { reduce(positives[0], t, scratch); });
      // 2b. The other reductions, over the grid: a tile's candidates where it is screened and they are few, else all of
      // its pairs.
      const bool screen = screened && !all[0].empty() && screened->begin_stage(all);
      if (!all[0].empty())
        for_each_grid_tile(
            threads, all[0], false, [](int64_t) { return true; },
            [&](const Tile<T>& t, const TileIndex& tile, T* scratch) {
              const bool by_candidates = screen && screened->reduce(all[tile.lane], t, tile, scratch, kept);
              if (!by_candidates) reduce(all[tile.lane], t, scratch);
              if (screen) screened->update(t, tile);
              if (!list || by_candidates) return;
              const int64_t slot = grid_.slot(tile);
              KeptPairs<T> pairs = kept.at(slot);
              if (screened) pairs.capacity /= SCREENED_TO_LISTED;
              kept.count[slot] = static_cast<int32_t>(kernels_.list_kept(p_, to_list, t, pairs));
            });
      // 2c. The values of this stage, which the next one's bounds read.
      for (int64_t k = 0; k < count; ++k) {
        if (stage_of(k) != stage) continue;
        if (is_linear(p_, reductions_[k])) LinearSum<T>(p_, reductions_[k], x_, y_, d_).forward(row_sum.data() + k * n);
        write_values(reductions_[k], k, row_max, row_sum, winner, values, index ? index + k * n : nullptr);
      }
    }
    // 3. An entry that is not finite makes every value NaN.
    if (!is_finite) fill_nan(values, num_value_rows() * n);
  }

  // z (count,) of row rows[k] and reference cols[k].
  void similarities(int threads, int64_t count, const int64_t* rows, const int64_t* cols, T* z) const {
    parallel_chunks(count, threads, [&](int64_t first, int64_t last) {
      kernels_.pair_similarities(p_, x_, y_, d_, last - first, rows + first, cols + first, z + first);
    });
  }

  // Adds to the gradients, which start as zeros: dx (N, D), dy (M, D) (null: not wanted; never of a square problem),
  // and the arrays that the reductions point to. Reductions whose grad is null take no part.
  void backward(int threads, const T* values, T* dx, T* dy, const KeptLists<T>& kept) {
    const int64_t n = p_.n, lanes = grid_.lanes;
    const int64_t blocks = std::max(positive_tiles().count(), grid_.row_blocks());
    // 1. Gradients of each lane and of each row block, which are added in order at the end.
    std::vector<T> lane_dx(dx && lanes > 1 ? lanes * n * d_ : 0), norm_grad(p_.row_sq_norm ? lanes * n : 0);
    std::vector<T> ref_norm_grad(p_.row_sq_norm && dy ? p_.m : 0);
    std::vector<std::vector<T>> lane_offset(reductions_.size());
    std::vector<std::vector<double>> block_scale(reductions_.size());
    std::vector<std::vector<T>> bounds;
    bool columns_written = dy != nullptr;
    auto with_gradients = [&](bool over_positives) {
      std::vector<std::vector<Reduction<T>>> by_lane(lanes);
      for (size_t k = 0; k < reductions_.size(); ++k) {
        const Reduction<T>& g = reductions_[k];
        if (!g.grad || (g.op != LOGSUMEXP && g.op != SUM) || on_positive_tiles(g) != over_positives || is_linear(p_, g))
          continue;
        columns_written |= g.grad_ref_offset != nullptr;
        if (g.grad_offset) lane_offset[k].resize(lanes * n);
        if (g.grad_scale) block_scale[k].resize(lanes * blocks);
        Reduction<T> r = with_bounds(g, values, bounds);
        for (int64_t lane = 0; lane < lanes; ++lane) {
          if (g.grad_offset) r.grad_offset = lane_offset[k].data() + lane * n;
          if (g.grad_scale) r.grad_scale = block_scale[k].data() + lane * blocks;
          by_lane[lane].push_back(r);
        }
      }
      return by_lane;
    };
    const auto positives = with_gradients(true), all = with_gradients(false);
    auto dx_of = [&](int64_t lane) { return lanes > 1 && dx ? lane_dx.data() + lane * n * d_ : dx; };
    auto norm_grad_of = [&](int64_t lane) { return p_.row_sq_norm ? norm_grad.data() + lane * n : nullptr; };
    T* refs_norm_grad = ref_norm_grad.empty() ? nullptr : ref_norm_grad.data();
    // 2. A tile: its similarities again, its weights, and two products.
    auto backward_tile = [&](const std::vector<Reduction<T>>& reductions, const Tile<T>& t, int64_t block, int64_t lane,
                             T* w) {
      similarities(t, w);
      T* rows_norm_grad = norm_grad_of(lane);
      const BackwardResult result =
          kernels_.backward(p_, reductions.data(), static_cast<int>(reductions.size()), t, block, w, rows_norm_grad,
                            t.mirror ? rows_norm_grad : refs_norm_grad);
      T *row_grad = dx_of(lane), *col_grad = t.mirror && dx ? dx : dy;
      if (result.any_close) kernels_.scatter_close(t, x_, y_, d_, row_grad, col_grad);
      if (!result.any_weight) return;
      if (dx) add_product(w, t.ld, false, t.rows, y_ + t.c0 * d_, t.cols, row_grad + t.r0 * d_);
      if (col_grad) add_product(w, t.ld, true, t.cols, x_ + t.r0 * d_, t.rows, col_grad + t.c0 * d_);
    };
    // 3. The tiles. Of one whose kept pairs are listed, these pairs alone.
    if (!positives[0].empty())
      for_each_positive_block(threads, columns_written, [&](const Tile<T>& t, int64_t block, T* w) {
        backward_tile(positives[0], t, block, 0, w);
      });
    if (!all[0].empty())
      for_each_grid_tile(
          threads, all[0], columns_written, [&](int64_t slot) { return !kept.count || kept.count[slot] != 0; },
          [&](const Tile<T>& t, const TileIndex& tile, T* w) {
            const int64_t slot = grid_.slot(tile);
            if (!kept.count || kept.count[slot] < 0)
              return backward_tile(all[tile.lane], t, tile.row_block, tile.lane, w);
            T* row_grad = dx_of(tile.lane);
            for (const Reduction<T>& r : all[tile.lane])
              kernels_.scatter_kept(p_, r, t, kept.at(slot), kept.count[slot], tile.row_block, x_, y_, d_, row_grad,
                                    t.mirror ? row_grad : dy);
          });
    // 4. What needs no tiles, and the sums over lanes and blocks.
    for (size_t k = 0; k < reductions_.size(); ++k) {
      for (double part : block_scale[k]) *reductions_[k].grad_scale += part;
      for (size_t i = 0; i < lane_offset[k].size(); ++i) reductions_[k].grad_offset[i % n] += lane_offset[k][i];
      if (reductions_[k].grad && reductions_[k].index) extreme_gradient(reductions_[k], dx, dy);
      if (reductions_[k].grad && is_linear(p_, reductions_[k]))
        LinearSum<T>(p_, reductions_[k], x_, y_, d_).backward(dx, p_.square ? dx : dy);
    }
    for (size_t i = 0; i < lane_dx.size(); ++i) dx[i % (n * d_)] += lane_dx[i];
    if (dx) add_norm_grad(norm_grad, x_, n, dx);
    if (dy) add_norm_grad(ref_norm_grad, y_, p_.m, dy);
    // 5. An entry that is not finite makes every gradient NaN.
    if (finite()) return;
    fill_nan(dx, n * d_);
    fill_nan(dy, p_.m * d_);
    for (const Reduction<T>& r : reductions_) {
      fill_nan(r.grad_scale, 1);
      fill_nan(r.grad_offset, n);
      fill_nan(r.grad_ref_offset, p_.m);
    }
  }

 protected:
  static constexpr int64_t INLINE_WORK = int64_t{1} << 27;  // multiply-adds that are not worth waking threads for
  static constexpr int64_t DENSE_POSITIVES = 4;  // from 1 / 4 of all pairs on, positives go over the grid, too
  // A screened tile lists so many times as many kept pairs as one computed in full.
  static constexpr int64_t SCREENED_TO_LISTED = 16;

  bool on_positive_tiles(const Reduction<T>& r) const { return r.side == POSITIVES && !dense_positives_; }

  bool finite() const { return all_finite(x_, p_.n * d_) && (p_.square || all_finite(y_, p_.m * d_)); }
  bool weights_positives() const {
    for (const Reduction<T>& r : reductions_)
      if (r.side == POSITIVES && (r.op == LOGSUMEXP || r.op == SUM)) return true;
    return false;
  }
  // 0 for a reduction whose window needs no other's values, else one more than theirs.
  int stage_of(int64_t k) const {
    const Reduction<T>& r = reductions_[k];
    const int lower = r.lower_of < 0 ? 0 : 1 + stage_of(r.lower_of);
    const int upper = r.upper_of < 0 ? 0 : 1 + stage_of(r.upper_of);
    return std::max(lower, upper);
  }
  // The reduction with its window's bounds, computed from `values` (K, N). `bounds` owns them.
  Reduction<T> with_bounds(Reduction<T> r, const T* values, std::vector<std::vector<T>>& bounds) const {
    auto shifted = [&](int of, double shift) {
      std::vector<T> bound(values + of * p_.n, values + (of + 1) * p_.n);
      for (T& v : bound) v += static_cast<T>(shift);
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
  PositiveTiles<T> positive_tiles() const { return {p_, grid_.size, grid_.stride()}; }
  // Numbers of a thread's scratch: a tile, one more, and the packed columns that `similarities` reads.
  int64_t scratch_size() const { return 2 * grid_.area() + std::min(d_, K_BLOCK) * grid_.stride(); }

  // to (rows, D) += w from, or w^T from: w is (rows, inner), or (inner, rows) and read transposed.
  void add_product(const T* w, int64_t ld, bool transpose, int64_t rows, const T* from, int64_t inner, T* to) const {
    const Gemm<T> gemm = kernels_.fast_products ? nullptr : runtime().gemm<T>();
    if (gemm) {
      const int m = static_cast<int>(d_), n = static_cast<int>(rows), k = static_cast<int>(inner),
                stride = static_cast<int>(ld);
      const T one = 1;
      gemm("N", transpose ? "T" : "N", &m, &n, &k, &one, from, &m, w, &stride, &one, to, &m);
    } else {
      kernels_.add_product(w, ld, transpose, rows, from, inner, d_, to);
    }
  }

  // visit(tile, block, scratch)
  template <class Visit>
  void for_each_positive_block(int threads, bool columns_written, Visit&& visit) {
    const PositiveTiles<T> tiles = positive_tiles();
    // Blocks that follow each other share columns.
    if ((columns_written && !p_.square) || tiles.pairs() * d_ < INLINE_WORK) threads = 1;
    run_in_order(
        tiles.count(), tiles.count(), threads, [](int64_t k) { return std::make_pair(k, int64_t{-1}); },
        [&](int64_t k) {
          ScratchBuffer memory(scratch_size() * sizeof(T));
          T* z = static_cast<T*>(memory.get());
          tiles.visit(k, z, [&](const Tile<T>& t) { visit(t, k, z + grid_.area()); });
        });
  }

  // visit(tile, its index, scratch) for the tiles whose slot is wanted.
  template <class Wanted, class Visit>
  void for_each_grid_tile(int threads, const std::vector<Reduction<T>>& reductions, bool columns_written,
                          Wanted&& wanted, Visit&& visit) {
    bool positives_only = true;
    for (const Reduction<T>& r : reductions) positives_only &= r.side == POSITIVES;
    const int64_t rows = grid_.row_blocks() * grid_.lanes;
    run_in_order(
        grid_.count(), rows + grid_.col_blocks(), threads,
        [&](int64_t k) {
          TileIndex tile;
          if (!grid_.index(k, tile)) return std::make_pair(int64_t{-1}, int64_t{-1});
          const int64_t row = tile.lane * grid_.row_blocks() + tile.row_block;
          if (grid_.triangle())
            return std::make_pair(row, tile.row_block == tile.col_block ? int64_t{-1} : tile.col_block);
          const bool columns_touched = columns_written || p_.square;  // with two groups, columns are the other's rows
          return std::make_pair(row, columns_touched ? rows + tile.col_block : int64_t{-1});
        },
        [&](int64_t k) {
          TileIndex tile;
          if (!grid_.index(k, tile) || !wanted(grid_.slot(tile))) return;
          ScratchBuffer memory(scratch_size() * sizeof(T));
          T* z = static_cast<T*>(memory.get());
          const Tile<T> t = grid_.tile(tile, z);
          if (positives_only && (p_.pos_begin[t.r0] >= t.c0 + t.cols || p_.pos_end[t.r0 + t.rows - 1] <= t.c0)) return;
          visit(t, tile, z + grid_.area());
        });
  }

  // Merges the lanes' states in order and writes the values. As in row_state.h, equal extremes go to the lowest index
  // in the caller's order.
  void write_values(const Reduction<T>& r, int64_t k, const std::vector<T>& row_max, const std::vector<double>& row_sum,
                    const std::vector<int64_t>& winner, T* values, int64_t* index) const {
    const int64_t n = p_.n, count = static_cast<int64_t>(reductions_.size());
    T *top_z = values + top_z_row(k) * n, *log_sum = top_z + n;
    values += k * n;
    constexpr T infinite = std::numeric_limits<T>::infinity();
    for (int64_t i = 0; i < n; ++i) {
      T best = row_max[k * n + i];
      double sum = row_sum[k * n + i];
      int64_t column = winner.empty() ? -1 : winner[k * n + i];
      for (int64_t lane = 1; lane < grid_.lanes; ++lane) {
        const int64_t other = (lane * count + k) * n + i;
        const T other_max = row_max[other];
        if (r.op == SUM || r.op == COUNT) {
          sum += row_sum[other];
        } else if (r.op == LOGSUMEXP) {
          merge(r, best, sum, other_max, row_sum[other]);
        } else {
          const bool better = r.op == MAX ? other_max > best : other_max < best;
          const bool earlier =
              other_max == best && column >= 0 && winner[other] >= 0 && perm(winner[other]) < perm(column);
          if (!winner.empty() && (better || earlier)) column = winner[other];
          best = better ? other_max : best;
        }
      }
      if (r.op == LOGSUMEXP) {
        const bool some = best > -infinite;
        const double log = std::log(sum), steep = r.steepness();
        values[i] = some ? static_cast<T>(log + steep * best) : -infinite;
        top_z[i] = some ? r.direction() * best : T(0);
        log_sum[i] = some ? static_cast<T>(log) : infinite;
      } else {
        values[i] = r.op == SUM || r.op == COUNT ? static_cast<T>(sum) : best;
      }
      if (index) index[i] = column;
    }
  }
  int64_t perm(int64_t column) const { return p_.perm[column]; }

  // A min's or max's gradient goes to the one pair that attained it.
  void extreme_gradient(const Reduction<T>& r, T* dx, T* dy) const {
    T* col_grad = p_.square ? dx : dy;
    for (int64_t i = 0; i < p_.n; ++i) {
      const int64_t j = r.index[i];
      if (j < 0) continue;
      const T *x = x_ + i * d_, *y = y_ + j * d_;
      T w = r.grad[i];
      if (p_.row_sq_norm) w = r.value[i] == T(0) ? T(0) : p_.squared ? 2 * w : w / r.value[i];
      for (int64_t k = 0; k < d_; ++k) {
        if (dx) dx[i * d_ + k] += w * (p_.row_sq_norm ? x[k] - y[k] : y[k]);
        if (col_grad) col_grad[j * d_ + k] += w * (p_.row_sq_norm ? y[k] - x[k] : x[k]);
      }
    }
  }
  // Euclidean distances: adds what all pairs of a row give along the row itself (euclidean.h).
  void add_norm_grad(const std::vector<T>& norm_grad, const T* x, int64_t rows, T* to) const {
    for (size_t i = 0; i < norm_grad.size(); ++i)
      for (int64_t k = 0; k < d_; ++k) to[i % rows * d_ + k] += norm_grad[i] * x[i % rows * d_ + k];
  }

  Kernels<T> kernels_;
  Problem<T> p_;
  const T *x_, *y_;
  int64_t d_;
  Grid grid_;
  bool dense_positives_;
  std::vector<Reduction<T>> reductions_;
};

}  // namespace flashpair
