// Pairs that a mining window lets through, kept from forward to backward where a tile holds few of them.
//
// Backward over kept pairs needs neither that tile's similarities again nor its matrix products, only 2 D multiply-adds
// a pair. Deterministic: pairs are listed and added in the order of their rows.
#pragma once
#include "cpu/tile/backward.h"

namespace flashpair {
namespace {

template <class T>
int64_t list_kept(const Problem<T>& p, const Reduction<T>& r, const Tile<T>& t, const KeptPairs<T>& kept) {
  int64_t count = 0;
  specialize(r, t.symmetric, [&](auto use_lower, auto use_upper, auto symmetric) {
    constexpr bool LOWER = decltype(use_lower)::value, UPPER = decltype(use_upper)::value;
    constexpr bool SYMMETRIC = decltype(symmetric)::value;
    using V = Vec<T>;
    ColumnWindows<T> windows;
    if (SYMMETRIC) windows.fill(r, t);
    for (int64_t i = 0; i < t.rows && count >= 0; ++i) {
      const T* z = t.z + i * t.ld;
      const V low_i = splat(row_lower(r, t.r0 + i)), up_i = splat(row_upper(r, t.r0 + i));
      sweep(p, r.side, t, i, [&](int64_t v, auto m) ALWAYS {
        const V zv = load(z + v);
        V ends = select<T>(in_window<T, LOWER, UPPER>(zv, low_i, up_i, m), splat(T(1)), V{});
        if constexpr (SYMMETRIC) {
          const auto in = in_window<T, LOWER, UPPER>(zv, windows.lower.at(v), windows.upper.at(v), m);
          ends += select<T>(in, splat(T(1)), V{});
        }
        const Mask<T> hits = ends > T(0);
        if (count < 0 || !any<T>(hits)) return;
        for (int64_t k = 0; k < WIDTH<T>; ++k) {
          if (!hits[k]) continue;
          if (count == kept.capacity) {
            count = -1;
            return;
          }
          kept.entry[count] = pack_entry(i, v + k);
          kept.z[count++] = z[v + k];
        }
      });
    }
  });
  return count;
}

// What forward reads of the anchor of each of a vector's pairs: its window and its offset.
template <class T>
struct AnchorWindows {
  Vec<T> lower, upper, offset;
  AnchorWindows(const Reduction<T>& r, const int64_t* anchor, int64_t count) {
    lower = splat(-INF<T>), upper = splat(INF<T>), offset = splat(r.shift);
    for (int64_t k = 0; k < count; ++k) {
      if (r.lower) lower[k] = r.lower[anchor[k]];
      if (r.upper) upper[k] = r.upper[anchor[k]];
      if (r.offset) offset[k] = r.offset[anchor[k]];
    }
  }
  Mask<T> contains(Vec<T> z) const { return (z > lower) & (z < upper); }
};

// What backward reads, too.
template <class T>
struct AnchorTerms : AnchorWindows<T> {
  Vec<T> grad, top_z, log_sum;
  AnchorTerms(const Reduction<T>& r, const int64_t* anchor, int64_t count) : AnchorWindows<T>(r, anchor, count) {
    grad = top_z = log_sum = Vec<T>{};
    for (int64_t k = 0; k < count; ++k) {
      const int64_t row = anchor[k];
      if (r.op == LOGSUMEXP && r.log_sum[row] < INF<T>) top_z[k] = r.top_z[row], log_sum[k] = r.log_sum[row];
      grad[k] = r.op == LOGSUMEXP && r.log_sum[row] == INF<T> ? T(0) : r.grad[row];
    }
  }
  // dL/ds of these anchors' pairs; and, of a sum, what the pairs give to the two offsets' gradients.
  template <class Phi>
  Vec<T> weight(const Reduction<T>& r, const Phi& phi, Vec<T> z, Vec<T> ref_offset, Vec<T>& to_offset,
                Vec<T>& to_ref_offset) const {
    const Mask<T> in = this->contains(z) & (grad != T(0));
    if (r.op == LOGSUMEXP) return select<T>(in, exp((z - top_z) * r.scale - log_sum) * grad, Vec<T>{});
    const Vec<T> s = z * r.scale;
    const Vec<T> slope = phi.template slope<T>(s, this->offset, ref_offset, to_offset, to_ref_offset);
    to_offset = select<T>(in, to_offset * grad, Vec<T>{}),
    to_ref_offset = select<T>(in, to_ref_offset * grad, Vec<T>{});
    return select<T>(in, slope * grad, Vec<T>{});
  }
};

// Sums for a tile's rows or columns, added to an array at the end. They are double: many equal terms added to a float
// one by one would err by as many roundings.
template <class T>
class TileSums {
 public:
  TileSums(T* to, int64_t first, int64_t count) : to_(to ? to + first : nullptr), count_(to ? count : 0) {
    memset(sum_, 0, count_ * sizeof(double));
  }
  TileSums(const TileSums&) = delete;
  ~TileSums() {
    for (int64_t i = 0; i < count_; ++i) to_[i] += static_cast<T>(sum_[i]);
  }
  void add(int64_t i, T term) {
    if (to_) sum_[i] += term;
  }

