// Similarities of a tile, and the way back through Euclidean distances or their squares.
//
// D^2 = |x|^2 + |y|^2 - 2 x.y costs a product, and loses the digits that |x|^2 + |y|^2 has more than D^2. Pairs whose
// D^2 is under NEAR of it are computed again as the sum of (x - y)^2, which loses nothing: so equal rows have distance
// 0, and others have not. What they give to the gradient, u (x - y) along both rows, goes there as it stands, where
// other pairs' u x_i are added up as a number a row and their u y_j by a product.
#pragma once
#include "products.h"
#include "sweep.h"

namespace flashpair {
namespace {

template <class T>
constexpr T NEAR = T(1) / 16;
// Of the gradient, whose terms lose the square root of it.
template <class T>
constexpr T NEAR_GRADIENT = T(1) / 256;

INLINE float root(float x) { return __builtin_sqrtf(x); }
INLINE double root(double x) { return __builtin_sqrt(x); }

template <class T>
INLINE bool is_near(T d2, T squares) {
  return !(d2 > NEAR<T> * squares);  // squares that overflow among them
}

// z of listed pairs, the same bits as in a tile.
template <class T>
void pair_similarities(const Problem<T>& p, const T* x, const T* y, int64_t d, int64_t count, const int64_t* rows,
                       const int64_t* cols, T* z) {
  constexpr int64_t AT_ONCE = 256;
  int64_t near_rows[AT_ONCE], near_cols[AT_ONCE], places[AT_ONCE];
  T apart[AT_ONCE];
  for (int64_t first = 0; first < count; first += AT_ONCE) {
    const int64_t some = clamp(count - first, 0, AT_ONCE), *r = rows + first, *c = cols + first;
    pair_sums<T, false>(x, y, d, some, r, c, z + first);
    if (!p.row_square) continue;
    int64_t near = 0;
    for (int64_t k = 0; k < some; ++k) {
      const T squares = p.row_square[r[k]] + p.ref_square[c[k]], d2 = squares - 2 * z[first + k];
      if (is_near(d2, squares))
        near_rows[near] = r[k], near_cols[near] = c[k], places[near++] = first + k;
      else
        z[first + k] = p.squared ? d2 : root(d2);
    }
    pair_sums<T, true>(x, y, d, near, near_rows, near_cols, apart);
    for (int64_t k = 0; k < near; ++k) z[places[k]] = p.squared ? apart[k] : root(apart[k]);
  }
}

// The tile's z where it is -1, by differences. scratch: as large as the tile.
template <class T>
void near_distances(const Problem<T>& p, const Tile<T>& t, const T* x, const T* y, int64_t d, int64_t near, T* scratch,
                    T* panel) {
  constexpr int64_t FEW = 16;  // one pair in so many: more cost as much one by one as all together
  if (near * FEW > t.rows * t.cols) {
    tile_sums<T, true>(x + t.r0 * d, t.rows, y + t.c0 * d, t.cols, d, scratch, t.ld, panel);
    for (int64_t i = 0; i < t.rows; ++i) {
      T *z = t.z + i * t.ld, *apart = scratch + i * t.ld;
      for (int64_t j = 0; j < t.cols; ++j) z[j] = z[j] >= T(0) ? z[j] : p.squared ? apart[j] : root(apart[j]);
    }
    return;
  }
  int64_t rows[MAX_TILE], cols[MAX_TILE];
  T apart[MAX_TILE];
  for (int64_t i = 0; i < t.rows; ++i) {
    T* z = t.z + i * t.ld;
    int64_t count = 0;
    for (int64_t j = 0; j < t.cols; ++j)
      if (!(z[j] >= T(0))) rows[count] = t.r0 + i, cols[count++] = t.c0 + j;
    pair_sums<T, true>(x, y, d, count, rows, cols, apart);
    for (int64_t k = 0; k < count; ++k) z[cols[k] - t.c0] = p.squared ? apart[k] : root(apart[k]);
  }
}

// A row's products made distances, -1 where these are to be computed again; how many are.
template <class T, bool SQUARED>
INLINE int64_t from_products(T* z, T own, const T* other, int64_t cols) {
  int64_t near = 0;
  for (int64_t j = 0; j < cols; ++j) {
    const T squares = own + other[j], d2 = squares - 2 * z[j];
    const bool again = is_near(d2, squares);
    z[j] = again ? T(-1) : SQUARED ? d2 : root(d2);
    near += again;
  }
  return near;
}

// scratch: as large as the tile; panel: see tile_sums.
template <class T>
void similarities(const Problem<T>& p, const Tile<T>& t, const T* x, const T* y, int64_t d, T* scratch, T* panel) {
  tile_sums<T, false>(x + t.r0 * d, t.rows, y + t.c0 * d, t.cols, d, t.z, t.ld, panel);
  if (!p.row_square) return;
  int64_t near = 0;
  for (int64_t i = 0; i < t.rows; ++i) {
    T* z = t.z + i * t.ld;
    const T own = p.row_square[t.r0 + i];
    const T* other = p.ref_square + t.c0;
    near += p.squared ? from_products<T, true>(z, own, other, t.cols) : from_products<T, false>(z, own, other, t.cols);
    const int64_t self = p.square ? t.r0 + i - t.c0 : -1;
    if (self >= 0 && self < t.cols && !(z[self] >= T(0))) z[self] = T(0), --near;
  }
  if (near) near_distances(p, t, x, y, d, near, scratch, panel);
}

// -dz/dS of a pair at z, which is also how much each of its rows is pulled along itself.
template <class T>
INLINE T pull_of(const Problem<T>& p, T z, T w) {
  if (z == T(0) || w == T(0)) return T(0);
  return p.squared ? 2 * w : w / z;
}

// In: w = dL/dz, 0 past the tile's columns. Out: w = dL/dS, and the pull of each pair on its own two rows; of near
// pairs w = 0, and their pull in z instead, which is 0 elsewhere, if any is: then true.
template <class T>
bool pull(const Problem<T>& p, const Tile<T>& t, T* w, T* row_pull, T* ref_pull) {
  using V = Vec<T>;
  Columns<T> refs, squares;
  refs.fill(nullptr, T(0), t);
  squares.fill(p.ref_square, T(0), t);
  Mask<T> found{};
  for (int64_t i = 0; i < t.rows; ++i) {
    T* z = t.z + i * t.ld;
    T* wi = w + i * t.ld;
    const V own = splat(p.row_square[t.r0 + i]);
    V total{};
    for (int64_t v = 0; v < t.cols; v += WIDTH<T>) {
      const V zv = load(z + v), wv = load(wi + v);
      const Mask<T> none = (zv == T(0)) | (wv == T(0));
      const V u = none ? V{} : p.squared ? T(2) * wv : wv / zv;
      const Mask<T> far = (p.squared ? zv : zv * zv) > NEAR_GRADIENT<T> * (own + squares.at(v));
      const V rest = far ? u : V{};
      const V near = far ? V{} : u;
      store<T>(z + v, near);
      found |= near != V{};
      store<T>(wi + v, -rest);
      total += rest;
      store<T>(refs.data + v, refs.at(v) + rest);
    }
    if (row_pull) row_pull[t.r0 + i] += hsum<T>(total);
    if (ref_pull && drains(i, t.rows)) refs.drain(ref_pull + t.c0, t.cols);
  }
  return any<T>(found);
}

// Adds what a pair at z with dL/dz = w gives to the gradients of its rows x and y (D,), null where not wanted.
template <class T>
INLINE void add_pair(const Problem<T>& p, T z, T w, const T* x, const T* y, int64_t d, T* dx, T* dy) {
  if (!p.row_square) {
    if (dx) add_scaled(dx, y, w, d);
    if (dy) add_scaled(dy, x, w, d);
    return;
  }
  const T u = pull_of(p, z, w);
  if (dx) add_difference(dx, x, y, u, d);
  if (dy) add_difference(dy, y, x, u, d);
}

// The gradients of near pairs, whose pull `pull` has left in z.
template <class T>
void scatter_near(const Tile<T>& t, const T* x, const T* y, int64_t d, T* dx, T* dy) {
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
