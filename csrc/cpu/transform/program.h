// A user's transform: its steps, run one after the other for a vector of pairs.
//
// Stores the steps' values of one vector on the stack. Each step is one operation, so the same program has the same
// bits wherever it is run.
#pragma once
#include "cpu/tile/simd.h"
#include "cpu/types.h"

namespace flashpair {
namespace {

template <class T>
INLINE Vec<T> square_root(Vec<T> x) {
  for (int64_t k = 0; k < WIDTH<T>; ++k) x[k] = sizeof(T) == 4 ? __builtin_sqrtf(x[k]) : __builtin_sqrt(x[k]);
  return x;
}

// e^x that reaches infinity, where simd.h's exp saturates.
template <class T>
INLINE Vec<T> unsaturated_exp(Vec<T> x) {
  const Vec<T> half = exp(x * T(0.5));
  return x > T(80) ? half * half : exp(x);
}
// e^x - 1, accurate to the last bit for small x: (u - 1) x / log(u) with u = e^x, whose errors cancel.
template <class T>
INLINE Vec<T> expm1(Vec<T> x) {
  const Vec<T> u = unsaturated_exp<T>(x), u_minus_1 = u - T(1);
  return u == T(1) ? x : (u > T(0)) & (u < INF<T>) ? u_minus_1 * (x / log<T>(u)) : u_minus_1;
}

// Runs the first `count` steps of the program.
template <class T>
void run_steps(const Program& program, int count, Vec<T> s, Vec<T> offset, Vec<T>* values) {
  using V = Vec<T>;
  const Step* steps = program.steps.data();
  for (int k = 0; k < count; ++k) {
    const V a = values[steps[k].a], b = values[steps[k].b];
    switch (steps[k].op) {
      case SCALED:
        values[k] = s;
        break;
      case OWN:
        values[k] = offset;
        break;
      case CONSTANT:
        values[k] = splat(static_cast<T>(steps[k].constant));
        break;
      case ADD:
        values[k] = a + b;
        break;
      case SUBTRACT:
        values[k] = a - b;
        break;
      case MULTIPLY:
        values[k] = a * b;
        break;
      case DIVIDE:
        values[k] = a / b;
        break;
      case MAXIMUM:
        values[k] = (a > b) | (a != a) ? a : b;
        break;
      case MINIMUM:
        values[k] = (a < b) | (a != a) ? a : b;
        break;
      case NEGATE:
        values[k] = -a;
        break;
      case EXP:
        values[k] = unsaturated_exp<T>(a);
        break;
      case LOG:
        values[k] = log<T>(a);
        break;
      case LOG1P:
        values[k] = log1p<T>(a);
        break;
      case SQRT:
        values[k] = square_root<T>(a);
        break;
      case SOFTPLUS_OF:
        values[k] = softplus<T>(a);
        break;
      case SIGMOID:
        values[k] = sigmoid<T>(a);
        break;
      case ABSOLUTE:
        values[k] = absolute<T>(a);
        break;
      case ABOVE:
        values[k] = a > b ? splat(T(1)) : V{};
        break;
      case EXPM1:
        values[k] = expm1<T>(a);
        break;
      case CHOOSE:
        values[k] = values[steps[k].c] > T(0) ? a : b;
        break;
    }
  }
}

struct StepTransform {
  const Program* program;
  template <class T>
  Vec<T> value(Vec<T> s, Vec<T> offset, Vec<T>) const {
    Vec<T> values[MAX_STEPS];
    values[0] = Vec<T>{};
    run_steps<T>(*program, program->value + 1, s, offset, values);
    return values[program->value];
  }
  template <class T>
  Vec<T> slope(Vec<T> s, Vec<T> offset, Vec<T>, Vec<T>& d_offset, Vec<T>& d_ref_offset) const {
    Vec<T> values[MAX_STEPS];
    values[0] = Vec<T>{};
    run_steps<T>(*program, static_cast<int>(program->steps.size()), s, offset, values);
    d_offset = values[program->d_offset];
    d_ref_offset = Vec<T>{};
    return values[program->slope];
  }
};

}  // namespace
}  // namespace flashpair