 private:
  double sum_[MAX_TILE];
  T* to_;
  int64_t count_;
};

template <class T, class Phi>
void scatter_kept_with(const Problem<T>& p, const Reduction<T>& r, const Tile<T>& t, const KeptPairs<T>& kept,
                       int64_t total, int64_t block, const T* x, const T* y, int64_t d, T* dx, T* dy, const Phi& phi) {
  using V = Vec<T>;
  if (total == 0) return;
  const bool to_columns = t.mirror || !t.symmetric;
  TileSums<T> row_offsets(r.grad_offset, t.r0, t.rows), col_offsets(t.mirror ? r.grad_offset : nullptr, t.c0, t.cols);
  TileSums<T> row_ref_offsets(t.symmetric ? r.grad_ref_offset : nullptr, t.r0, t.rows);
  TileSums<T> col_ref_offsets(to_columns ? r.grad_ref_offset : nullptr, t.c0, t.cols);
  V dscale{};
  for (int64_t first = 0; first < total; first += WIDTH<T>) {
    // 1. A vector of pairs.
    const int64_t count = total - first < WIDTH<T> ? total - first : WIDTH<T>;
    int64_t row[WIDTH<T>], column[WIDTH<T>];
    V z{}, row_ref_offset{}, col_ref_offset{};
    for (int64_t k = 0; k < count; ++k) {
      const int32_t entry = kept.entry[first + k];
      row[k] = t.r0 + entry_row(entry), column[k] = t.c0 + entry_column(entry);
      z[k] = kept.z[first + k];
      if (r.ref_offset) col_ref_offset[k] = r.ref_offset[column[k]];
      if (r.ref_offset && t.symmetric) row_ref_offset[k] = r.ref_offset[row[k]];
    }
    // 2. What the anchor at either end gives to each pair.
    V offset_i{}, ref_offset_i{}, offset_j{}, ref_offset_j{}, g_j{};
    const V g_i = AnchorTerms<T>(r, row, count).weight(r, phi, z, col_ref_offset, offset_i, ref_offset_i);
    if (t.symmetric) g_j = AnchorTerms<T>(r, column, count).weight(r, phi, z, row_ref_offset, offset_j, ref_offset_j);
    dscale += (t.mirror ? g_i + g_j : g_i) * z;
    // 3. The gradients.
    for (int64_t k = 0; k < count; ++k) {
      const int64_t i = row[k] - t.r0, j = column[k] - t.c0;
      row_offsets.add(i, offset_i[k]), col_offsets.add(j, offset_j[k]);
      row_ref_offsets.add(i, ref_offset_j[k]), col_ref_offsets.add(j, ref_offset_i[k]);
      const T w = (g_i[k] + g_j[k]) * r.scale;
      if (w != T(0))
        add_pair(p, static_cast<T>(z[k]), w, x + row[k] * d, y + column[k] * d, d, dx ? dx + row[k] * d : nullptr,
                 dy ? dy + column[k] * d : nullptr);
    }
  }
  if (r.grad_scale) r.grad_scale[block] += hsum<T>(dscale);
}

template <class T>
void scatter_kept(const Problem<T>& p, const Reduction<T>& r, const Tile<T>& t, const KeptPairs<T>& kept, int64_t total,
                  int64_t block, const T* x, const T* y, int64_t d, T* dx, T* dy) {
  with_transform(r, [&](auto phi) { scatter_kept_with(p, r, t, kept, total, block, x, y, d, dx, dy, phi); });
}

}  // namespace
}  // namespace flashpair
