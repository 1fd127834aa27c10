// Compiled once for each instruction set, which FLASHPAIR_ISA names and the compiler's flags choose.
//
// Products of 32 bits at a time: four int8 where the processor multiplies and adds those (VNNI), else two int16. A
// block of the tile's products stays in registers, is compared there, and leaves nothing but the pairs that pass.
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
constexpr int64_t DEPTH = 4;  // coordinates in 32 bits
using Coordinate = int8_t;
#else
constexpr int64_t DEPTH = 2;
using Coordinate = int16_t;
#endif
#if defined(__AVX512F__)
constexpr int64_t ROWS = 8, PANELS = 2;  // of a block in registers
#elif defined(__AVX2__)
constexpr int64_t ROWS = 4, PANELS = 1;
#else
constexpr int64_t ROWS = 2, PANELS = 1;
#endif
constexpr int64_t LANES = WIDTH<float>, VECTORS = PANEL / LANES;
using Float = Vec<float>;
using Int = Mask<float>;
constexpr float UNIT = 0x1p-24f;

INLINE Int load_ints(const int32_t* p) {
  Int v;
  memcpy(&v, p, sizeof v);
  return v;
}

// Columns as the unsigned factor of VNNI: 128 more than they are, for which `shift` makes up.
INLINE Int columns(const int32_t* p) {
#if defined(__AVX512VNNI__)
  return load_ints(p) ^ static_cast<int32_t>(0x80808080);
#else
  return load_ints(p);
#endif
}

// Each lane's coordinates of `a` times those of `b`, added to `sum`.
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

INLINE uint32_t bits(Int mask) {
#if defined(__AVX512F__)
  return _mm512_movepi32_mask((__m512i)mask);
#elif defined(__AVX2__)
  return static_cast<uint32_t>(_mm256_movemask_ps((__m256)mask));
#elif defined(__x86_64__)
  return static_cast<uint32_t>(_mm_movemask_ps((__m128)mask));
#else
  uint32_t found = 0;
  for (int64_t k = 0; k < LANES; ++k) found |= static_cast<uint32_t>(mask[k] != 0) << k;
  return found;
#endif
}

INLINE float up(double x) {
  constexpr double most = 3.4028234663852886e38;
  return std::nextafter(static_cast<float>(x < most ? x : most), INF<float>);
}

// One row in whole numbers q (D, and zeros up to a vector), and how far from them it is. The norms are in double: of
// the row, of step q, and of what rounding loses; each to D roundings of T relative to `norm`.
template <class T>
struct Rounded {
  float step;
  double norm, lost;
  int32_t sum = 0;

  Rounded(const T* row, int64_t d, Coordinate* q) {
    constexpr int64_t L = WIDTH<T>;
    Vec<T> tail{}, most{};
    memcpy(&tail, row + d / L * L, d % L * sizeof(T));
    auto each = [&](auto&& f) ALWAYS {
      for (int64_t k = 0; k + L <= d; k += L) f(k, load(row + k));
      if (d % L) f(d / L * L, tail);
    };
    each([&](int64_t, Vec<T> x) ALWAYS { most = maximum<T>(most, absolute<T>(x)); });
    const T highest = hmax<T>(most);
    // Beyond, where products of steps could under- or overflow: the row is its own rounding error.
    const bool plain = highest > T(1e-30) && highest < T(1e16);
    step = plain ? static_cast<float>(highest) / 127.0f : 0.0f;
    const T per_step = plain ? T(1) / static_cast<T>(step) : T(0);
    Vec<T> wholes{}, losts{};
    Mask<T> sums{}, squares{};
    each([&](int64_t k, Vec<T> x) ALWAYS {
      const Vec<T> scaled = x * per_step;  // in steps, so that no square under- or overflows
      const Vec<T> away = scaled + (scaled < T(0) ? splat(T(-0.5)) : splat(T(0.5)));
      const Mask<T> n = __builtin_convertvector(minimum<T>(maximum<T>(away, splat(T(-127))), splat(T(127))), Mask<T>);
      const Vec<T> r = scaled - __builtin_convertvector(n, Vec<T>);
      wholes += scaled * scaled;
      losts += r * r;
      sums += n;
      squares += n * n;
      for (int64_t l = 0; l < L; ++l) q[k + l] = static_cast<Coordinate>(n[l]);
    });
    double square = 0;
    for (int64_t l = 0; l < L; ++l) sum += static_cast<int32_t>(sums[l]), square += static_cast<double>(squares[l]);
    norm = step * std::sqrt(std::max(square, static_cast<double>(hsum<T>(wholes))));
    lost = step * std::sqrt(static_cast<double>(hsum<T>(losts)));
    if (!plain) norm = lost = highest * std::sqrt(static_cast<double>(d));
  }
};

template <class T>
void round_rows(const T* x, int64_t first, int64_t last, int64_t d, const T* square, Int8Rows& to) {
  std::vector<Coordinate> q(d + WIDTH<T> + DEPTH);
  const double rounding = static_cast<double>(d + 64) * UNIT;
  for (int64_t i = first; i < last; ++i) {
    const Rounded<T> row(x + i * d, d, q.data());
    const double norm = row.norm * (1 + rounding);
    to.step[i] = row.step;
    to.norm[i] = up(norm);
    to.lost[i] = up(row.lost * (1 + 0x1p-10) + 2 * rounding * norm);
    to.half[i] = square ? static_cast<float>(square[i] / 2) : 0.0f;
    if (!(to.half[i] < 3e38f)) to.lost[i] = INF<float>;  // nothing is proved of it
    if (DEPTH == 4) to.shift[i] = -128 * row.sum;
    int32_t* panel = to.panels.data() + i / PANEL * PANEL * to.groups + i % PANEL;
    for (int64_t g = 0; g < to.groups; ++g) memcpy(panel + g * PANEL, q.data() + g * DEPTH, sizeof *panel);
  }
}

