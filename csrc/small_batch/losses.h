// What the losses make of a row: from the log-sum-exps of its two sides to its loss and its pairs' weights.
#pragma once
#include <math.h>

#include "job.h"

#ifndef __CUDACC__
#ifndef __device__
#define __device__  // the same code on the host
#endif
#endif

namespace flashpair::whole {

template <class T>
__device__ T softplus(T t) {
  return (t > T(0) ? t : T(0)) + log1p(exp(-fabs(t)));
}

template <class T>
__device__ T sigmoid(T t) {
  return T(1) / (T(1) + exp(-t));
}

// The side whose pairs each give softplus(scale z + log-sum-exp of the other side) (Sohn 2016, eq. 9, and N x M
// batches); NO_PAIR for the losses that are a formula of the two log-sum-exps alone.
__device__ inline int summed_side(int loss) {
  return loss == ONE_VS_ONE ? NEGATIVE : loss == ALL_PAIRS ? POSITIVE : NO_PAIR;
}

// two[side] for a side known at run time only: an index would move the array from registers to memory.
template <class T>
__device__ T pick(const T (&two)[2], int side) {
  return side == POSITIVE ? two[POSITIVE] : two[NEGATIVE];
}

// A job's constants in the numbers that it is computed in: float64 is slow on most GPUs.
template <class T>
struct Formula {
  int loss, averaging;
  bool one_pair, mined;
  T scale[2], shift[2], epsilon;
};

template <class T>
Formula<T> formula_of(const Job& job) {
  const double *scale = job.scale, *shift = job.shift;
  return {job.loss,      job.averaging, job.one_pair, job.mined, {T(scale[0]), T(scale[1])}, {T(shift[0]), T(shift[1])},
          T(job.epsilon)};
}

// z in the direction in which a side's pairs become harder.
template <class T>
__device__ T harder(const Formula<T>& formula, int side, T z) {
  return pick(formula.scale, side) > T(0) ? z : -z;
}

// What an anchor weighs its pairs by. Arrays of two are indexed by Side. A log-sum-exp is scale top + rest: z may be so
// large that the whole has no digits left for the sum, and rounds differently where it is multiplied and added at once.
template <class T>
struct Anchor {
  T top[2];    // z of the hardest of the side's kept pairs, 0 for none
  T rest[2];   // log of their sum of e^(scale (z - top)), inf for none
  T slope[2];  // dL/d lse; of a summed side the factor of each of its pairs
  T bound[2];  // a pair is kept if it is harder than this
};

template <class T>
struct Known : Anchor<T> {
  T lse[2];  // log-sum-exp of scale z over the side's kept pairs, -inf for none
};

// An anchor's row, and what it adds to the batch's totals.
template <class T>
struct Row {
  Known<T> gives;
  T loss;
  T valid;    // 1 if the row has a loss
  T divides;  // what it adds to the average's denominator
};

// scale z + log-sum-exp of the other side. Scales that are each other's opposite take z from a z, not a product of it
// from another.
template <class T>
__device__ T beside_other(const Formula<T>& formula, const Anchor<T>& anchor, int side, T z) {
  const T rest = pick(anchor.rest, 1 - side), scale = pick(formula.scale, 1 - side);
  if (!(rest < T(INFINITY))) return -T(INFINITY);
  return (pick(anchor.top, 1 - side) - z) * scale + rest + (pick(formula.scale, side) + scale) * z;
}

// The sum of both sides' log-sum-exps.
template <class T>
__device__ T both_sides(const Formula<T>& formula, const Anchor<T>& anchor) {
  if (!(anchor.rest[POSITIVE] < T(INFINITY))) return -T(INFINITY);
  return beside_other(formula, anchor, POSITIVE, anchor.top[POSITIVE]) + anchor.rest[POSITIVE];
}

// Completes a row whose lse and bound are set. positives: how many pairs; anchor: the row takes part (one_pair);
// sum, slopes: softplus and its derivative over the summed side, if there is one; together: the sum of both lse.
template <class T>
__device__ void finish_row(const Formula<T>& formula, Row<T>& row, T positives, bool anchor, T sum, T slopes,
                           T together) {
  const T *lse = row.gives.lse, none = -INFINITY;
  const bool both = lse[POSITIVE] > none && lse[NEGATIVE] > none;
  bool valid = both;
  T loss = 0, slope[2] = {0, 0};
  switch (formula.loss) {
    case MULTI_SIMILARITY:  // Wang et al. 2019, eq. 15
      valid = lse[POSITIVE] > none || lse[NEGATIVE] > none;
      for (int side = 0; side < 2; ++side) {
        const T width = fabs(formula.scale[side]), t = lse[side] + formula.shift[side];
        loss += softplus(t) / width;
        slope[side] = sigmoid(t) / width;
      }
      break;
    case LIFTED_STAR:  // Wang et al. 2019, eq. 16
      for (int side = 0; side < 2 && valid; ++side) {
        slope[side] = T(1) / fabs(formula.scale[side]);
        loss += lse[side] * slope[side];
      }
      break;
    case LIFTED:  // Hermans et al. 2017, eq. 7; Wang et al. 2019, eq. 6
      if (valid) loss = together + formula.shift[POSITIVE];
      loss = loss > T(0) ? loss : T(0);
      slope[POSITIVE] = slope[NEGATIVE] = loss > T(0);
      break;
    case N_PAIR:  // Sohn 2016, eq. 8; the positives' log-sum-exp is -z of the one positive
      valid = anchor;
      if (anchor) {
        loss = softplus(together);
        slope[POSITIVE] = slope[NEGATIVE] = sigmoid(together);
      }
      break;
    case ONE_VS_ONE:  // Sohn 2016, eq. 9
      valid = anchor;
      loss = sum, slope[POSITIVE] = slopes, slope[NEGATIVE] = 1;
      break;
    case ALL_PAIRS:
      valid = positives > T(0);
      loss = sum, slope[POSITIVE] = 1, slope[NEGATIVE] = slopes;
      break;
  }
  if (formula.averaging == NONZERO && loss <= T(0)) loss = slope[POSITIVE] = slope[NEGATIVE] = 0;
  T divides = valid;
  if (formula.averaging == NONZERO) divides = !(loss <= T(0));
  if (formula.averaging == MEAN && formula.loss == ALL_PAIRS) divides = positives;
  if (formula.averaging == MEAN && !formula.one_pair && formula.loss != ALL_PAIRS) divides = 1;
  row.loss = loss, row.valid = valid, row.divides = divides;
  row.gives.slope[POSITIVE] = slope[POSITIVE], row.gives.slope[NEGATIVE] = slope[NEGATIVE];
}

template <class T>
__device__ void finish_row(const Formula<T>& formula, Row<T>& row, T positives, bool anchor, T sum, T slopes) {
  const T together = row.gives.lse[POSITIVE] + row.gives.lse[NEGATIVE];
  finish_row(formula, row, positives, anchor, sum, slopes, together);
}

// dL_row/dz of a pair of the anchor's (General Pair Weighting, Wang et al. 2019, eq. 3).
template <class T>
__device__ T pair_weight(const Formula<T>& formula, const Anchor<T>& anchor, int side, T z) {
  if (side == NO_PAIR) return 0;  // such an anchor may not be there
  const T scale = pick(formula.scale, side), slope = pick(anchor.slope, side);
  if (slope == T(0)) return 0;
  if (side == summed_side(formula.loss)) return slope * scale * sigmoid(beside_other(formula, anchor, side, z));
  if (!(harder(formula, side, z) > pick(anchor.bound, side))) return 0;
  return slope * scale * exp((z - pick(anchor.top, side)) * scale - pick(anchor.rest, side));
}

}  // namespace flashpair::whole
