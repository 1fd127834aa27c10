// Vectors of one width for each instruction set (the compiler's vector extensions), and the functions that losses need.
// Everything here is internal to the including file, so that code of one instruction set cannot be linked into another.
#pragma once
#include <cstdint>
#include <cstring>

#include "cpu/types.h"
#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace flashpair {
namespace {

#if defined(__AVX512F__)
constexpr int VECTOR_BYTES = 64;
#elif defined(__AVX2__)
constexpr int VECTOR_BYTES = 32;
#else
constexpr int VECTOR_BYTES = 16;
#endif

template <class T>
struct VecTypes;
template <>
struct VecTypes<float> {
  typedef float V __attribute__((vector_size(VECTOR_BYTES)));
  typedef int32_t I __attribute__((vector_size(VECTOR_BYTES)));
  using Int = int32_t;
};
template <>
struct VecTypes<double> {
  typedef double V __attribute__((vector_size(VECTOR_BYTES)));
  typedef int64_t I __attribute__((vector_size(VECTOR_BYTES)));
  using Int = int64_t;
};
template <class T>
using Vec = typename VecTypes<T>::V;
template <class T>
using Mask = typename VecTypes<T>::I;  // a lane is -1 or 0
template <class T>
constexpr int64_t WIDTH = VECTOR_BYTES / sizeof(T);

struct NoMask {};  // the mask of a vector all of whose lanes take part

template <class T>
INLINE Vec<T> load(const T* p) {
  Vec<T> v;
  memcpy(&v, p, sizeof v);
  return v;
}
template <class T>
INLINE void store(T* p, Vec<T> v) {
  memcpy(p, &v, sizeof v);
}
template <class T>
INLINE Vec<T> splat(T x) {
  return Vec<T>{} + x;
}
template <class T>
INLINE Mask<T> iota(int64_t first) {
  Mask<T> v{};
  for (int64_t k = 0; k < WIDTH<T>; ++k) v[k] = static_cast<typename VecTypes<T>::Int>(first + k);
  return v;
}
template <class T>
INLINE Vec<T> select(Mask<T> m, Vec<T> a, Vec<T> b) {
  return m ? a : b;
}
template <class T>
INLINE Vec<T> select(NoMask, Vec<T> a, Vec<T>) {
  return a;
}
template <class T>
INLINE Mask<T> mask_and(Mask<T> a, Mask<T> b) {
  return a & b;
}
template <class T>
INLINE Mask<T> mask_and(Mask<T> a, NoMask) {
  return a;
}
template <class T>
INLINE NoMask mask_and(NoMask, NoMask) {
  return {};
}
template <class T>
INLINE Mask<T> mask_and(NoMask, Mask<T> b) {
  return b;
}
template <class T>
INLINE Vec<T> maximum(Vec<T> a, Vec<T> b) {
  return a > b ? a : b;
}
template <class T>
INLINE Vec<T> minimum(Vec<T> a, Vec<T> b) {
  return a < b ? a : b;
}
// a * b + c, rounded once where this processor has such an instruction. It is written out because what a compiler fuses
// depends on the code around it, and the same sum must have the same bits everywhere.
INLINE Vec<float> fused(Vec<float> a, Vec<float> b, Vec<float> c) {
#if defined(__AVX512F__)
  return (Vec<float>)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__)
  return (Vec<float>)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
  return (Vec<float>)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
  return a * b + c;
#endif
}
INLINE Vec<double> fused(Vec<double> a, Vec<double> b, Vec<double> c) {
#if defined(__AVX512F__)
  return (Vec<double>)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
#elif defined(__AVX2__)
  return (Vec<double>)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
#elif defined(__aarch64__)
  return (Vec<double>)vfmaq_f64((float64x2_t)c, (float64x2_t)a, (float64x2_t)b);
#else
  return a * b + c;
#endif
}
#if defined(__FMA__) || defined(__aarch64__)
INLINE float fused(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
INLINE double fused(double a, double b, double c) { return __builtin_fma(a, b, c); }
#else
INLINE float fused(float a, float b, float c) { return a * b + c; }
INLINE double fused(double a, double b, double c) { return a * b + c; }
#endif
template <class T>
INLINE T hmax(Vec<T> v) {
  T r = v[0];
  for (int64_t k = 1; k < WIDTH<T>; ++k) r = v[k] > r ? v[k] : r;
  return r;
}
template <class T>
INLINE T hsum(Vec<T> v) {
  T r = 0;
  for (int64_t k = 0; k < WIDTH<T>; ++k) r += v[k];
  return r;
}
template <class T>
INLINE bool any(Mask<T> m) {
  typename VecTypes<T>::Int r = 0;
  for (int64_t k = 0; k < WIDTH<T>; ++k) r |= m[k];
  return r != 0;
}

// e^x to about one rounding. It is 0 below the range and saturates at e^88 (float) and e^709 (double). NaN stays NaN.
INLINE Vec<float> exp(Vec<float> x) {
  using V = Vec<float>;
  const V smallest = splat(-87.3365f);
  const Mask<float> zero = x < smallest;
  x = x < smallest ? smallest : x;
  x = x > 88.0f ? splat(88.0f) : x;
  const V t = x * 1.44269504f + 12582912.0f;  // the sum's low bits are the rounded exponent
  const V n = t - 12582912.0f;
  const V r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  V p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const Mask<float> power = ((Mask<float>)t + 127) << 23;
  return zero ? V{} : p * (V)power;
}
INLINE Vec<double> exp(Vec<double> x) {
  using V = Vec<double>;
  const V smallest = splat(-708.39);
  const Mask<double> zero = x < smallest;
  x = x < smallest ? smallest : x;
  x = x > 709.0 ? splat(709.0) : x;
  const V t = x * 1.4426950408889634 + 6755399441055744.0;
  const V n = t - 6755399441055744.0;
  const V r = (x - n * 6.93147180369123816490e-1) - n * 1.90821492927058770002e-10;
  V p = splat(1.0 / 6227020800.0);  // Taylor to r^13: 4e-18 at |r| <= ln(2) / 2
  const double c[] = {1.0 / 479001600, 1.0 / 39916800, 1.0 / 3628800, 1.0 / 362880, 1.0 / 40320, 1.0 / 5040, 1.0 / 720,
                      1.0 / 120,       1.0 / 24,       1.0 / 6,       0.5,          1.0,         1.0};
  for (double k : c) p = p * r + k;
  const Mask<double> power = ((Mask<double>)t + 1023) << 52;
  return zero ? V{} : p * (V)power;
}

// log(1 + e) for e in [0, 1] as 2 atanh(e / (2 + e)): a series in a square of at most 1 / 9.
template <class T>
INLINE Vec<T> log1p_unit(Vec<T> e) {
  const Vec<T> s = e / (e + T(2)), q = s * s;
  constexpr int last = sizeof(T) == 4 ? 8 : 16;
  Vec<T> p = splat(T(1) / (2 * last + 1));
  for (int k = last - 1; k >= 0; --k) p = p * q + T(1) / (2 * k + 1);
  return T(2) * s * p;
}
// log(x) for x = m 2^e with m in [1 / sqrt(2), sqrt(2)), by log(m) = 2 atanh((m - 1) / (m + 1)). log(0) is -inf; of a
// negative number it is NaN.
template <class T>
INLINE Vec<T> log(Vec<T> x) {
  using Int = typename VecTypes<T>::Int;
  constexpr int fraction = sizeof(T) == 4 ? 23 : 52;
  constexpr Int half_root = sizeof(T) == 4 ? 0x3f3504f3 : static_cast<Int>(0x3fe6a09e667f3bcdLL);
  constexpr T tiny = sizeof(T) == 4 ? T(1.17549435e-38) : T(2.2250738585072014e-308);
  const Mask<T> small = x < tiny;
  const Vec<T> y = small ? x * (Int(1) << fraction) : x;
  const Mask<T> power = ((Mask<T>)y - half_root) >> fraction;
  const Vec<T> m = (Vec<T>)((Mask<T>)y - (power << fraction));
  const Vec<T> s = (m - T(1)) / (m + T(1)), q = s * s;
  constexpr int last = sizeof(T) == 4 ? 4 : 10;
  Vec<T> p = splat(T(1) / (2 * last + 1));
  for (int k = last - 1; k >= 0; --k) p = p * q + T(1) / (2 * k + 1);
  const Vec<T> e = __builtin_convertvector(power, Vec<T>) - (small ? splat(T(fraction)) : Vec<T>{});
  const Vec<T> result = e * T(0.693147180559945309417) + T(2) * s * p;
  const Vec<T> special = x == T(0) ? splat(-INF<T>) : x < T(0) ? splat(T(__builtin_nan(""))) : x;  // inf and NaN stay
  return (x > T(0)) & (x < INF<T>) ? result : special;
}
// log(1 + u), accurate to the last bit for small u.
template <class T>
INLINE Vec<T> log1p(Vec<T> u) {
  const Vec<T> w = u + T(1), u_rounded = w - T(1);
  return w == T(1) ? u : w == INF<T> ? w : log<T>(w) * (u / u_rounded);
}
template <class T>
INLINE Vec<T> absolute(Vec<T> x) {
  return x < T(0) ? -x : x;
}
template <class T>
INLINE Vec<T> softplus(Vec<T> t) {
  return maximum<T>(t, Vec<T>{}) + log1p_unit<T>(exp(-absolute<T>(t)));
}
template <class T>
INLINE Vec<T> sigmoid(Vec<T> t) {
  const Vec<T> e = exp(-absolute<T>(t));
  return (t < T(0) ? e : splat(T(1))) / (e + T(1));
}

}  // namespace
}  // namespace flashpair
