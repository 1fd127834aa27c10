// The workspace of `onchip` in global memory: what its blocks leave for each other between phases.
//
// O((N + M) D) numbers, and nothing of a pair.
#pragma once
#include "../small_batch/losses.h"
#include "onchip.h"

namespace flashpair::onchip {

inline int round_up(int value) { return (value + 3) / 4 * 4; }
__host__ __device__ inline int blocks_of(int count, int rows) { return (count + rows - 1) / rows; }
__host__ __device__ inline int anchor_blocks_of(int n, int rows) { return n > rows ? blocks_of(n, rows) : 1; }

// Anchors or references as phase 1 leaves them, padded with zeros to multiples of four rows and columns.
template <class T>
struct Samples {
  const void* raw;
  const int64_t* labels;
  int count, padded;
  T *rows, *columns;  // (padded, width) and its transpose
  // (padded,): |row|^2, 1 / norm, 0 or NaN where an entry is not finite, and with one_pair the Role.
  T *sq_norm, *inverse_norm, *nonfinite, *role;
};
enum Role : int { NO_ROLE, ANCHOR, REFERENCE };

// The numbers of an anchor's Row, each a vector (padded,) of the workspace. From TOP_Z on there are two, one a side.
enum Vector : int {
  LOSS,
  VALID,
  DENOMINATOR,
  TOP_Z,
  LOG_SUM = TOP_Z + 2,
  SLOPE = LOG_SUM + 2,
  BOUND = SLOPE + 2,
  VECTORS = BOUND + 2
};

// The workspace: the anchors and the references (the same ones in a square problem), and the anchors' vectors.
template <class T>
struct Work {
  Samples<T> anchors, refs;
  Formula<T> formula;
  int width;  // round_up(D)
  T* vectors;
  __device__ T& value(int vector, int i) const { return vectors[size_t(vector) * anchors.padded + i]; }
  __device__ Anchor<T> anchor(int i) const {
    auto read = [&](int vector, T(&two)[2]) { two[0] = value(vector, i), two[1] = value(vector + 1, i); };
    Anchor<T> anchor;
    read(TOP_Z, anchor.top_z), read(LOG_SUM, anchor.log_sum), read(SLOPE, anchor.slope), read(BOUND, anchor.bound);
    return anchor;
  }
};

// Sets `work` to the workspace's parts. Returns how many numbers of T it holds.
template <class T>
int64_t divide_workspace(const Spec& spec, const Tensors& tensors, Work<T>& work) {
  T *const begin = static_cast<T*>(tensors.workspace), *next = begin;
  work.formula = formula_of<T>(spec);
  work.width = round_up(spec.d);
  auto take = [&](int64_t numbers) { return next += numbers, next - numbers; };
  auto place = [&](const void* raw, const int64_t* labels, int count) {
    const int padded = round_up(count);
    const int64_t matrix = int64_t(padded) * work.width;
    T *rows = take(matrix), *columns = take(matrix);
    T *sq_norm = take(padded), *inverse_norm = take(padded), *nonfinite = take(padded), *role = take(padded);
    return Samples<T>{raw, labels, count, padded, rows, columns, sq_norm, inverse_norm, nonfinite, role};
  };
  work.anchors = place(tensors.x, tensors.labels, spec.n);
  work.refs = spec.square ? work.anchors : place(tensors.y, tensors.ref_labels, spec.m);
  work.vectors = take(int64_t(VECTORS) * work.anchors.padded);
  return next - begin;
}

}  // namespace flashpair::onchip
