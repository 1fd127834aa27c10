// The matrix products of a tile: similarities in forward, and gradients from weights in backward.
//
// A sum along D is one chain of multiply-adds for each block of K_BLOCK coordinates, and the blocks' sums are added in
// order. Its bits depend on the two rows alone. So z_ij is the same in every tile, as z_ij and as z_ji, in forward and
// in backward, and for a pair by itself; and equal rows have equal similarities.
// Never stored: more than one packed panel of columns.
#pragma once
#include "cpu/types.h"
#include "simd.h"

namespace flashpair {
namespace {

#if defined(__AVX512F__)
constexpr int PANEL_ROWS = 14;
#else
constexpr int PANEL_ROWS = 6;
#endif
template <class T>
constexpr int64_t PANEL_COLUMNS = 2 * WIDTH<T>;

// One term of such a sum: a product, or (DIFFERENCES) the square of a difference.
template <bool DIFFERENCES, class V>
INLINE V accumulate(V a, V b, V sum) {
  if constexpr (DIFFERENCES) {
    const V difference = a - b;
    return fused(difference, difference, sum);
  } else {
    return fused(a, b, sum);
  }
}

// Packs coordinates [k0, k0 + depth) of y's rows into panels of PANEL_COLUMNS rows side by side. Rows past the end are
// zeros.
template <class T>
void pack_panels(const T* y, int64_t cols, int64_t d, int64_t k0, int64_t depth, T* panel) {
  constexpr int64_t C = PANEL_COLUMNS<T>;
  for (int64_t c = 0; c < cols; c += C, panel += depth * C)
    for (int64_t j = 0; j < C; ++j) {
      const T* from = y + (c + j) * d + k0;
      if (c + j < cols)
        for (int64_t k = 0; k < depth; ++k) panel[k * C + j] = from[k];
      else
        for (int64_t k = 0; k < depth; ++k) panel[k * C + j] = T(0);
    }
}

// z (ROWS, PANEL_COLUMNS) = the sums over one packed panel, or += them if `add`.
template <class T, bool DIFFERENCES, int ROWS>
__attribute__((noinline)) void panel_sums(const T* x, int64_t d, const T* panel, int64_t depth, T* z, int64_t ld,
                                          bool add) {
  constexpr int64_t L = WIDTH<T>;
  Vec<T> sum[ROWS][2];
  for (int r = 0; r < ROWS; ++r) sum[r][0] = sum[r][1] = Vec<T>{};
  for (int64_t k = 0; k < depth; ++k) {
    const Vec<T> left = load(panel + k * 2 * L), right = load(panel + k * 2 * L + L);
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r) {
      const Vec<T> row = splat(x[r * d + k]);
      sum[r][0] = accumulate<DIFFERENCES>(row, left, sum[r][0]);
      sum[r][1] = accumulate<DIFFERENCES>(row, right, sum[r][1]);
    }
  }
  for (int r = 0; r < ROWS; ++r)
    for (int v = 0; v < 2; ++v) {
      T* to = z + r * ld + v * L;
      store<T>(to, add ? load(to) + sum[r][v] : sum[r][v]);
    }
}

// Calls f with the number of rows, from 1 to ROWS, as a std::integral_constant.
template <int ROWS, class F>
INLINE void with_rows(int64_t rows, F&& f) {
  if constexpr (ROWS > 1) {
    if (rows < ROWS) return with_rows<ROWS - 1>(rows, f);
  }
  f(std::integral_constant<int, ROWS>{});
}

// z (rows, cols) at row stride ld = x y^T, or (DIFFERENCES) the squared distances. Rows of z are written up to the next
// multiple of PANEL_COLUMNS, so ld must be at least that. panel: scratch of min(d, K_BLOCK) rows of as many columns.
template <class T, bool DIFFERENCES>
void tile_sums(const T* x, int64_t rows, const T* y, int64_t cols, int64_t d, T* z, int64_t ld, T* panel) {
  constexpr int64_t C = PANEL_COLUMNS<T>;
  int64_t k0 = 0;
  do {
    const int64_t depth = d - k0 < K_BLOCK ? d - k0 : K_BLOCK;
    pack_panels(y, cols, d, k0, depth, panel);
    for (int64_t c = 0; c < cols; c += C)
      for (int64_t i = 0; i < rows; i += PANEL_ROWS)
        with_rows<PANEL_ROWS>(rows - i, [&](auto r) {
          panel_sums<T, DIFFERENCES, decltype(r)::value>(x + i * d + k0, d, panel + c * depth, depth, z + i * ld + c,
                                                         ld, k0 > 0);
        });
    k0 += K_BLOCK;
  } while (k0 < d);
}

// The same sums of single pairs: out[p] is of x's row rows[p] and y's row cols[p].
template <class T, bool DIFFERENCES>
void pair_sums(const T* x, const T* y, int64_t d, int64_t count, const int64_t* rows, const int64_t* cols, T* out) {
  constexpr int64_t CHAINS = 8;  // pairs at a time, because each chain of additions waits for its own last sum
  for (int64_t first = 0; first < count; first += CHAINS) {
    const T *a[CHAINS], *b[CHAINS];
    for (int64_t p = 0; p < CHAINS; ++p) {
      const int64_t at = first + p < count ? first + p : first;
      a[p] = x + rows[at] * d, b[p] = y + cols[at] * d;
    }
    T total[CHAINS] = {};
    for (int64_t k0 = 0; k0 < d; k0 += K_BLOCK) {
      const int64_t last = k0 + K_BLOCK < d ? k0 + K_BLOCK : d;
      T sum[CHAINS] = {};
      for (int64_t k = k0; k < last; ++k)
        for (int64_t p = 0; p < CHAINS; ++p) sum[p] = accumulate<DIFFERENCES>(a[p][k], b[p][k], sum[p]);
      for (int64_t p = 0; p < CHAINS; ++p) total[p] = k0 ? total[p] + sum[p] : sum[p];
    }
    for (int64_t p = 0; p < CHAINS && first + p < count; ++p) out[first + p] = total[p];
  }
}

// to (d,) += factor * from
template <class T>
INLINE void add_scaled(T* to, const T* from, T factor, int64_t d) {
  int64_t k = 0;
  for (; k + WIDTH<T> <= d; k += WIDTH<T>) store<T>(to + k, load(to + k) + load(from + k) * factor);
  for (; k < d; ++k) to[k] += from[k] * factor;
}
// to (d,) += factor * (a - b)
template <class T>
INLINE void add_difference(T* to, const T* a, const T* b, T factor, int64_t d) {
  int64_t k = 0;
  for (; k + WIDTH<T> <= d; k += WIDTH<T>) store<T>(to + k, load(to + k) + (load(a + k) - load(b + k)) * factor);
  for (; k < d; ++k) to[k] += (a[k] - b[k]) * factor;
}

// A matrix that is read one entry at a time: entry (i, k) is data[i * row + k * inner].
template <class T>
struct Strided {
  const T* data;
  int64_t row, inner;
};

// to (ROWS, VECTORS vectors) += w from. The sum starts at zero and is added to `to` once: terms added to `to` one by
// one would each be rounded to the digits of the total.
template <class T, int ROWS, int VECTORS>
__attribute__((noinline)) void add_panel(Strided<T> w, const T* from, int64_t from_stride, int64_t inner, T* to,
                                         int64_t to_stride) {
  constexpr int64_t L = WIDTH<T>;
  Vec<T> sum[ROWS][VECTORS];
  for (int r = 0; r < ROWS; ++r)
    for (int v = 0; v < VECTORS; ++v) sum[r][v] = Vec<T>{};
  for (int64_t k = 0; k < inner; ++k) {
    Vec<T> right[VECTORS];
    for (int v = 0; v < VECTORS; ++v) right[v] = load(from + k * from_stride + v * L);
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r) {
      const Vec<T> left = splat(w.data[r * w.row + k * w.inner]);
      for (int v = 0; v < VECTORS; ++v) sum[r][v] = fused(left, right[v], sum[r][v]);
    }
  }
  for (int r = 0; r < ROWS; ++r)
    for (int v = 0; v < VECTORS; ++v) {
      T* at = to + r * to_stride + v * L;
      store<T>(at, load(at) + sum[r][v]);
    }
}

