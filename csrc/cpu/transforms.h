// The closed set of transforms phi(s; own, ref): s = scale * z, own = the anchor's offset, ref = the reference's.
// A new transform is one struct here, its word in reduction.py, and its line in the reference.
#pragma once
#include "simd.h"
#include "types.h"

namespace flashpair {
namespace {

struct Identity {
  template <class T>
  static INLINE Vec<T> value(Vec<T> s, Vec<T> own, Vec<T>) {
    return s + own;
  }
  // The derivative in t; own_share and ref_share are how much of it each offset takes.
  template <class T>
  static INLINE Vec<T> slope(Vec<T>, Vec<T>, Vec<T>, Vec<T>& own_share, Vec<T>& ref_share) {
    own_share = splat(T(1));
    ref_share = Vec<T>{};
    return splat(T(1));
  }
};

struct Softplus {
  template <class T>
  static INLINE Vec<T> value(Vec<T> s, Vec<T> own, Vec<T>) {
    return softplus<T>(s + own);
  }
  template <class T>
  static INLINE Vec<T> slope(Vec<T> s, Vec<T> own, Vec<T>, Vec<T>& own_share, Vec<T>& ref_share) {
    own_share = splat(T(1));
    ref_share = Vec<T>{};
    return sigmoid<T>(s + own);
  }
};

struct Hinge {
  template <class T>
  static INLINE Vec<T> value(Vec<T> s, Vec<T> own, Vec<T>) {
    const Vec<T> t = s + own;
    return t < T(0) ? Vec<T>{} : t;
  }
  template <class T>
  static INLINE Vec<T> slope(Vec<T> s, Vec<T> own, Vec<T>, Vec<T>& own_share, Vec<T>& ref_share) {
    own_share = splat(T(1));
    ref_share = Vec<T>{};
    const Vec<T> t = s + own;
    return t > T(0) ? splat(T(1)) : Vec<T>{};
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
  static INLINE Vec<T> slope(Vec<T> s, Vec<T> own, Vec<T> ref, Vec<T>& own_share, Vec<T>& ref_share) {
    const Vec<T> h = hinge<T>(s, own, ref);
    const Mask<T> active = h > T(0);
    own_share = active ? sigmoid<T>(own - ref) : Vec<T>{};
    ref_share = active ? T(1) - own_share : Vec<T>{};
    return T(2) * h;
  }
};

template <class F>
INLINE void with_transform(int transform, F&& f) {
  switch (transform) {
    case SOFTPLUS:
      return f(Softplus{});
    case HINGE:
      return f(Hinge{});
    case LIFTED:
      return f(Lifted{});
    default:
      return f(Identity{});
  }
}

}  // namespace
}  // namespace flashpair