// Both sides' rows, and what the anchors want.
struct Sides {
  const Int8Rows &x, &y;
  const Thresholds& window;
};

// Which pairs of row i and of the columns from j on are alive, given the products of their whole numbers.
template <bool BOTH, bool HIGH>
INLINE Int alive(const Sides& s, Int products, int64_t i, int64_t j) {
  const Float estimate = __builtin_convertvector(products, Float) * load(s.y.step.data() + j) * s.x.step[i];
  const Float bound = load(s.y.lost.data() + j) * s.x.norm[i] + load(s.y.norm.data() + j) * s.x.lost[i];
  const Float halves = load(s.y.half.data() + j) + s.x.half[i];
  const Float most = estimate + bound - halves * (1 - 64 * UNIT), least = estimate - bound - halves * (1 + 64 * UNIT);
  auto useless = [&](Float low, Float high) ALWAYS {
    Int out = most <= low;
    if constexpr (HIGH) out |= least >= high;
    return out;
  };
  Int dead = useless(splat(s.window.low[i]), HIGH ? splat(s.window.high[i]) : Float{});
  // Each anchor by itself: one may have no use for what is above, the other for what is below.
  if constexpr (BOTH) dead &= useless(load(s.window.low + j), HIGH ? load(s.window.high + j) : Float{});
  return ~dead;
}

template <int64_t R, int64_t P, bool BOTH, bool HIGH, class Found>
INLINE void block(const Sides& s, int64_t i, int64_t j, Found&& found) {
  Int sum[R][P * VECTORS];
  const int32_t* row = s.x.panels.data() + i / PANEL * PANEL * s.x.groups + i % PANEL;
  const int32_t* column[P];
  for (int64_t p = 0; p < P; ++p) column[p] = s.y.panels.data() + (j / PANEL + p) * PANEL * s.y.groups;
  for (int64_t r = 0; r < R; ++r)
    for (int64_t v = 0; v < P * VECTORS; ++v) sum[r][v] = Int{} + s.x.shift[i + r];
  for (int64_t g = 0; g < s.x.groups; ++g) {
    Int y[P * VECTORS];
    for (int64_t v = 0; v < P * VECTORS; ++v) y[v] = columns(column[v / VECTORS] + g * PANEL + v % VECTORS * LANES);
    for (int64_t r = 0; r < R; ++r) {
      const Int x = Int{} + row[g * PANEL + r];
      for (int64_t v = 0; v < P * VECTORS; ++v) sum[r][v] = multiply(sum[r][v], y[v], x);
    }
  }
  for (int64_t r = 0; r < R; ++r)
    for (int64_t v = 0; v < P * VECTORS; ++v) {
      const uint32_t hits = bits(alive<BOTH, HIGH>(s, sum[r][v], i + r, j + v * LANES));
      if (__builtin_expect(hits != 0, 0)) found(i + r, j + v * LANES, hits);
    }
}

template <bool BOTH, bool HIGH>
int64_t candidates_of(const Sides& s, const Excluded& none, const Int8Tile& t, int32_t* entry, int64_t capacity) {
  int64_t count = 0;
  auto list = [&](int64_t i, int64_t j, uint32_t hits) {
    if (i >= t.r0 + t.rows || count < 0) return;
    while (hits) {
      const int64_t column = j + __builtin_ctz(hits);
      hits &= hits - 1;
      if (column >= t.c0 + t.cols || (none.self && column == i)) continue;
      if (none.lo && column >= none.lo[i] && column < none.hi[i]) continue;
      if (count == capacity) {
        count = -1;
        return;
      }
      entry[count++] = static_cast<int32_t>((i - t.r0) << 16 | (column - t.c0));
    }
  };
  const int64_t end = t.c0 + t.cols;
  for (int64_t i = t.r0; i < t.r0 + t.rows && count >= 0; i += ROWS) {
    int64_t j = t.c0;
    for (; j + PANEL * (PANELS - 1) < end; j += PANEL * PANELS) block<ROWS, PANELS, BOTH, HIGH>(s, i, j, list);
    for (; j < end; j += PANEL) block<ROWS, 1, BOTH, HIGH>(s, i, j, list);
  }
  return count;
}

int64_t candidates(const Int8Rows& x, const Int8Rows& y, const Thresholds& w, const Excluded& none, const Int8Tile& t,
                   int32_t* entry, int64_t capacity) {
  const Sides s{x, y, w};
  if (w.high)
    return t.both_ends ? candidates_of<true, true>(s, none, t, entry, capacity)
                       : candidates_of<false, true>(s, none, t, entry, capacity);
  return t.both_ends ? candidates_of<true, false>(s, none, t, entry, capacity)
                     : candidates_of<false, false>(s, none, t, entry, capacity);
}

}  // namespace

namespace FLASHPAIR_ISA {
Int8Kernels int8_kernels() { return {DEPTH, round_rows<float>, round_rows<double>, candidates}; }
}  // namespace FLASHPAIR_ISA
}  // namespace flashpair
