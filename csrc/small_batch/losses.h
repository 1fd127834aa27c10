// What the losses make of a row: from the log-sum-exps of its two sides to its loss and its pairs' weights.
//
// One copy for the host and for CUDA. Keeps a few numbers a row; never stores anything of a pair.
#pragma once
#include <math.h>

#include "spec.h"

#ifndef __CUDACC__
#ifndef __device__
#define __device__  // the same code on the host
#endif
#endif

namespace flashpair::small_batch {

template <class T>
__device__ T softplus(T t) {
  return (t > T(0) ? t : T(0)) + log1p(exp(-fabs(t)));
}

template <class T>
__device__ T sigmoid(T t) {
  return T(1) / (T(1) + exp(-t));
}

// The summed side: the one whose pairs each give softplus(scale z + log-sum-exp of the other side) (Sohn 2016, eq. 9,
// and N x M batches). NO_PAIR for the losses that are a formula of the two log-sum-exps alone.
__device__ inline int summed_side(int loss) {
  return loss == ONE_VS_ONE ? NEGATIVE : loss == ALL_PAIRS ? POSITIVE : NO_PAIR;
}

// two[side] for a side known at run time only: an index would move the array from registers to memory.
template <class T>
__device__ T pick(const T (&two)[2], int side) {
  return side == POSITIVE ? two[POSITIVE] : two[NEGATIVE];
}

// A spec's constants in the type that the rows are computed in: float64 is slow on most GPUs.
template <class T>
struct Formula {
  int loss, averaging;
  bool one_pair, mined;
  T scale[2], shift[2], epsilon;
};

template <class T>
Formula<T> formula_of(const Spec& spec) {
  const double *scale = spec.scale, *shift = spec.shift;
  return {spec.loss,
          spec.averaging,
          spec.one_pair,
          spec.mined,
          {T(scale[POSITIVE]), T(scale[NEGATIVE])},
          {T(shift[POSITIVE]), T(shift[NEGATIVE])},
          T(spec.epsilon)};
}

// z in the direction in which a side's pairs become harder.
template <class T>
__device__ T hardness(const Formula<T>& formula, int side, T z) {
  return pick(formula.scale, side) > T(0) ? z : -z;
}

// What the weights of an anchor's pairs are computed from. Arrays of two are indexed by Side. A log-sum-exp is kept as
// scale top_z + log_sum: z may be so large that the total has no digits left for the sum, and rounds differently where
// the multiplication is fused with the addition.
template <class T>
struct Anchor {
  T top_z[2];    // z of the hardest of the side's kept pairs, 0 for none
  T log_sum[2];  // log of their sum of e^(scale (z - top_z)), inf for none
  T slope[2];    // dL/d lse; of a summed side the factor of each of its pairs
  T bound[2];    // a pair is kept where its hardness is above this
};

template <class T>
struct AnchorWithLse : Anchor<T> {
  T lse[2];  // log-sum-exp of scale z over the side's kept pairs, -inf for none
};

// An anchor's row, and what it adds to the batch's totals.
template <class T>
struct Row {
  AnchorWithLse<T> anchor;
  T loss;
  T valid;        // 1 where the row has a loss
  T denominator;  // what it adds to the average's denominator
};

// scale z + log-sum-exp of the other side. Where the scales are each other's opposite, it takes z from a z, not a
// product of z from another.
template <class T>
__device__ T plus_other_lse(const Formula<T>& formula, const Anchor<T>& anchor, int side, T z) {
  const T log_sum = pick(anchor.log_sum, 1 - side), scale = pick(formula.scale, 1 - side);
  if (!(log_sum < T(INFINITY))) return -T(INFINITY);
  return (pick(anchor.top_z, 1 - side) - z) * scale + log_sum + (pick(formula.scale, side) + scale) * z;
}

// The sum of both sides' log-sum-exps.
template <class T>
__device__ T sum_of_lses(const Formula<T>& formula, const Anchor<T>& anchor) {
  if (!(anchor.log_sum[POSITIVE] < T(INFINITY))) return -T(INFINITY);
  return plus_other_lse(formula, anchor, POSITIVE, anchor.top_z[POSITIVE]) + anchor.log_sum[POSITIVE];
}

// Completes a row whose lse and bound are set.
// positives: how many pairs the row has; takes_part: the row is its class's anchor (one_pair); sum, slopes: softplus
// and its derivative over the summed side, if there is one; lse_sum: the sum of both lse.
template <class T>
__device__ void finish_row(const Formula<T>& formula, Row<T>& row, T positives, bool takes_part, T sum, T slopes,
                           T lse_sum) {
  const T *lse = row.anchor.lse, none = -INFINITY;
  const bool both = lse[POSITIVE] > none && lse[NEGATIVE] > none;
  bool valid = both;
  T loss = 0, slope[2] = {0, 0};
  // 1. The row's loss and its derivatives in the two log-sum-exps.
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
      if (valid) loss = lse_sum + formula.shift[POSITIVE];
      loss = loss > T(0) ? loss : T(0);
      slope[POSITIVE] = slope[NEGATIVE] = loss > T(0);
      break;
    case N_PAIR:  // Sohn 2016, eq. 8; the positives' log-sum-exp is -z of the one positive
      valid = takes_part;
      if (takes_part) {
        loss = softplus(lse_sum);
        slope[POSITIVE] = slope[NEGATIVE] = sigmoid(lse_sum);
      }
      break;
    case ONE_VS_ONE:  // Sohn 2016, eq. 9
      valid = takes_part;
      loss = sum, slope[POSITIVE] = slopes, slope[NEGATIVE] = 1;
      break;
    case ALL_PAIRS:
      valid = positives > T(0);
      loss = sum, slope[POSITIVE] = 1, slope[NEGATIVE] = slopes;
      break;
  }
  // 2. What it adds to the average.
  if (formula.averaging == NONZERO && loss <= T(0)) loss = slope[POSITIVE] = slope[NEGATIVE] = 0;
  T denominator = valid;
  if (formula.averaging == NONZERO) denominator = !(loss <= T(0));
  if (formula.averaging == MEAN && formula.loss == ALL_PAIRS) denominator = positives;
  if (formula.averaging == MEAN && !formula.one_pair && formula.loss != ALL_PAIRS) denominator = 1;
  row.loss = loss, row.valid = valid, row.denominator = denominator;
  row.anchor.slope[POSITIVE] = slope[POSITIVE], row.anchor.slope[NEGATIVE] = slope[NEGATIVE];
}

template <class T>
__device__ void finish_row(const Formula<T>& formula, Row<T>& row, T positives, bool takes_part, T sum, T slopes) {
  const T lse_sum = row.anchor.lse[POSITIVE] + row.anchor.lse[NEGATIVE];
  finish_row(formula, row, positives, takes_part, sum, slopes, lse_sum);
}

// dL_row/dz of one of the anchor's pairs (General Pair Weighting, Wang et al. 2019, eq. 3).
template <class T>
__device__ T pair_weight(const Formula<T>& formula, const Anchor<T>& anchor, int side, T z) {
  if (side == NO_PAIR) return 0;  // such an anchor may not exist
  const T scale = pick(formula.scale, side), slope = pick(anchor.slope, side);
  if (slope == T(0)) return 0;
  if (side == summed_side(formula.loss)) return slope * scale * sigmoid(plus_other_lse(formula, anchor, side, z));
  if (!(hardness(formula, side, z) > pick(anchor.bound, side))) return 0;
  return slope * scale * exp((z - pick(anchor.top_z, side)) * scale - pick(anchor.log_sum, side));
}

}  // namespace flashpair::small_batch
