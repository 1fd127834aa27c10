// The workspace of `onchip` in global memory: what its blocks leave for each other between phases.
#pragma once
#include "../small_batch/losses.h"
#include "onchip.h"

namespace flashpair::onchip {

inline int round_up(int value) { return (value + 3) / 4 * 4; }
__host__ __device__ inline int blocks_of(int count, int rows) { return (count + rows - 1) / rows; }
__host__ __device__ inline int anchor_blocks_of(int n, int rows) { return n > rows ? blocks_of(n, rows) : 1; }

// Anchors or references as phase 1 leaves them; padded with zeros to multiples of four rows and columns.
template <class T>
struct Set {
  const void* raw;
  const int64_t* labels;
  int count, padded;
  T *rows, *columns;                    // (padded, width) and its transpose
  T *square, *inverse, *poison, *role;  // (padded,): |row|^2, 1 / norm, 0 or NaN, and with one_pair who takes part
};
enum Role : int { NO_ROLE, ANCHOR, REFERENCE };

// The workspace: the anchors' and the references' Set (the same one in a square problem), and the numbers of the
// anchors' Row as vectors (padded,).
enum Vector : int {
  LOSS,
  VALID,
  DIVIDES,
  TOP,
  REST = TOP + 2,
  SLOPE = REST + 2,
  BOUND = SLOPE + 2,
  VECTORS = BOUND + 2
};

template <class T>
struct Work {
  Set<T> anchors, refs;
  Formula<T> formula;
  int width;  // round_up(D)
  T* row;
  __device__ T& of(int vector, int i) const { return row[size_t(vector) * anchors.padded + i]; }
  __device__ Anchor<T> anchor(int i) const {
    auto two = [&](int vector, T(&to)[2]) { to[0] = of(vector, i), to[1] = of(vector + 1, i); };
    Anchor<T> found;
    two(TOP, found.top), two(REST, found.rest), two(SLOPE, found.slope), two(BOUND, found.bound);
    return found;
  }
};

// Returns how many numbers of T the workspace holds.
template <class T>
int64_t divide_workspace(const Job& job, const Tensors& at, Work<T>& work) {
  T *const begin = static_cast<T*>(at.workspace), *next = begin;
  work.formula = formula_of<T>(job);
  work.width = round_up(job.d);
  auto take = [&](int64_t numbers) { return next += numbers, next - numbers; };
  auto place = [&](const void* raw, const int64_t* labels, int count) {
    const int padded = round_up(count);
    const int64_t matrix = int64_t(padded) * work.width;
    T *rows = take(matrix), *columns = take(matrix);
    T *square = take(padded), *inverse = take(padded), *poison = take(padded), *role = take(padded);
    return Set<T>{raw, labels, count, padded, rows, columns, square, inverse, poison, role};
  };
  work.anchors = place(at.x, at.labels, job.n);
  work.refs = job.square ? work.anchors : place(at.y, at.ref_labels, job.m);
  work.row = take(int64_t(VECTORS) * work.anchors.padded);
  return next - begin;
}

}  // namespace flashpair::onchip
