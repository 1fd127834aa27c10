// The int8 screen of one instruction set. This file is compiled once for each: FLASHPAIR_ISA names it, and the
// compiler's flags choose it.
//
// Products take one word (32 bits) at a time: four int8 where the processor multiplies and adds those (VNNI), else two
// int16. A block of the tile's products stays in registers and is compared there.
// Never stored: products or estimates, only the candidates. Integer sums have no order; candidates are listed by row.
#include "int8.h"

#include <cmath>
#include <cstring>

#include "cpu/tile/simd.h"
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace flashpair {
namespace {

#if defined(__AVX512VNNI__)
constexpr int64_t COORDS_PER_WORD = 4;
using Coord = int8_t;
#else
constexpr int64_t COORDS_PER_WORD = 2;
using Coord = int16_t;
#endif
#if defined(__AVX512F__)
constexpr int64_t ROWS = 8, PANELS = 2;  // of a register block
#elif defined(__AVX2__)
constexpr int64_t ROWS = 4, PANELS = 1;
#else
constexpr int64_t ROWS = 2, PANELS = 1;
#endif
constexpr int64_t LANES = WIDTH<float>, VECTORS = PANEL / LANES;
using Float = Vec<float>;
using Int = Mask<float>;
constexpr float UNIT = 0x1p-24f;  // one rounding of a float, relative

INLINE Int load_ints(const int32_t* p) {
  Int v;
  memcpy(&v, p, sizeof v);
  return v;
}

// The columns' coordinates. VNNI takes them as unsigned numbers, so they get 128 added; Int8Rows::init makes up for it.
INLINE Int columns(const int32_t* p) {
#if defined(__AVX512VNNI__)
  return load_ints(p) ^ static_cast<int32_t>(0x80808080);
#else
  return load_ints(p);
#endif
}

// sum + the products of the coordinates in each word of `a` and `b`.
INLINE Int multiply(Int sum, Int a, Int b) {
#if defined(__AVX512VNNI__)
  return (Int)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)a, (__m512i)b);
#elif defined(__AVX512F__)
  return sum + (Int)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return sum + (Int)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#elif defined(__x86_64__)
  return sum + (Int)_mm_madd_epi16((__m128i)a, (__m128i)b);
#else
  const Int even = ((a << 16) >> 16) * ((b << 16) >> 16), odd = (a >> 16) * (b >> 16);
  return sum + even + odd;
#endif
}

// The mask's lanes as bits.
INLINE uint32_t bits(Int mask) {
#if defined(__AVX512F__)
  return _mm512_movepi32_mask((__m512i)mask);
#elif defined(__AVX2__)
  return static_cast<uint32_t>(_mm256_movemask_ps((__m256)mask));
#elif defined(__x86_64__)
  return static_cast<uint32_t>(_mm_movemask_ps((__m128)mask));
#else
  uint32_t packed = 0;
  for (int64_t k = 0; k < LANES; ++k) packed |= static_cast<uint32_t>(mask[k] != 0) << k;
  return packed;
#endif
}

INLINE float round_up(double x) {
  constexpr double largest = 3.4028234663852886e38;
  return std::nextafter(static_cast<float>(x < largest ? x : largest), INF<float>);
}

// One row as step * q, with integers q (D, and zeros up to a full vector). norm is the larger of |x| and |step q|, and
// residual is |x - step q|; both err by at most D roundings of T relative to `norm`.
template <class T>
struct QuantizedRow {
  float step;
  double norm, residual;
  int32_t sum = 0;  // of q

