// The built-in transforms phi(s; offset, ref_offset) of s = scale * z, the anchor's offset and the reference's offset.
//
// Each has phi's value, and its slope in s together with the slopes in the two offsets. They store nothing. A new one
// is one struct here, its word in core/reduction.py, and its line in the reference.
#pragma once
#include "cpu/types.h"
#include "program.h"

namespace flashpair {
namespace {

struct Identity {
  template <class T>
  static INLINE Vec<T> value(Vec<T> s, Vec<T> offset, Vec<T>) {
    return s + offset;
  }
  // The derivative in s, and those in the two offsets.
  template <class T>
  static INLINE Vec<T> slope(Vec<T>, Vec<T>, Vec<T>, Vec<T>& d_offset, Vec<T>& d_ref_offset) {
    d_ref_offset = Vec<T>{};
    return d_offset = splat(T(1));
  }
};

struct Softplus {
  template <class T>
  static INLINE Vec<T> value(Vec<T> s, Vec<T> offset, Vec<T>) {
    return softplus<T>(s + offset);
  }
  template <class T>
  static INLINE Vec<T> slope(Vec<T> s, Vec<T> offset, Vec<T>, Vec<T>& d_offset, Vec<T>& d_ref_offset) {
    d_ref_offset = Vec<T>{};
    return d_offset = sigmoid<T>(s + offset);
  }
};

struct Hinge {
  template <class T>
  static INLINE Vec<T> value(Vec<T> s, Vec<T> offset, Vec<T>) {
    const Vec<T> t = s + offset;
    return t < T(0) ? Vec<T>{} : t;
  }
  template <class T>
  static INLINE Vec<T> slope(Vec<T> s, Vec<T> offset, Vec<T>, Vec<T>& d_offset, Vec<T>& d_ref_offset) {
    d_ref_offset = Vec<T>{};
    const Vec<T> t = s + offset;
    return d_offset = t > T(0) ? splat(T(1)) : Vec<T>{};
  }
};

struct SquaredHinge {
  template <class T>
  static INLINE Vec<T> value(Vec<T> s, Vec<T> offset, Vec<T> ref_offset) {
    const Vec<T> h = Hinge::value<T>(s, offset, ref_offset);
    return h * h;
  }
  template <class T>
  static INLINE Vec<T> slope(Vec<T> s, Vec<T> offset, Vec<T> ref_offset, Vec<T>& d_offset, Vec<T>& d_ref_offset) {
    d_ref_offset = Vec<T>{};
    return d_offset = T(2) * Hinge::value<T>(s, offset, ref_offset);
  }
};

struct Triangle {
  template <class T>
  static INLINE Vec<T> value(Vec<T> s, Vec<T> offset, Vec<T>) {
    const Vec<T> height = T(1) - absolute<T>(s + offset);
    return height < T(0) ? Vec<T>{} : height;
  }
  template <class T>
  static INLINE Vec<T> slope(Vec<T> s, Vec<T> offset, Vec<T>, Vec<T>& d_offset, Vec<T>& d_ref_offset) {
    d_ref_offset = Vec<T>{};
    const Vec<T> t = s + offset;
    const Vec<T> slope = t > T(0) ? splat(T(-1)) : t < T(0) ? splat(T(1)) : Vec<T>{};
    return d_offset = absolute<T>(t) < T(1) ? slope : Vec<T>{};
  }
};

// max(0, s + logaddexp(offset, ref_offset))^2. Where both offsets are -inf (no negatives) it is 0 with gradient 0.
struct Lifted {
  template <class T>
  static INLINE Vec<T> hinge(Vec<T> s, Vec<T> offset, Vec<T> ref_offset) {
    const Vec<T> high = maximum<T>(offset, ref_offset), low = minimum<T>(offset, ref_offset);
    const Vec<T> log_sum = high > -INF<T> ? high + log1p_unit<T>(exp(low - high)) : high;
    const Vec<T> t = s + log_sum;
    return t < T(0) ? Vec<T>{} : t;
  }
  template <class T>
  static INLINE Vec<T> value(Vec<T> s, Vec<T> offset, Vec<T> ref_offset) {
    const Vec<T> h = hinge<T>(s, offset, ref_offset);
    return h * h;
  }
  template <class T>
  static INLINE Vec<T> slope(Vec<T> s, Vec<T> offset, Vec<T> ref_offset, Vec<T>& d_offset, Vec<T>& d_ref_offset) {
    const Vec<T> h = hinge<T>(s, offset, ref_offset),
                 offset_share = h > T(0) ? sigmoid<T>(offset - ref_offset) : Vec<T>{};
    d_offset = T(2) * h * offset_share;
    d_ref_offset = T(2) * h * (T(1) - offset_share);
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
      return f(StepTransform{r.program});
    default:
      return f(Identity{});
  }
}

}  // namespace
}  // namespace flashpair
