// The matrix product of `onchip`: a block's few rows, in shared memory, times a matrix that comes from the L2 cache.
//
// Stores its sums in registers and shared memory. Deterministic: an entry's sum has one order.
#pragma once
#include <cstddef>

namespace flashpair::onchip {

#ifndef ONCHIP_THREADS
#define ONCHIP_THREADS 256
#endif
constexpr int THREADS = ONCHIP_THREADS, LANES = 32, WARPS = THREADS / LANES;
constexpr int MAX_GROUPS = 16;  // groups of threads that share a product's inner axis

// Four neighbouring numbers, moved at once.
template <class T>
struct alignas(16) Quad {
  T v[4];
};

// How many groups of threads share the inner axis, where there are fewer columns than threads.
__device__ inline int groups_of(int columns, int inner) {
  return max(1, min(min(THREADS / max(columns / 4, 1), MAX_GROUPS), inner / 4));
}

// Loads one quad of columns of b (inner, columns), DEPTH strips of four of the inner axis at once, so that many loads
// are in flight.
template <class T, int DEPTH>
__device__ void load_strips(Quad<T> (&right)[4 * DEPTH], const Quad<T>* b, int quads, int strip) {
#pragma unroll
  for (int k = 0; k < 4 * DEPTH; ++k) right[k] = b[size_t(4 * strip + k) * quads];
}

// sum (ROWS, 4) += a (ROWS, inner) b, over those strips.
template <class T, int ROWS, int DEPTH>
__device__ void add_strips(T (&sum)[ROWS][4], const T* a, int inner, const Quad<T> (&right)[4 * DEPTH], int strip) {
#pragma unroll
  for (int s = 0; s < DEPTH; ++s)
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      const Quad<T> left = *reinterpret_cast<const Quad<T>*>(a + r * inner + 4 * (strip + s));
#pragma unroll
      for (int k = 0; k < 4; ++k)
#pragma unroll
        for (int c = 0; c < 4; ++c) sum[r][c] += left.v[k] * right[4 * s + k].v[c];
    }
}

// out (ROWS, columns) = a (ROWS, inner) b (inner, columns), by all threads of a block; a and out in shared memory,
// inner and columns are multiples of four. A thread owns four columns and its group's part of the inner axis; the
// groups add their sums one after the other. The order of an entry's sum depends on inner and groups alone, so that
// z_ij and z_ji have the same bits. Ends with a barrier, if there are columns.
template <class T, int ROWS>
__device__ void product(const T* a, const T* b, int inner, int columns, int groups, T* out) {
  constexpr int DEPTH = (ROWS <= 2 ? 4 : 2) * sizeof(float) / sizeof(T);
  constexpr bool AHEAD = ROWS * sizeof(T) <= 64;  // where registers suffice, load the next strips before these are used
  const int quads = columns / 4, strips = inner / 4, span = groups > 1 ? max(quads, 1) : THREADS;
  const int group = threadIdx.x / span, end = strips * (group + 1) / groups;
  for (int base = 0; base < quads; base += span) {
    const int quad = base + threadIdx.x % span;
    const bool busy = group < groups && quad < quads;
    // 1. The thread's sums over its part of the inner axis.
    T sum[ROWS][4] = {};
    const Quad<T>* from = reinterpret_cast<const Quad<T>*>(b) + quad;
    int strip = busy ? strips * group / groups : end;
    Quad<T> right[4 * DEPTH];
    if (AHEAD && strip + DEPTH <= end) load_strips<T, DEPTH>(right, from, quads, strip);
    for (; strip + DEPTH <= end; strip += DEPTH) {
      Quad<T> ahead[4 * DEPTH];
      if (!AHEAD) load_strips<T, DEPTH>(right, from, quads, strip);
      if (AHEAD && strip + 2 * DEPTH <= end) load_strips<T, DEPTH>(ahead, from, quads, strip + DEPTH);
      add_strips<T, ROWS, DEPTH>(sum, a, inner, right, strip);
#pragma unroll
      for (int k = 0; AHEAD && k < 4 * DEPTH; ++k) right[k] = ahead[k];
    }
    for (; strip < end; ++strip) {
      Quad<T> last[4];
      load_strips<T, 1>(last, from, quads, strip);
      add_strips<T, ROWS, 1>(sum, a, inner, last, strip);
    }
    // 2. The groups' sums, added to `out` one group after the other.
    for (int turn = 0; turn < groups; ++turn) {
      if (busy && turn == group) {
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
          Quad<T>* to = reinterpret_cast<Quad<T>*>(out + r * columns) + quad;
          Quad<T> total;
#pragma unroll
          for (int c = 0; c < 4; ++c) total.v[c] = turn ? to->v[c] + sum[r][c] : sum[r][c];
          *to = total;
        }
      }
      __syncthreads();
    }
  }
}

}  // namespace flashpair::onchip
