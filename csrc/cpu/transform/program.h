// A transform that is not built in: its steps, taken one after the other for a vector of pairs.
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

// e^x up to infinity, which simd.h's stays under.
template <class T>
INLINE Vec<T> whole_exp(Vec<T> x) {
  const Vec<T> half = exp(x * T(0.5));
  return x > T(80) ? half * half : exp(x);
}
// e^x - 1 to the last bit of small x: (u - 1) x / log(u), u = e^x, whose errors cancel.
template <class T>
INLINE Vec<T> expm1(Vec<T> x) {
  const Vec<T> u = whole_exp<T>(x), less = u - T(1);
  return u == T(1) ? x : (u > T(0)) & (u < INF<T>) ? less * (x / log<T>(u)) : less;
}

// The first `count` numbers of the program.
template <class T>
void run_steps(const Program& program, int count, Vec<T> s, Vec<T> own, Vec<T>* number) {
  using V = Vec<T>;
  const Step* step = program.steps.data();
  for (int k = 0; k < count; ++k) {
    const V a = number[step[k].a], b = number[step[k].b];
    switch (step[k].op) {
      case SCALED:
        number[k] = s;
        break;
      case OWN:
        number[k] = own;
        break;
      case CONSTANT:
        number[k] = splat(static_cast<T>(step[k].constant));
        break;
      case ADD:
        number[k] = a + b;
        break;
      case SUBTRACT:
        number[k] = a - b;
        break;
      case MULTIPLY:
        number[k] = a * b;
        break;
      case DIVIDE:
        number[k] = a / b;
        break;
      case MAXIMUM:
        number[k] = (a > b) | (a != a) ? a : b;
        break;
      case MINIMUM:
        number[k] = (a < b) | (a != a) ? a : b;
        break;
      case NEGATE:
        number[k] = -a;
        break;
      case EXP:
        number[k] = whole_exp<T>(a);
        break;
      case LOG:
        number[k] = log<T>(a);
        break;
      case LOG1P:
        number[k] = log1p<T>(a);
        break;
      case SQRT:
        number[k] = square_root<T>(a);
        break;
      case SOFTPLUS_OF:
        number[k] = softplus<T>(a);
        break;
      case SIGMOID:
        number[k] = sigmoid<T>(a);
        break;
      case ABSOLUTE:
        number[k] = absolute<T>(a);
        break;
      case ABOVE:
        number[k] = a > b ? splat(T(1)) : V{};
        break;
      case EXPM1:
        number[k] = expm1<T>(a);
        break;
      case CHOOSE:
        number[k] = number[step[k].c] > T(0) ? a : b;
        break;
    }
  }
}

struct Programmed {
  const Program* program;
  template <class T>
  Vec<T> value(Vec<T> s, Vec<T> own, Vec<T>) const {
    Vec<T> number[MAX_STEPS];
    number[0] = Vec<T>{};
    run_steps<T>(*program, program->value + 1, s, own, number);
    return number[program->value];
  }
  template <class T>
  Vec<T> slope(Vec<T> s, Vec<T> own, Vec<T>, Vec<T>& own_slope, Vec<T>& ref_slope) const {
    Vec<T> number[MAX_STEPS];
    number[0] = Vec<T>{};
    run_steps<T>(*program, static_cast<int>(program->steps.size()), s, own, number);
    own_slope = number[program->own_slope];
    ref_slope = Vec<T>{};
    return number[program->slope];
  }
};

}  // namespace
}  // namespace flashpair
