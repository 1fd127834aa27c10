// Phase 1 of `onchip`: embeddings as the products read them, and with one_pair who takes part.
//
// Writes the workspace's Samples. Each warp sums in a fixed order, so results are deterministic.
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

// Four rows, by one warp: normalised, zero-padded, and written as they are and transposed. E: the embeddings' type.
template <class T, class E>
__device__ void prepare_rows(const Spec& spec, const Samples<T>& samples, int width, int first, int lane) {
  const E* raw = static_cast<const E*>(samples.raw);
  auto read = [&](int k, T(&v)[4]) {  // four loads in flight at once
    for (int r = 0; r < 4; ++r) v[r] = widen(raw[size_t(min(first + r, samples.count - 1)) * spec.d + k]);
    for (int r = 0; r < 4; ++r) v[r] = first + r < samples.count ? v[r] : T(0);
  };
  T inverse_norm[4] = {1, 1, 1, 1}, sq_norm[4] = {}, nonfinite[4] = {};
  if (spec.normalize) {
    T sum[4] = {}, v[4];
#pragma unroll 2
    for (int k = lane; k < spec.d; k += LANES) {
      read(k, v);
      for (int r = 0; r < 4; ++r) sum[r] += v[r] * v[r];
    }
    // A norm of at most this has a square that underflows, and counts as 0.
    const T smallest = sizeof(T) == 8 ? T(1.4916681462400413e-154) : T(1.0842021724855044e-19);
    for (int r = 0; r < 4; ++r) {
      const T norm = sqrt(warp_sum(sum[r]));
      inverse_norm[r] = norm <= smallest ? T(0) : norm < T(INFINITY) ? T(1) / norm : T(NAN);
    }
  }
#pragma unroll 2
  for (int k = lane; k < width; k += LANES) {
    Quad<T> column = {};
    if (k < spec.d) read(k, column.v);
    for (int r = 0; r < 4; ++r) {
      const T v = column.v[r] *= inverse_norm[r];
      samples.rows[size_t(first + r) * width + k] = v;
      sq_norm[r] += v * v;
      nonfinite[r] += v * T(0);
    }
    *reinterpret_cast<Quad<T>*>(samples.columns + size_t(k) * samples.padded + first) = column;
  }
  for (int r = 0; r < 4; ++r) {
    sq_norm[r] = warp_sum(sq_norm[r]), nonfinite[r] = warp_sum(nonfinite[r]);
    if (lane) continue;
    samples.sq_norm[first + r] = sq_norm[r], samples.inverse_norm[first + r] = inverse_norm[r],
                            samples.nonfinite[first + r] = nonfinite[r];
  }
}

template <class T>
__device__ void prepare(const Spec& spec, const Samples<T>& samples, int width, int first, int lane) {
  if constexpr (sizeof(T) == sizeof(double)) {
    prepare_rows<T, double>(spec, samples, width, first, lane);
  } else {
    if (spec.number == FLOAT32) prepare_rows<T, float>(spec, samples, width, first, lane);
    if (spec.number == BFLOAT16) prepare_rows<T, __nv_bfloat16>(spec, samples, width, first, lane);
    if (spec.number == FLOAT16) prepare_rows<T, __half>(spec, samples, width, first, lane);
  }
}

// The role of sample i, by one warp. A class's first sample is its anchor; its positive is the second sample, or in a
// rectangular problem the first reference. Classes without both take no part.
template <class T>
__device__ void assign_role(const Spec& spec, const Samples<T>& own, const Samples<T>& other, bool anchor, int i,
                            int lane) {
  int earlier = 0, same = 0;
  for (int j = lane; j < own.count; j += LANES) earlier += j < i && own.labels[j] == own.labels[i];
  for (int j = lane; j < other.count; j += LANES) same += other.labels[j] == own.labels[i];
  earlier = warp_sum(earlier), same = warp_sum(same);
  int role = earlier == 0 && same > 0 ? (anchor ? ANCHOR : REFERENCE) : NO_ROLE;
  if (spec.square) role = earlier == 0 && same > 1 ? ANCHOR : earlier == 1 ? REFERENCE : NO_ROLE;
  if (lane == 0) own.role[i] = role;
}

}  // namespace flashpair::onchip
