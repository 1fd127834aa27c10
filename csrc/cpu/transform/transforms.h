// The built-in transforms phi(s; own, ref): s = scale * z, own = the anchor's offset, ref = the reference's.
// A new one is one struct here, its word in core/reduction.py, and its line in the reference.
#pragma once
#include "cpu/types.h"
#include "program.h"

namespace flashpair {
namespace {

struct Identity {
  template <class T>
  static INLINE Vec<T> value(Vec<T> s, Vec<T> own, Vec<T>) {
    return s + own;
  }
  // The derivative in s, and those in the two offsets.
  template <class T>
  static INLINE Vec<T> slope(Vec<T>, Vec<T>, Vec<T>, Vec<T>& own_slope, Vec<T>& ref_slope) {
    ref_slope = Vec<T>{};
    return own_slope = splat(T(1));
  }
};

struct Softplus {
  template <class T>
  static INLINE Vec<T> value(Vec<T> s, Vec<T> own, Vec<T>) {
    return softplus<T>(s + own);
  }
  template <class T>
  static INLINE Vec<T> slope(Vec<T> s, Vec<T> own, Vec<T>, Vec<T>& own_slope, Vec<T>& ref_slope) {
    ref_slope = Vec<T>{};
    return own_slope = sigmoid<T>(s + own);
  }
};

struct Hinge {
  template <class T>
  static INLINE Vec<T> value(Vec<T> s, Vec<T> own, Vec<T>) {
    const Vec<T> t = s + own;
    return t < T(0) ? Vec<T>{} : t;
  }
  template <class T>
  static INLINE Vec<T> slope(Vec<T> s, Vec<T> own, Vec<T>, Vec<T>& own_slope, Vec<T>& ref_slope) {
    ref_slope = Vec<T>{};
    const Vec<T> t = s + own;
    return own_slope = t > T(0) ? splat(T(1)) : Vec<T>{};
  }
};

struct SquaredHinge {
  template <class T>
  static INLINE Vec<T> value(Vec<T> s, Vec<T> own, Vec<T> ref) {
    const Vec<T> h = Hinge::value<T>(s, own, ref);
    return h * h;
  }
  template <class T>
  static INLINE Vec<T> slope(Vec<T> s, Vec<T> own, Vec<T> ref, Vec<T>& own_slope, Vec<T>& ref_slope) {
    ref_slope = Vec<T>{};
    return own_slope = T(2) * Hinge::value<T>(s, own, ref);
  }
};

struct Triangle {
  template <class T>
  static INLINE Vec<T> value(Vec<T> s, Vec<T> own, Vec<T>) {
    const Vec<T> rest = T(1) - absolute<T>(s + own);
    return rest < T(0) ? Vec<T>{} : rest;
  }
  template <class T>
  static INLINE Vec<T> slope(Vec<T> s, Vec<T> own, Vec<T>, Vec<T>& own_slope, Vec<T>& ref_slope) {
    ref_slope = Vec<T>{};
    const Vec<T> t = s + own;
    const Vec<T> down = t > T(0) ? splat(T(-1)) : t < T(0) ? splat(T(1)) : Vec<T>{};
    return own_slope = absolute<T>(t) < T(1) ? down : Vec<T>{};
  }
};

// max(0, s + logaddexp(own, ref))^2; both offsets may be -inf (no negatives): 0 with gradient 0.
struct Lifted {
  template <class T>
  static INLINE Vec<T> hinge(Vec<T> s, Vec<T> own, Vec<T> ref) {
    const Vec<T> high = maximum<T>(own, ref), low = minimum<T>(own, ref);
    const Vec<T> reach = high > -INF<T> ? high + log1p_unit<T>(exp(low - high)) : high;
    const Vec<T> t = s + reach;
    return t < T(0) ? Vec<T>{} : t;
  }
  template <class T>
  static INLINE Vec<T> value(Vec<T> s, Vec<T> own, Vec<T> ref) {
    const Vec<T> h = hinge<T>(s, own, ref);
    return h * h;
  }
  template <class T>
  static INLINE Vec<T> slope(Vec<T> s, Vec<T> own, Vec<T> ref, Vec<T>& own_slope, Vec<T>& ref_slope) {
    const Vec<T> h = hinge<T>(s, own, ref), share = h > T(0) ? sigmoid<T>(own - ref) : Vec<T>{};
    own_slope = T(2) * h * share;
    ref_slope = T(2) * h * (T(1) - share);
    return T(2) * h;
  }
};

template <class T, class F>
INLINE void with_transform(const Reduction<T>& r, F&& f) {
  switch (r.transform) {
    case SOFTPLUS:
      return f(Softplus{});
    case HINGE:
      return f(Hinge{});
    case SQUARED_HINGE:
      return f(SquaredHinge{});
    case TRIANGLE:
      return f(Triangle{});
    case LIFTED:
      return f(Lifted{});
    case PROGRAM:
      return f(Programmed{r.program});
    default:
      return f(Identity{});
  }
}

}  // namespace
}  // namespace flashpair
