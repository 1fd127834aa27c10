// Pairs that a mining window lets through, kept from forward to backward when a tile holds few of them: then backward
// needs neither that tile's similarities again nor its gradient products, only 2 D multiply-adds a pair.
#pragma once
#include "cpu/tile/weigh.h"

namespace flashpair {
namespace {

template <class T>
int64_t list_live(const Problem<T>& p, const Reduction<T>& r, const Tile<T>& t, const Live<T>& live) {
  int64_t found = 0;
  specialize(r, t.symmetric, [&](auto low, auto up, auto sym) {
    constexpr bool A = decltype(low)::value, B = decltype(up)::value, S = decltype(sym)::value;
    using V = Vec<T>;
    Columns<T> lower, upper;
    if (S) {
      lower.fill(r.lower, -INF<T>, t);
      upper.fill(r.upper, INF<T>, t);
    }
    for (int64_t i = 0; i < t.rows && found >= 0; ++i) {
      const T* z = t.z + i * t.ld;
      const V low_i = splat(lower_of(r, t.r0 + i)), up_i = splat(upper_of(r, t.r0 + i));
      sweep(p, r.side, t, i, [&](int64_t v, auto m) ALWAYS {
        const V zv = load(z + v);
        V hit = select<T>(both<T>(inside<T, A, B>(zv, low_i, up_i), m), splat(T(1)), V{});
        if constexpr (S) {
          const auto in = inside<T, A, B>(zv, lower.at(v), upper.at(v));
          hit += select<T>(both<T>(in, m), splat(T(1)), V{});
        }
        const Mask<T> hits = hit > T(0);
        if (found < 0 || !any<T>(hits)) return;
        for (int64_t k = 0; k < WIDTH<T>; ++k) {
          if (!hits[k]) continue;
          if (found == live.capacity) {
            found = -1;
            return;
          }
          live.entry[found] = static_cast<int32_t>(i << 16 | (v + k));
          live.z[found++] = z[v + k];
        }
      });
    }
  });
  return found;
}

// What a reduction needs of the anchor of each of a vector's pairs: forward, and in backward.
template <class T>
struct EndLanes {
  Vec<T> lower, upper, own;
  EndLanes(const Reduction<T>& r, const int64_t* of, int64_t count) {
    lower = splat(-INF<T>), upper = splat(INF<T>), own = splat(r.shift);
    for (int64_t k = 0; k < count; ++k) {
      if (r.lower) lower[k] = r.lower[of[k]];
      if (r.upper) upper[k] = r.upper[of[k]];
      if (r.offset) own[k] = r.offset[of[k]];
    }
  }
  Mask<T> inside(Vec<T> z) const { return (z > lower) & (z < upper); }
};

template <class T>
struct AnchorLanes : EndLanes<T> {
  Vec<T> grad, top, rest;
  AnchorLanes(const Reduction<T>& r, const int64_t* of, int64_t count) : EndLanes<T>(r, of, count) {
    grad = top = rest = Vec<T>{};
    for (int64_t k = 0; k < count; ++k) {
      const int64_t row = of[k];
      if (r.op == LOGSUMEXP && r.rest[row] < INF<T>) top[k] = r.top[row], rest[k] = r.rest[row];
      grad[k] = r.op == LOGSUMEXP && r.rest[row] == INF<T> ? T(0) : r.grad[row];
    }
  }
  // dL/ds of these anchors' pairs, and what they give to the two offsets.
  template <class Phi>
  Vec<T> weight(const Reduction<T>& r, const Phi& phi, Vec<T> z, Vec<T> ref, Vec<T>& to_own, Vec<T>& to_ref) const {
    const Mask<T> in = this->inside(z) & (grad != T(0));
    if (r.op == LOGSUMEXP) return select<T>(in, exp((z - top) * r.scale - rest) * grad, Vec<T>{});
    const Vec<T> s = z * r.scale;
    const Vec<T> slope = phi.template slope<T>(s, this->own, ref, to_own, to_ref);
    to_own = select<T>(in, to_own * grad, Vec<T>{}), to_ref = select<T>(in, to_ref * grad, Vec<T>{});
    return select<T>(in, slope * grad, Vec<T>{});
  }
};

// Sums for a tile's rows, or columns: many equal terms added to a float one by one would err by as many roundings.
template <class T>
class TileSums {
 public:
  TileSums(T* to, int64_t first, int64_t count) : to_(to ? to + first : nullptr), count_(to ? count : 0) {
    memset(at_, 0, count_ * sizeof(double));
  }
  TileSums(const TileSums&) = delete;
  ~TileSums() {
    for (int64_t i = 0; i < count_; ++i) to_[i] += static_cast<T>(at_[i]);
  }
  void add(int64_t i, T term) {
    if (to_) at_[i] += term;
  }