// to (rows, d) += w from (inner, d), where w (rows, inner) is read as its transpose if asked for.
template <class T>
void add_product(const T* w, int64_t ld, bool transpose, int64_t rows, const T* from, int64_t inner, int64_t d, T* to) {
  constexpr int64_t L = WIDTH<T>, INNER = 64;  // INNER: rows of `from` at a time, the terms of one sum
  alignas(64) T tail_from[INNER * L], tail_to[PANEL_ROWS * L];
  for (int64_t k0 = 0; k0 < inner; k0 += INNER) {
    const int64_t depth = inner - k0 < INNER ? inner - k0 : INNER;
    const T* y = from + k0 * d;
    auto rows_from = [&](int64_t i) {
      return transpose ? Strided<T>{w + k0 * ld + i, 1, ld} : Strided<T>{w + i * ld + k0, ld, 1};
    };
    auto each_block = [&](auto&& f) {
      for (int64_t i = 0; i < rows; i += PANEL_ROWS) with_rows<PANEL_ROWS>(rows - i, [&](auto r) { f(i, r); });
    };
    int64_t c = 0;
    for (; c + 2 * L <= d; c += 2 * L)
      each_block([&](int64_t i, auto r) {
        add_panel<T, decltype(r)::value, 2>(rows_from(i), y + c, d, depth, to + i * d + c, d);
      });
    for (; c + L <= d; c += L)
      each_block([&](int64_t i, auto r) {
        add_panel<T, decltype(r)::value, 1>(rows_from(i), y + c, d, depth, to + i * d + c, d);
      });
    if (c == d) continue;
    // The columns that do not fill a vector go through padded copies.
    const int64_t tail = d - c;
    for (int64_t k = 0; k < depth; ++k)
      for (int64_t l = 0; l < L; ++l) tail_from[k * L + l] = l < tail ? y[k * d + c + l] : T(0);
    each_block([&](int64_t i, auto r) {
      constexpr int R = decltype(r)::value;
      for (int64_t q = 0; q < R; ++q)
        for (int64_t l = 0; l < L; ++l) tail_to[q * L + l] = l < tail ? to[(i + q) * d + c + l] : T(0);
      add_panel<T, R, 1>(rows_from(i), tail_from, L, depth, tail_to, L);
      for (int64_t q = 0; q < R; ++q)
        for (int64_t l = 0; l < tail; ++l) to[(i + q) * d + c + l] = tail_to[q * L + l];
    });
  }
}

}  // namespace
}  // namespace flashpair
