// Similarities of a tile, and the backward pass through Euclidean distances or their squares.
//
// D^2 = |x|^2 + |y|^2 - 2 x.y costs one product, but it loses the digits by which |x|^2 + |y|^2 exceeds D^2. Where D^2
// is under the share CLOSE of |x|^2 + |y|^2, the pair is close and D^2 is computed again as the sum of (x - y)^2, which
// loses none. So equal rows have distance 0, and unequal rows have not.
//
// The gradient of a pair is u (x - y) along x and the opposite along y. Of most pairs it is split: the products u y_j
// are a matrix product, and the sum of u along a row's own x is one number a row, the norm gradient. Of close pairs it
// is added as u (x - y), for the same reason as above.
// Deterministic: z depends on the two rows alone (products.h).
#pragma once
#include "products.h"
#include "sweep.h"

namespace flashpair {
namespace {

// The share of |x|^2 + |y|^2 under which a pair is close: for D^2, and for the gradient, which loses the square root of
// what D^2 loses.
template <class T>
constexpr T CLOSE = T(1) / 16;
template <class T>
constexpr T CLOSE_GRADIENT = T(1) / 256;

INLINE float root(float x) { return __builtin_sqrtf(x); }
INLINE double root(double x) { return __builtin_sqrt(x); }

template <class T>
INLINE bool is_close(T d2, T sq_norms) {
  return !(d2 > CLOSE<T> * sq_norms);  // true, too, where the squared norms overflow
}

// z of pairs given by row and reference, the same bits as in a tile.
template <class T>
void pair_similarities(const Problem<T>& p, const T* x, const T* y, int64_t d, int64_t count, const int64_t* rows,
                       const int64_t* cols, T* z) {
  constexpr int64_t CHUNK = 256;
  int64_t close_rows[CHUNK], close_cols[CHUNK], close_places[CHUNK];
  T close_d2[CHUNK];
  for (int64_t first = 0; first < count; first += CHUNK) {
    const int64_t size = clamp(count - first, 0, CHUNK), *r = rows + first, *c = cols + first;
    pair_sums<T, false>(x, y, d, size, r, c, z + first);
    if (!p.row_sq_norm) continue;
    int64_t close = 0;
    for (int64_t k = 0; k < size; ++k) {
      const T sq_norms = p.row_sq_norm[r[k]] + p.ref_sq_norm[c[k]], d2 = sq_norms - 2 * z[first + k];
      if (is_close(d2, sq_norms))
        close_rows[close] = r[k], close_cols[close] = c[k], close_places[close++] = first + k;
      else
        z[first + k] = p.squared ? d2 : root(d2);
    }
    pair_sums<T, true>(x, y, d, close, close_rows, close_cols, close_d2);
    for (int64_t k = 0; k < close; ++k) z[close_places[k]] = p.squared ? close_d2[k] : root(close_d2[k]);
  }
}

// Computes the tile's z by differences where it is marked with -1. scratch: as large as the tile.
template <class T>
void close_distances(const Problem<T>& p, const Tile<T>& t, const T* x, const T* y, int64_t d, int64_t close,
                     T* scratch, T* panel) {
  // With more than one close pair in so many, the whole tile by differences costs less than the close pairs one by one.
  constexpr int64_t SPARSE = 16;
  if (close * SPARSE > t.rows * t.cols) {
    tile_sums<T, true>(x + t.r0 * d, t.rows, y + t.c0 * d, t.cols, d, scratch, t.ld, panel);
    for (int64_t i = 0; i < t.rows; ++i) {
      T *z = t.z + i * t.ld, *d2 = scratch + i * t.ld;
      for (int64_t j = 0; j < t.cols; ++j) z[j] = z[j] >= T(0) ? z[j] : p.squared ? d2[j] : root(d2[j]);
    }
    return;
  }
  int64_t rows[MAX_TILE], cols[MAX_TILE];
  T d2[MAX_TILE];
  for (int64_t i = 0; i < t.rows; ++i) {
    T* z = t.z + i * t.ld;
    int64_t count = 0;
    for (int64_t j = 0; j < t.cols; ++j)
      if (!(z[j] >= T(0))) rows[count] = t.r0 + i, cols[count++] = t.c0 + j;
    pair_sums<T, true>(x, y, d, count, rows, cols, d2);
    for (int64_t k = 0; k < count; ++k) z[cols[k] - t.c0] = p.squared ? d2[k] : root(d2[k]);
  }
}

// Turns a row's products into distances and marks close pairs with -1. Returns how many are close.
template <class T, bool SQUARED>
INLINE int64_t distances_from_products(T* z, T row_sq_norm, const T* ref_sq_norm, int64_t cols) {
  int64_t close = 0;
  for (int64_t j = 0; j < cols; ++j) {
    const T sq_norms = row_sq_norm + ref_sq_norm[j], d2 = sq_norms - 2 * z[j];
    const bool again = is_close(d2, sq_norms);
    z[j] = again ? T(-1) : SQUARED ? d2 : root(d2);
    close += again;
  }
  return close;
}

// The tile's z. scratch: as large as the tile; panel: see tile_sums.
template <class T>
void similarities(const Problem<T>& p, const Tile<T>& t, const T* x, const T* y, int64_t d, T* scratch, T* panel) {
  tile_sums<T, false>(x + t.r0 * d, t.rows, y + t.c0 * d, t.cols, d, t.z, t.ld, panel);
  if (!p.row_sq_norm) return;
  int64_t close = 0;
  for (int64_t i = 0; i < t.rows; ++i) {
    T* z = t.z + i * t.ld;
    const T row_sq_norm = p.row_sq_norm[t.r0 + i];
    const T* ref_sq_norm = p.ref_sq_norm + t.c0;
    close += p.squared ? distances_from_products<T, true>(z, row_sq_norm, ref_sq_norm, t.cols)
                       : distances_from_products<T, false>(z, row_sq_norm, ref_sq_norm, t.cols);
    // A sample's distance to itself is 0 and needs no second computation.
    const int64_t self = p.square ? t.r0 + i - t.c0 : -1;
    if (self >= 0 && self < t.cols && !(z[self] >= T(0))) z[self] = T(0), --close;
  }
  if (close) close_distances(p, t, x, y, d, close, scratch, panel);
}

// u of a pair at z with dL/dz = w: its gradient is u (x - y), and -u is dL/dS.
template <class T>
INLINE T norm_grad_of(const Problem<T>& p, T z, T w) {
  if (z == T(0) || w == T(0)) return T(0);
  return p.squared ? 2 * w : w / z;
}

// In: w = dL/dz, 0 past the tile's columns. Out: w = dL/dS, and the norm gradients of rows and references. Where any
// pair with a weight is close, returns true: then w is 0 at such pairs and z holds their u, and z is 0 elsewhere.
template <class T>
bool backward_euclidean(const Problem<T>& p, const Tile<T>& t, T* w, T* row_norm_grad, T* ref_norm_grad) {
  using V = Vec<T>;
  Columns<T> ref_sums, ref_sq_norms;
  ref_sums.fill(T(0), t);
  ref_sq_norms.fill(p.ref_sq_norm, T(0), t);
  Mask<T> any_close{};
  for (int64_t i = 0; i < t.rows; ++i) {
    T* z = t.z + i * t.ld;
    T* wi = w + i * t.ld;
    const V row_sq_norm = splat(p.row_sq_norm[t.r0 + i]);
    V row_sum{};
    for (int64_t v = 0; v < t.cols; v += WIDTH<T>) {
      const V zv = load(z + v), wv = load(wi + v);
      const Mask<T> none = (zv == T(0)) | (wv == T(0));
      const V u = none ? V{} : p.squared ? T(2) * wv : wv / zv;
      const Mask<T> far = (p.squared ? zv : zv * zv) > CLOSE_GRADIENT<T> * (row_sq_norm + ref_sq_norms.at(v));
      const V far_u = far ? u : V{};
      const V close_u = far ? V{} : u;
      store<T>(z + v, close_u);
      any_close |= close_u != V{};
      store<T>(wi + v, -far_u);
      row_sum += far_u;
      store<T>(ref_sums.data + v, ref_sums.at(v) + far_u);
    }
    if (row_norm_grad) row_norm_grad[t.r0 + i] += hsum<T>(row_sum);
    if (ref_norm_grad && flush_due(i, t.rows)) ref_sums.flush_to(ref_norm_grad + t.c0, t.cols);
  }
  return any<T>(any_close);
}

// Adds the gradients of one pair at z with dL/dz = w to dx and dy (D,).
template <class T>
INLINE void add_pair(const Problem<T>& p, T z, T w, const T* x, const T* y, int64_t d, T* dx, T* dy) {
  if (!p.row_sq_norm) {
    if (dx) add_scaled(dx, y, w, d);
    if (dy) add_scaled(dy, x, w, d);
    return;
  }
  const T u = norm_grad_of(p, z, w);
  if (dx) add_difference(dx, x, y, u, d);
  if (dy) add_difference(dy, y, x, u, d);
}

// Adds the gradients of close pairs, whose u `backward_euclidean` has left in z.
template <class T>
void scatter_close(const Tile<T>& t, const T* x, const T* y, int64_t d, T* dx, T* dy) {
  for (int64_t i = 0; i < t.rows; ++i)
    for (int64_t j = 0; j < t.cols; ++j) {
      const T u = t.z[i * t.ld + j];
      if (u == T(0)) continue;
      const int64_t row = t.r0 + i, column = t.c0 + j;
      if (dx) add_difference(dx + row * d, x + row * d, y + column * d, u, d);
      if (dy) add_difference(dy + column * d, y + column * d, x + row * d, u, d);
    }
}

}  // namespace
}  // namespace flashpair