 private:
  double at_[MAX_TILE];
  T* to_;
  int64_t count_;
};

template <class T, class Phi>
void scatter_with(const Problem<T>& p, const Reduction<T>& r, const Tile<T>& t, const Live<T>& live, int64_t total,
                  int64_t block, const T* x, const T* y, int64_t d, T* dx, T* dy, const Phi& phi) {
  using V = Vec<T>;
  if (total == 0) return;
  const bool to_columns = t.mirror || !t.symmetric;
  TileSums<T> own_rows(r.grad_offset, t.r0, t.rows), own_columns(t.mirror ? r.grad_offset : nullptr, t.c0, t.cols);
  TileSums<T> ref_rows(t.symmetric ? r.grad_ref_offset : nullptr, t.r0, t.rows);
  TileSums<T> ref_columns(to_columns ? r.grad_ref_offset : nullptr, t.c0, t.cols);
  V dscale{};
  for (int64_t first = 0; first < total; first += WIDTH<T>) {
    const int64_t count = total - first < WIDTH<T> ? total - first : WIDTH<T>;
    int64_t row[WIDTH<T>], column[WIDTH<T>];
    V z{}, row_ref{}, column_ref{};
    for (int64_t k = 0; k < count; ++k) {
      const int32_t entry = live.entry[first + k];
      row[k] = t.r0 + (entry >> 16), column[k] = t.c0 + (entry & 0xffff);
      z[k] = live.z[first + k];
      if (r.ref_offset) column_ref[k] = r.ref_offset[column[k]];
      if (r.ref_offset && t.symmetric) row_ref[k] = r.ref_offset[row[k]];
    }
    V g_own{}, g_ref{}, c_own{}, c_ref{}, c{};
    const V g = AnchorLanes<T>(r, row, count).weight(r, phi, z, column_ref, g_own, g_ref);
    if (t.symmetric) c = AnchorLanes<T>(r, column, count).weight(r, phi, z, row_ref, c_own, c_ref);
    dscale += (t.mirror ? g + c : g) * z;
    for (int64_t k = 0; k < count; ++k) {
      const int64_t i = row[k] - t.r0, j = column[k] - t.c0;
      own_rows.add(i, g_own[k]), own_columns.add(j, c_own[k]);
      ref_rows.add(i, c_ref[k]), ref_columns.add(j, g_ref[k]);
      const T w = (g[k] + c[k]) * r.scale;
      if (w != T(0))
        add_pair(p, static_cast<T>(z[k]), w, x + row[k] * d, y + column[k] * d, d, dx ? dx + row[k] * d : nullptr,
                 dy ? dy + column[k] * d : nullptr);
    }
  }
  if (r.grad_scale) r.grad_scale[block] += hsum<T>(dscale);
}

template <class T>
void scatter(const Problem<T>& p, const Reduction<T>& r, const Tile<T>& t, const Live<T>& live, int64_t total,
             int64_t block, const T* x, const T* y, int64_t d, T* dx, T* dy) {
  with_transform(r, [&](auto phi) { scatter_with(p, r, t, live, total, block, x, y, d, dx, dy, phi); });
}

}  // namespace
}  // namespace flashpair