  QuantizedRow(const T* row, int64_t d, Coord* q) {
    constexpr int64_t L = WIDTH<T>;
    Vec<T> tail{}, largest{};
    memcpy(&tail, row + d / L * L, d % L * sizeof(T));
    auto for_each_vector = [&](auto&& f) ALWAYS {
      for (int64_t k = 0; k + L <= d; k += L) f(k, load(row + k));
      if (d % L) f(d / L * L, tail);
    };
    for_each_vector([&](int64_t, Vec<T> x) ALWAYS { largest = maximum<T>(largest, absolute<T>(x)); });
    const T magnitude = hmax<T>(largest);
    // Outside of this range products of two steps could under- or overflow. Then q is 0, and the residual is the row.
    const bool in_range = magnitude > T(1e-30) && magnitude < T(1e16);
    step = in_range ? static_cast<float>(magnitude) / 127.0f : 0.0f;
    const T per_step = in_range ? T(1) / static_cast<T>(step) : T(0);
    Vec<T> x_squares{}, r_squares{};
    Mask<T> q_sums{}, q_squares{};
    for_each_vector([&](int64_t k, Vec<T> x) ALWAYS {
      const Vec<T> scaled = x * per_step;  // in steps, so that no square under- or overflows
      const Vec<T> away = scaled + (scaled < T(0) ? splat(T(-0.5)) : splat(T(0.5)));
      const Mask<T> n = __builtin_convertvector(minimum<T>(maximum<T>(away, splat(T(-127))), splat(T(127))), Mask<T>);
      const Vec<T> r = scaled - __builtin_convertvector(n, Vec<T>);
      x_squares += scaled * scaled;
      r_squares += r * r;
      q_sums += n;
      q_squares += n * n;
      for (int64_t l = 0; l < L; ++l) q[k + l] = static_cast<Coord>(n[l]);
    });
    double q_square = 0;
    for (int64_t l = 0; l < L; ++l)
      sum += static_cast<int32_t>(q_sums[l]), q_square += static_cast<double>(q_squares[l]);
    norm = step * std::sqrt(std::max(q_square, static_cast<double>(hsum<T>(x_squares))));
    residual = step * std::sqrt(static_cast<double>(hsum<T>(r_squares)));
    if (!in_range) norm = residual = magnitude * std::sqrt(static_cast<double>(d));
  }
};

template <class T>
void quantize_rows(const T* x, int64_t first, int64_t last, int64_t d, const T* sq_norm, Int8Rows& to) {
  std::vector<Coord> q(d + WIDTH<T> + COORDS_PER_WORD);
  const double rounding = static_cast<double>(d + 64) * UNIT;
  for (int64_t i = first; i < last; ++i) {
    const QuantizedRow<T> row(x + i * d, d, q.data());
    const double norm = row.norm * (1 + rounding);
    to.step[i] = row.step;
    to.norm[i] = round_up(norm);
    to.residual[i] = round_up(row.residual * (1 + 0x1p-10) + 2 * rounding * norm);
    to.half_sq_norm[i] = sq_norm ? static_cast<float>(sq_norm[i] / 2) : 0.0f;
    if (!(to.half_sq_norm[i] < 3e38f)) to.residual[i] = INF<float>;  // all pairs of such a row are candidates
    if (COORDS_PER_WORD == 4) to.init[i] = -128 * row.sum;
    int32_t* panel = to.panels.data() + i / PANEL * PANEL * to.words + i % PANEL;
    for (int64_t w = 0; w < to.words; ++w) memcpy(panel + w * PANEL, q.data() + w * COORDS_PER_WORD, sizeof *panel);
  }
}

// The rows of both sides, and the anchors' thresholds.
struct ScreenOperands {
  const Int8Rows &x, &y;
  const Thresholds& window;
};

// Which pairs of row i and a vector of columns from j on are candidates, given the products of their integers.
template <bool SYMMETRIC, bool HIGH>
INLINE Int candidate_mask(const ScreenOperands& s, Int products, int64_t i, int64_t j) {
  const Float estimate = __builtin_convertvector(products, Float) * load(s.y.step.data() + j) * s.x.step[i];
  const Float bound = load(s.y.residual.data() + j) * s.x.norm[i] + load(s.y.norm.data() + j) * s.x.residual[i];
  const Float halves = load(s.y.half_sq_norm.data() + j) + s.x.half_sq_norm[i];
  const Float estimate_max = estimate + bound - halves * (1 - 64 * UNIT),
              estimate_min = estimate - bound - halves * (1 + 64 * UNIT);
  auto outside = [&](Float low, Float high) ALWAYS {
    Int out = estimate_max <= low;
    if constexpr (HIGH) out |= estimate_min >= high;
    return out;
  };
  Int irrelevant = outside(splat(s.window.low[i]), HIGH ? splat(s.window.high[i]) : Float{});
  // Each anchor's thresholds are tested by themselves: a pair may lie above one interval and below the other.
  if constexpr (SYMMETRIC) irrelevant &= outside(load(s.window.low + j), HIGH ? load(s.window.high + j) : Float{});
  return ~irrelevant;
}

