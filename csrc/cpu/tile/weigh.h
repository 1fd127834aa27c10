// Backward: the weight of each pair of a tile, dL/dS_ij = sum over reductions of dL/dr * phi'(t) [* softmax].
//
// Reads the similarities that the forward pass saw (same tile, same bits, so no window or hinge flips in between) and
// the rows' values; writes one weight tile, which the caller multiplies by the embeddings. With a symmetric tile the
// weights of both directions are added, so that one product serves both.
#pragma once
#include "cpu/transform/histogram.h"
#include "euclidean.h"

namespace flashpair {
namespace {

// What one reduction needs of each anchor, as rows or as columns: dL/dr (0 where the set was empty), and a logsumexp's
// top, directed, and rest.
template <class T>
struct Anchors {
  Columns<T> lower, upper, own, grad, top, rest;
  void fill(const Reduction<T>& r, const Tile<T>& block) {
    lower.fill(r.lower, -INF<T>, block);
    upper.fill(r.upper, INF<T>, block);
    own.fill(r.offset, r.shift, block);
    grad.fill(r.grad, T(0), block);
    if (r.op != LOGSUMEXP) return;
    top.fill(r.top, T(0), block), rest.fill(r.rest, T(0), block);
    for (int64_t k = 0; k < block.cols; ++k) {
      top.data[k] *= r.direction();
      if (rest.data[k] == INF<T>) grad.data[k] = rest.data[k] = T(0);
    }
  }
};

template <class T>
Tile<T> rows_of(const Tile<T>& t) {
  return {t.z, t.ld, 0, 0, t.r0, t.rows, false, false};
}

// logsumexp: g_i e^(s - r_i) + g_j e^(s - r_j), as one exponential times (g_i e^(h - r_i) + g_j e^(h - r_j)) where the
// tile's values r lie close enough together around h that nothing overflows. s and r are taken relative to one anchor's
// top, and where r are too far apart each relative to its own.
template <class T, bool LOWER, bool UPPER, bool SYMMETRIC>
void weigh_logsumexp(const Problem<T>& p, const Reduction<T>& r, const Tile<T>& t, int64_t block, T* w) {
  using V = Vec<T>;
  const T direction = r.direction(), steep = r.steepness();
  Anchors<T> rows, cols;
  rows.fill(r, rows_of(t));
  if (SYMMETRIC) cols.fill(r, t);
  T base = T(0), high = -INF<T>, low = INF<T>, least = INF<T>;
  auto each_anchor = [&](auto&& f) {
    for (int64_t k = 0; k < t.rows; ++k)
      if (rows.grad.data[k] != T(0)) f(rows.top.data[k], rows.rest.data[k]);
    for (int64_t k = 0; SYMMETRIC && k < t.cols; ++k)
      if (cols.grad.data[k] != T(0)) f(cols.top.data[k], cols.rest.data[k]);
  };
  each_anchor([&](T top, T) { base = top; });
  each_anchor([&](T top, T rest) {
    const T value = (top - base) * steep + rest, size = magnitude(top * steep + rest);
    high = value > high ? value : high;
    low = value < low ? value : low;
    least = size < least ? size : least;
  });
  if (!(high >= low)) high = low = T(0);
  const bool shared = SYMMETRIC && one_serves(high - low, least);
  const T middle = low + (high - low) / 2;
  auto scale_to_middle = [&](Anchors<T>& a, int64_t size) {
    for (int64_t k = 0; k < size; k += WIDTH<T>) {
      const V value = (a.top.at(k) - base) * steep + a.rest.at(k);
      store<T>(a.grad.data + k, a.grad.at(k) == T(0) ? V{} : a.grad.at(k) * exp(middle - value));
    }
  };
  if (shared) {
    scale_to_middle(rows, t.rows);
    if (SYMMETRIC) scale_to_middle(cols, t.cols);
  }
  V dscale{};
  for (int64_t i = 0; i < t.rows; ++i) {
    V dscale_i{};
    const V low_i = splat(rows.lower.data[i]), up_i = splat(rows.upper.data[i]);
    const V grad_i = splat(rows.grad.data[i]);
    const V top_i = splat(shared ? base : rows.top.data[i]), rest_i = splat(shared ? middle : rows.rest.data[i]);
    if (!SYMMETRIC && rows.grad.data[i] == T(0)) continue;
    const T* z = t.z + i * t.ld;
    T* wi = w + i * t.ld;
    sweep(p, r.side, t, i, [&](int64_t v, auto m) ALWAYS {
      const V zv = load(z + v), s = zv * direction, e = exp((s - top_i) * steep - rest_i);
      V sum = select<T>(both<T>(inside<T, LOWER, UPPER>(zv, low_i, up_i), m), e * grad_i, V{});
      V own = sum;
      if constexpr (SYMMETRIC) {
        const auto in = inside<T, LOWER, UPPER>(zv, cols.lower.at(v), cols.upper.at(v));
        const V c = shared ? e : exp((s - cols.top.at(v)) * steep - cols.rest.at(v));
        sum += select<T>(both<T>(in, m), c * cols.grad.at(v), V{});
        if (t.mirror) own = sum;
      }
      dscale_i += select<T>(own != T(0), own * zv, V{});  // lanes past the end hold anything
      store<T>(wi + v, load(wi + v) + sum * r.scale);
    });
    dscale += dscale_i;
  }
  if (r.grad_scale) r.grad_scale[block] += hsum<T>(dscale);
}

template <class T, bool LOWER, bool UPPER, bool SYMMETRIC, class Phi>
void weigh_sum(const Problem<T>& p, const Reduction<T>& r, const Tile<T>& t, int64_t block, T* w,
               const Phi& transform) {
  using V = Vec<T>;
  Anchors<T> rows, cols;  // columns are anchors, and rows have a reference's offset, of a square problem only
  Columns<T> row_ref, col_ref, doffset, dref;
  rows.fill(r, rows_of(t));
  col_ref.fill(r.ref_offset, T(0), t);
  if constexpr (SYMMETRIC) {
    cols.fill(r, t);
    row_ref.fill(r.ref_offset, T(0), rows_of(t));
  }
  doffset.fill(nullptr, T(0), t);
  dref.fill(nullptr, T(0), t);
  V dscale{};
  for (int64_t i = 0; i < t.rows; ++i) {
    const V low_i = splat(rows.lower.data[i]), up_i = splat(rows.upper.data[i]), grad_i = splat(rows.grad.data[i]);
    const V own_i = splat(rows.own.data[i]), ref_i = splat(SYMMETRIC ? row_ref.data[i] : T(0));
    const T* z = t.z + i * t.ld;
    T* wi = w + i * t.ld;
    V doffset_i{}, dref_i{}, dscale_i{};
    sweep(p, r.side, t, i, [&](int64_t v, auto m) ALWAYS {
      const V zv = load(z + v), s = zv * r.scale;
      V own_slope, ref_slope;
      const auto in_i = both<T>(inside<T, LOWER, UPPER>(zv, low_i, up_i), m);
      const V slope = transform.template slope<T>(s, own_i, col_ref.at(v), own_slope, ref_slope);
      V sum = select<T>(in_i, slope * grad_i, V{}), own = sum;
      doffset_i += select<T>(in_i, own_slope, V{});
      if (t.mirror || !t.symmetric) store<T>(dref.data + v, dref.at(v) + select<T>(in_i, ref_slope * grad_i, V{}));
      if constexpr (SYMMETRIC) {
        const auto in_j = both<T>(inside<T, LOWER, UPPER>(zv, cols.lower.at(v), cols.upper.at(v)), m);
        const V grad_j = cols.grad.at(v);
        const V other = transform.template slope<T>(s, cols.own.at(v), ref_i, own_slope, ref_slope);
        sum += select<T>(in_j, other * grad_j, V{});
        dref_i += select<T>(in_j, ref_slope * grad_j, V{});
        if (t.mirror) {
          own = sum;
          store<T>(doffset.data + v, doffset.at(v) + select<T>(in_j, own_slope, V{}));
        }
      }
      dscale_i += select<T>(own != T(0), own * zv, V{});  // lanes past the end hold anything
      store<T>(wi + v, load(wi + v) + sum * r.scale);
    });
    dscale += dscale_i;
    if (r.grad_offset) r.grad_offset[t.r0 + i] += rows.grad.data[i] * hsum<T>(doffset_i);
    if (r.grad_ref_offset && t.symmetric) r.grad_ref_offset[t.r0 + i] += hsum<T>(dref_i);
    if (r.grad_ref_offset && (t.mirror || !t.symmetric) && drains(i, t.rows))
      dref.drain(r.grad_ref_offset + t.c0, t.cols);
  }
  if (r.grad_scale) r.grad_scale[block] += hsum<T>(dscale);
  if (r.grad_offset && t.mirror)
    for (int64_t j = 0; j < t.cols; ++j) r.grad_offset[t.c0 + j] += cols.grad.data[j] * doffset.data[j];
}

// logsumexp of a transform: the weight of phi, times phi's slope.
template <class T, class Phi>
void weigh_mapped(const Problem<T>& p, const Reduction<T>& r, const Tile<T>& t, int64_t block, T* w, const Phi& phi) {
  using V = Vec<T>;
  alignas(64) T part[MAPPED_ROWS * MAX_TILE];
  const Reduction<T> plain = of_mapped(r);
  const V own = splat(r.shift);
  each_mapped(r, t, phi, [&](const Tile<T>& mapped, int64_t first) {
    memset(part, 0, sizeof part);
    t.symmetric ? weigh_logsumexp<T, false, false, true>(p, plain, mapped, block, part)
                : weigh_logsumexp<T, false, false, false>(p, plain, mapped, block, part);
    for (int64_t i = 0; i < mapped.rows; ++i)
      for (int64_t v = 0; v < t.cols; v += WIDTH<T>) {
        const int64_t at = (first + i) * t.ld + v;
        V own_slope, ref_slope;
        const V slope = phi.template slope<T>(load(t.z + at) * r.scale, own, V{}, own_slope, ref_slope);
        const V g = load(part + i * MAX_TILE + v);
        store<T>(w + at, load(w + at) + (g != T(0) ? g * slope * r.scale : V{}));
      }
  });
}

template <class T>
void weigh_reduction(const Problem<T>& p, const Reduction<T>& r, const Tile<T>& t, int64_t block, T* w) {
  if (r.op == LOGSUMEXP && r.transform != IDENTITY)
    return with_transform(r, [&](auto phi) { weigh_mapped(p, r, t, block, w, phi); });
  specialize(r, t.symmetric, [&](auto low, auto up, auto sym) {
    constexpr bool A = decltype(low)::value, B = decltype(up)::value, S = decltype(sym)::value;
    if (r.op == LOGSUMEXP) return weigh_logsumexp<T, A, B, S>(p, r, t, block, w);
    with_transform(r, [&](auto phi) { weigh_sum<T, A, B, S>(p, r, t, block, w, phi); });
  });
}

template <class T>
Weights weigh(const Problem<T>& p, const Reduction<T>* reductions, int count, const Tile<T>& t, int64_t block, T* w,
              T* row_pull, T* ref_pull) {
  using V = Vec<T>;
  const int64_t padded = (t.cols + WIDTH<T> - 1) / WIDTH<T> * WIDTH<T>;
  for (int64_t i = 0; i < t.rows; ++i) memset(w + i * t.ld, 0, padded * sizeof(T));
  for (int k = 0; k < count;) {
    const int nodes = run_of_nodes(reductions + k, count - k);
    if (nodes)
      weigh_histogram(p, reductions + k, nodes, t, w);
    else
      weigh_reduction(p, reductions[k], t, block, w);
    k += nodes ? nodes : 1;
  }
  const bool near = p.row_square && pull(p, t, w, row_pull, ref_pull);
  Mask<T> live{};
  for (int64_t i = 0; i < t.rows && !any<T>(live); ++i)
    for (int64_t v = 0; v < padded; v += WIDTH<T>) live |= load(w + i * t.ld + v) != V{};
  return {any<T>(live), near};
}

}  // namespace
}  // namespace flashpair
