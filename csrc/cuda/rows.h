// Phase 1 of `onchip`: embeddings as the products want them, and with one_pair who takes part.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "product.h"
#include "workspace.h"

namespace flashpair::onchip {

template <class T>
__device__ T warp_sum(T value) {
  for (int step = LANES / 2; step; step /= 2) value += __shfl_xor_sync(0xffffffffu, value, step);
  return value;
}

template <class T>
__device__ T warp_max(T value) {
  for (int step = LANES / 2; step; step /= 2) {
    const T other = __shfl_xor_sync(0xffffffffu, value, step);
    value = other > value ? other : value;
  }
  return value;
}

__device__ inline double widen(double value) { return value; }
__device__ inline float widen(float value) { return value; }
__device__ inline float widen(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ inline float widen(__half value) { return __half2float(value); }

// Phase 1 of four rows, by one warp: normalised, zero-padded, as they are and transposed. E: what embeddings come in.
template <class T, class E>
__device__ void prepare_rows(const Job& job, const Set<T>& set, int width, int first, int lane) {
  const E* raw = static_cast<const E*>(set.raw);
  auto read = [&](int k, T(&v)[4]) {  // four loads on their way at once
    for (int r = 0; r < 4; ++r) v[r] = widen(raw[size_t(min(first + r, set.count - 1)) * job.d + k]);
    for (int r = 0; r < 4; ++r) v[r] = first + r < set.count ? v[r] : T(0);
  };
  T inverse[4] = {1, 1, 1, 1}, square[4] = {}, poison[4] = {};
  if (job.unit) {
    T sum[4] = {}, v[4];
#pragma unroll 2
    for (int k = lane; k < job.d; k += LANES) {
      read(k, v);
      for (int r = 0; r < 4; ++r) sum[r] += v[r] * v[r];
    }
    const T zero = sizeof(T) == 8 ? T(1.4916681462400413e-154) : T(1.0842021724855044e-19);  // whose square underflows
    for (int r = 0; r < 4; ++r) {
      const T norm = sqrt(warp_sum(sum[r]));
      inverse[r] = norm <= zero ? T(0) : norm < T(INFINITY) ? T(1) / norm : T(NAN);
    }
  }
#pragma unroll 2
  for (int k = lane; k < width; k += LANES) {
    Quad<T> column = {};
    if (k < job.d) read(k, column.v);
    for (int r = 0; r < 4; ++r) {
      const T v = column.v[r] *= inverse[r];
      set.rows[size_t(first + r) * width + k] = v;
      square[r] += v * v;
      poison[r] += v * T(0);
    }
    *reinterpret_cast<Quad<T>*>(set.columns + size_t(k) * set.padded + first) = column;
  }
  for (int r = 0; r < 4; ++r) {
    square[r] = warp_sum(square[r]), poison[r] = warp_sum(poison[r]);
    if (lane) continue;
    set.square[first + r] = square[r], set.inverse[first + r] = inverse[r], set.poison[first + r] = poison[r];
  }
}

template <class T>
__device__ void prepare(const Job& job, const Set<T>& set, int width, int first, int lane) {
  if constexpr (sizeof(T) == sizeof(double)) {
    prepare_rows<T, double>(job, set, width, first, lane);
  } else {
    if (job.number == FLOAT32) prepare_rows<T, float>(job, set, width, first, lane);
    if (job.number == BFLOAT16) prepare_rows<T, __nv_bfloat16>(job, set, width, first, lane);
    if (job.number == FLOAT16) prepare_rows<T, __half>(job, set, width, first, lane);
  }
}

// Phase 1 of one label, by one warp: a class's first sample is its anchor; its positive is the second one, or of a
// rectangular problem the first reference. Classes without both take no part.
template <class T>
__device__ void assign_role(const Job& job, const Set<T>& own, const Set<T>& other, bool anchor, int i, int lane) {
  int before = 0, same = 0;
  for (int j = lane; j < own.count; j += LANES) before += j < i && own.labels[j] == own.labels[i];
  for (int j = lane; j < other.count; j += LANES) same += other.labels[j] == own.labels[i];
  before = warp_sum(before), same = warp_sum(same);
  int role = before == 0 && same > 0 ? (anchor ? ANCHOR : REFERENCE) : NO_ROLE;
  if (job.square) role = before == 0 && same > 1 ? ANCHOR : before == 1 ? REFERENCE : NO_ROLE;
  if (lane == 0) own.role[i] = role;
}

}  // namespace flashpair::onchip
