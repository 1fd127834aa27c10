// Backward: the weight of each pair of a tile, w_ij = dL/dS_ij = sum over reductions of dL/dr * phi'(t) [* softmax].
//
// Reads the similarities that the forward pass saw (same tile, same bits, so that no window or hinge flips in between)
// and the rows' values. Writes one tile of weights, which the caller multiplies by the embeddings. Of a symmetric tile
// the weights of both directions are added, so that one product serves both.
// Never stored: masks, windows, exponentials. Deterministic: as reduce.h.
#pragma once
#include "cpu/transform/histogram.h"
#include "euclidean.h"

namespace flashpair {
namespace {

// What one reduction's backward reads of the anchors that are a tile's rows, or its columns: their windows, offsets,
// dL/dr (0 where the set was empty), and of a logsumexp the directed top_z and the log_sum.
template <class T>
struct Anchors {
  ColumnWindows<T> windows;
  Columns<T> offset, grad, top_z, log_sum;
  void fill(const Reduction<T>& r, const Tile<T>& block) {
    windows.fill(r, block);
    offset.fill(r.offset, r.shift, block);
    grad.fill(r.grad, T(0), block);
    if (r.op != LOGSUMEXP) return;
    top_z.fill(r.top_z, T(0), block), log_sum.fill(r.log_sum, T(0), block);
    for (int64_t k = 0; k < block.cols; ++k) {
      top_z.data[k] *= r.direction();
      if (log_sum.data[k] == INF<T>) grad.data[k] = log_sum.data[k] = T(0);
    }
  }
};

// The tile's rows in the place of columns, for `fill`.
template <class T>
Tile<T> rows_of(const Tile<T>& t) {
  return {t.z, t.ld, 0, 0, t.r0, t.rows, false, false};
}

// logsumexp: the weight is g_i e^(s - r_i) + g_j e^(s - r_j), for s = scale * z and the anchors' values r. Where the
// tile's values lie close enough around one number h, it is one exponential, e^(s - h), times
// (g_i e^(h - r_i) + g_j e^(h - r_j)), and nothing overflows. Then s and r are relative to one anchor's top_z; else
// each exponential is relative to its own anchor's.
template <class T, bool LOWER, bool UPPER, bool SYMMETRIC>
void backward_logsumexp(const Problem<T>& p, const Reduction<T>& r, const Tile<T>& t, int64_t block, T* w) {
  using V = Vec<T>;
  const T direction = r.direction(), steep = r.steepness();
  Anchors<T> rows, cols;
  rows.fill(r, rows_of(t));
  if (SYMMETRIC) cols.fill(r, t);
  // 1. The range of the values, relative to some anchor's top_z, and whether one exponential serves both ends.
  T base = T(0);
  ExponentRange<T> range;
  auto for_each_anchor = [&](auto&& f) {
    for (int64_t k = 0; k < t.rows; ++k)
      if (rows.grad.data[k] != T(0)) f(rows.top_z.data[k], rows.log_sum.data[k]);
    for (int64_t k = 0; SYMMETRIC && k < t.cols; ++k)
      if (cols.grad.data[k] != T(0)) f(cols.top_z.data[k], cols.log_sum.data[k]);
  };
  for_each_anchor([&](T top_z, T) { base = top_z; });
  for_each_anchor(
      [&](T top_z, T log_sum) { range.widen((top_z - base) * steep + log_sum, magnitude(top_z * steep + log_sum)); });
  if (!(range.high >= range.low)) range.high = range.low = T(0);        // no anchor has a gradient
  const bool shared = SYMMETRIC && range.one_exponential_serves(T(1));  // its values are exponents already
  const T middle = range.low + (range.high - range.low) / 2;
  // 2. Where it does: gradients times e^(middle - value).
  auto scale_to_middle = [&](Anchors<T>& a, int64_t size) {
    for (int64_t k = 0; k < size; k += WIDTH<T>) {
      const V value = (a.top_z.at(k) - base) * steep + a.log_sum.at(k);
      store<T>(a.grad.data + k, a.grad.at(k) == T(0) ? V{} : a.grad.at(k) * exp(middle - value));
    }
  };
  if (shared) {
    scale_to_middle(rows, t.rows);
    if (SYMMETRIC) scale_to_middle(cols, t.cols);
  }
  // 3. The weights.
  V dscale{};
  for (int64_t i = 0; i < t.rows; ++i) {
    V dscale_i{};
    const V low_i = splat(rows.windows.lower.data[i]), up_i = splat(rows.windows.upper.data[i]);
    const V grad_i = splat(rows.grad.data[i]);
    const V top_i = splat(shared ? base : rows.top_z.data[i]), log_i = splat(shared ? middle : rows.log_sum.data[i]);
    if (!SYMMETRIC && rows.grad.data[i] == T(0)) continue;
    const T* z = t.z + i * t.ld;
    T* wi = w + i * t.ld;
    sweep(p, r.side, t, i, [&](int64_t v, auto m) ALWAYS {
      const V zv = load(z + v), s = zv * direction, e = exp((s - top_i) * steep - log_i);
      V sum = select<T>(in_window<T, LOWER, UPPER>(zv, low_i, up_i, m), e * grad_i, V{});
      V counted = sum;  // what grad_scale is to count here: both directions, or only the rows'
      if constexpr (SYMMETRIC) {
        const auto in = in_window<T, LOWER, UPPER>(zv, cols.windows.lower.at(v), cols.windows.upper.at(v), m);
        const V e_j = shared ? e : exp((s - cols.top_z.at(v)) * steep - cols.log_sum.at(v));
        sum += select<T>(in, e_j * cols.grad.at(v), V{});
        if (t.mirror) counted = sum;
      }
      dscale_i += select<T>(counted != T(0), counted * zv, V{});  // z past the tile's columns may be anything
      store<T>(wi + v, load(wi + v) + sum * r.scale);
    });
    dscale += dscale_i;
  }
  if (r.grad_scale) r.grad_scale[block] += hsum<T>(dscale);
}

// sum: the weight is g_i phi'(s; offset_i, ref_offset_j), and of a symmetric tile the same with i and j exchanged.
template <class T, bool LOWER, bool UPPER, bool SYMMETRIC, class Phi>
void backward_sum(const Problem<T>& p, const Reduction<T>& r, const Tile<T>& t, int64_t block, T* w,
                  const Phi& transform) {
  using V = Vec<T>;
  // Columns are anchors, and rows have a reference's offset, in square problems only.
  Anchors<T> rows, cols;
  Columns<T> row_ref_offset, col_ref_offset, doffset, dref_offset;
  rows.fill(r, rows_of(t));
  col_ref_offset.fill(r.ref_offset, T(0), t);
  if constexpr (SYMMETRIC) {
    cols.fill(r, t);
    row_ref_offset.fill(r.ref_offset, T(0), rows_of(t));
  }
  doffset.fill(T(0), t);
  dref_offset.fill(T(0), t);
  V dscale{};
  for (int64_t i = 0; i < t.rows; ++i) {
    const V low_i = splat(rows.windows.lower.data[i]), up_i = splat(rows.windows.upper.data[i]),
            grad_i = splat(rows.grad.data[i]);
    const V offset_i = splat(rows.offset.data[i]), ref_offset_i = splat(SYMMETRIC ? row_ref_offset.data[i] : T(0));
    const T* z = t.z + i * t.ld;
    T* wi = w + i * t.ld;
    V doffset_i{}, dref_offset_i{}, dscale_i{};
    sweep(p, r.side, t, i, [&](int64_t v, auto m) ALWAYS {
      const V zv = load(z + v), s = zv * r.scale;
      V d_offset, d_ref_offset;
      // The rows' anchors.
      const auto in_i = in_window<T, LOWER, UPPER>(zv, low_i, up_i, m);
      const V slope_i = transform.template slope<T>(s, offset_i, col_ref_offset.at(v), d_offset, d_ref_offset);
      V sum = select<T>(in_i, slope_i * grad_i, V{}), counted = sum;
      doffset_i += select<T>(in_i, d_offset, V{});
      if (t.mirror || !t.symmetric)
        store<T>(dref_offset.data + v, dref_offset.at(v) + select<T>(in_i, d_ref_offset * grad_i, V{}));
      // The columns' anchors.
      if constexpr (SYMMETRIC) {
        const auto in_j = in_window<T, LOWER, UPPER>(zv, cols.windows.lower.at(v), cols.windows.upper.at(v), m);
        const V grad_j = cols.grad.at(v);
        const V slope_j = transform.template slope<T>(s, cols.offset.at(v), ref_offset_i, d_offset, d_ref_offset);
        sum += select<T>(in_j, slope_j * grad_j, V{});
        dref_offset_i += select<T>(in_j, d_ref_offset * grad_j, V{});
        if (t.mirror) {
          counted = sum;
          store<T>(doffset.data + v, doffset.at(v) + select<T>(in_j, d_offset, V{}));
        }
      }
      dscale_i += select<T>(counted != T(0), counted * zv, V{});  // z past the tile's columns may be anything
      store<T>(wi + v, load(wi + v) + sum * r.scale);
    });
    dscale += dscale_i;
    if (r.grad_offset) r.grad_offset[t.r0 + i] += rows.grad.data[i] * hsum<T>(doffset_i);
    if (r.grad_ref_offset && t.symmetric) r.grad_ref_offset[t.r0 + i] += hsum<T>(dref_offset_i);
    if (r.grad_ref_offset && (t.mirror || !t.symmetric) && flush_due(i, t.rows))
      dref_offset.flush_to(r.grad_ref_offset + t.c0, t.cols);
  }
  if (r.grad_scale) r.grad_scale[block] += hsum<T>(dscale);
  if (r.grad_offset && t.mirror)
    for (int64_t j = 0; j < t.cols; ++j) r.grad_offset[t.c0 + j] += cols.grad.data[j] * doffset.data[j];
}

// logsumexp of a transform: the weight of phi, times phi's slope.
template <class T, class Phi>
void backward_transformed(const Problem<T>& p, const Reduction<T>& r, const Tile<T>& t, int64_t block, T* w,
                          const Phi& phi) {
  using V = Vec<T>;
  alignas(64) T phi_weights[TRANSFORMED_ROWS * MAX_TILE];
  const Reduction<T> plain = over_transformed(r);
  const V offset = splat(r.shift);
  for_each_transformed(r, t, phi, [&](const Tile<T>& transformed, int64_t first) {
    memset(phi_weights, 0, sizeof phi_weights);
    t.symmetric ? backward_logsumexp<T, false, false, true>(p, plain, transformed, block, phi_weights)
                : backward_logsumexp<T, false, false, false>(p, plain, transformed, block, phi_weights);
    for (int64_t i = 0; i < transformed.rows; ++i)
      for (int64_t v = 0; v < t.cols; v += WIDTH<T>) {
        const int64_t at = (first + i) * t.ld + v;
        V d_offset, d_ref_offset;
        const V slope = phi.template slope<T>(load(t.z + at) * r.scale, offset, V{}, d_offset, d_ref_offset);
        const V g = load(phi_weights + i * MAX_TILE + v);
        store<T>(w + at, load(w + at) + (g != T(0) ? g * slope * r.scale : V{}));
      }
  });
}

template <class T>
void backward_reduction(const Problem<T>& p, const Reduction<T>& r, const Tile<T>& t, int64_t block, T* w) {
  if (r.op == LOGSUMEXP && r.transform != IDENTITY)
    return with_transform(r, [&](auto phi) { backward_transformed(p, r, t, block, w, phi); });
  specialize(r, t.symmetric, [&](auto lower, auto upper, auto symmetric) {
    constexpr bool LOWER = decltype(lower)::value, UPPER = decltype(upper)::value;
    constexpr bool SYMMETRIC = decltype(symmetric)::value;
    if (r.op == LOGSUMEXP) return backward_logsumexp<T, LOWER, UPPER, SYMMETRIC>(p, r, t, block, w);
    with_transform(r, [&](auto phi) { backward_sum<T, LOWER, UPPER, SYMMETRIC>(p, r, t, block, w, phi); });
  });
}

// The weights of all reductions, and the way through the distance.
template <class T>
BackwardResult backward(const Problem<T>& p, const Reduction<T>* reductions, int count, const Tile<T>& t, int64_t block,
                        T* w, T* row_norm_grad, T* ref_norm_grad) {
  using V = Vec<T>;
  const int64_t padded = (t.cols + WIDTH<T> - 1) / WIDTH<T> * WIDTH<T>;
  for (int64_t i = 0; i < t.rows; ++i) memset(w + i * t.ld, 0, padded * sizeof(T));
  for (int k = 0; k < count;) {
    const int nodes = histogram_nodes(reductions + k, count - k);
    if (nodes)
      backward_histogram(p, reductions + k, nodes, t, w);
    else
      backward_reduction(p, reductions[k], t, block, w);
    k += nodes ? nodes : 1;
  }
  const bool any_close = p.row_sq_norm && backward_euclidean(p, t, w, row_norm_grad, ref_norm_grad);
  Mask<T> nonzero{};
  for (int64_t i = 0; i < t.rows && !any<T>(nonzero); ++i)
    for (int64_t v = 0; v < padded; v += WIDTH<T>) nonzero |= load(w + i * t.ld + v) != V{};
  return {any<T>(nonzero), any_close};
}

}  // namespace
}  // namespace flashpair