// Screens R rows from i on against P panels of columns from j on. Calls emit(row, column, bits of the candidates).
template <int64_t R, int64_t P, bool SYMMETRIC, bool HIGH, class Emit>
INLINE void screen_block(const ScreenOperands& s, int64_t i, int64_t j, Emit&& emit) {
  Int sum[R][P * VECTORS];
  const int32_t* row = s.x.panels.data() + i / PANEL * PANEL * s.x.words + i % PANEL;
  const int32_t* column[P];
  for (int64_t p = 0; p < P; ++p) column[p] = s.y.panels.data() + (j / PANEL + p) * PANEL * s.y.words;
  for (int64_t r = 0; r < R; ++r)
    for (int64_t v = 0; v < P * VECTORS; ++v) sum[r][v] = Int{} + s.x.init[i + r];
  for (int64_t w = 0; w < s.x.words; ++w) {
    Int y[P * VECTORS];
    for (int64_t v = 0; v < P * VECTORS; ++v) y[v] = columns(column[v / VECTORS] + w * PANEL + v % VECTORS * LANES);
    for (int64_t r = 0; r < R; ++r) {
      const Int x = Int{} + row[w * PANEL + r];
      for (int64_t v = 0; v < P * VECTORS; ++v) sum[r][v] = multiply(sum[r][v], y[v], x);
    }
  }
  for (int64_t r = 0; r < R; ++r)
    for (int64_t v = 0; v < P * VECTORS; ++v) {
      const uint32_t hits = bits(candidate_mask<SYMMETRIC, HIGH>(s, sum[r][v], i + r, j + v * LANES));
      if (__builtin_expect(hits != 0, 0)) emit(i + r, j + v * LANES, hits);
    }
}

template <bool SYMMETRIC, bool HIGH>
int64_t list_candidates(const ScreenOperands& s, const Excluded& excluded, const Int8Tile& t, int32_t* entry,
                        int64_t capacity) {
  int64_t count = 0;
  auto emit = [&](int64_t i, int64_t j, uint32_t hits) {
    if (i >= t.r0 + t.rows || count < 0) return;
    while (hits) {
      const int64_t column = j + __builtin_ctz(hits);
      hits &= hits - 1;
      if (column >= t.c0 + t.cols || (excluded.self && column == i)) continue;
      if (excluded.pos_begin && column >= excluded.pos_begin[i] && column < excluded.pos_end[i]) continue;
      if (count == capacity) {
        count = -1;
        return;
      }
      entry[count++] = pack_entry(i - t.r0, column - t.c0);
    }
  };
  const int64_t col_end = t.c0 + t.cols;
  for (int64_t i = t.r0; i < t.r0 + t.rows && count >= 0; i += ROWS) {
    int64_t j = t.c0;
    for (; j + PANEL * (PANELS - 1) < col_end; j += PANEL * PANELS)
      screen_block<ROWS, PANELS, SYMMETRIC, HIGH>(s, i, j, emit);
    for (; j < col_end; j += PANEL) screen_block<ROWS, 1, SYMMETRIC, HIGH>(s, i, j, emit);
  }
  return count;
}

int64_t candidates(const Int8Rows& x, const Int8Rows& y, const Thresholds& w, const Excluded& excluded,
                   const Int8Tile& t, int32_t* entry, int64_t capacity) {
  const ScreenOperands s{x, y, w};
  if (w.high)
    return t.symmetric ? list_candidates<true, true>(s, excluded, t, entry, capacity)
                       : list_candidates<false, true>(s, excluded, t, entry, capacity);
  return t.symmetric ? list_candidates<true, false>(s, excluded, t, entry, capacity)
                     : list_candidates<false, false>(s, excluded, t, entry, capacity);
}

}  // namespace

namespace FLASHPAIR_ISA {
Int8Kernels int8_kernels() { return {COORDS_PER_WORD, quantize_rows<float>, quantize_rows<double>, candidates}; }
}  // namespace FLASHPAIR_ISA
}  // namespace flashpair
