// Forward over the pairs that a screen leaves of a tile: exact similarities, what the windows let through of them, and
// the rows' reductions. Backward is live.h's.
#pragma once
#include "live.h"

namespace flashpair {
namespace {

// The pairs' places, a vector of them at a time.
template <class T>
struct Ends {
  int64_t row[WIDTH<T>], column[WIDTH<T>], count;
  Vec<T> z;
  Ends(const Tile<T>& t, const Listed<T>& pairs, int64_t first) : row{}, column{}, z{} {
    count = pairs.count - first < WIDTH<T> ? pairs.count - first : WIDTH<T>;
    for (int64_t k = 0; k < count; ++k) {
      const int32_t entry = pairs.entry[first + k];
      row[k] = t.r0 + (entry >> 16), column[k] = t.c0 + (entry & 0xffff);
      z[k] = pairs.z[first + k];
    }
  }
};

template <class T, class F>
INLINE void each_vector(const Tile<T>& t, const Listed<T>& pairs, F&& f) {
  for (int64_t first = 0; first < pairs.count; first += WIDTH<T>) f(Ends<T>(t, pairs, first), first);
}

template <class T>
void similar(const Problem<T>& p, const Tile<T>& t, const int32_t* entry, int64_t count, const T* x, const T* y,
             int64_t d, T* z) {
  constexpr int64_t AT_ONCE = 256;
  int64_t rows[AT_ONCE], cols[AT_ONCE];
  for (int64_t first = 0; first < count; first += AT_ONCE) {
    const int64_t some = clamp(count - first, 0, AT_ONCE);
    for (int64_t k = 0; k < some; ++k)
      rows[k] = t.r0 + (entry[first + k] >> 16), cols[k] = t.c0 + (entry[first + k] & 0xffff);
    pair_similarities(p, x, y, d, some, rows, cols, z + first);
  }
}

template <class T>
int64_t keep_live(const Reduction<T>* reductions, int count, const Tile<T>& t, const Listed<T>& pairs,
                  const Live<T>& live) {
  int64_t found = 0;
  each_vector<T>(t, pairs, [&](const Ends<T>& e, int64_t first) {
    Mask<T> in{};
    for (int k = 0; k < count; ++k) {
      in |= EndLanes<T>(reductions[k], e.row, e.count).inside(e.z);
      if (t.symmetric) in |= EndLanes<T>(reductions[k], e.column, e.count).inside(e.z);
    }
    for (int64_t k = 0; k < e.count && found >= 0; ++k) {
      if (!in[k]) continue;
      if (found == live.capacity) {
        found = -1;
        return;
      }
      live.entry[found] = pairs.entry[first + k];
      live.z[found++] = e.z[k];
    }
  });
  return found;
}

// logsumexp: every row's peak first, then one exponential an end relative to it.
template <class T>
void listed_logsumexp(const Reduction<T>& r, const Tile<T>& t, const Listed<T>& pairs) {
  const T direction = r.direction(), steep = r.steepness();
  auto raise = [&](int64_t row, T s) {
    const T old = r.peak[row];
    if (!(s > old)) return;
    r.total[row] *= static_cast<double>(shrunk(r, old, s));
    r.peak[row] = s;
  };
  auto add = [&](const int64_t* of, const Ends<T>& e, Mask<T> in) {
    Vec<T> peak{};
    for (int64_t k = 0; k < e.count; ++k)
      if (in[k]) peak[k] = r.peak[of[k]];
    const Vec<T> terms = exp((e.z * direction - peak) * steep);
    for (int64_t k = 0; k < e.count; ++k)
      if (in[k]) r.total[of[k]] += terms[k];
  };
  auto both_ends = [&](auto&& visit) {
    each_vector<T>(t, pairs, [&](const Ends<T>& e, int64_t) {
      visit(e.row, e, EndLanes<T>(r, e.row, e.count).inside(e.z));
      if (t.mirror) visit(e.column, e, EndLanes<T>(r, e.column, e.count).inside(e.z));
    });
  };
  both_ends([&](const int64_t* of, const Ends<T>& e, Mask<T> in) {
    for (int64_t k = 0; k < e.count; ++k)
      if (in[k]) raise(of[k], e.z[k] * direction);
  });
  both_ends(add);
}

template <class T, class Phi>
void listed_sum(const Reduction<T>& r, const Tile<T>& t, const Listed<T>& pairs, const Phi& transform) {
  auto add = [&](const int64_t* of, const int64_t* other, const Ends<T>& e) {
    const EndLanes<T> lanes(r, of, e.count);
    Vec<T> ref{};
    for (int64_t k = 0; r.ref_offset && k < e.count; ++k) ref[k] = r.ref_offset[other[k]];
    const Mask<T> in = lanes.inside(e.z);
    const Vec<T> phi = transform.template value<T>(e.z * r.scale, lanes.own, ref);
    for (int64_t k = 0; k < e.count; ++k)
      if (in[k]) r.total[of[k]] += phi[k];
  };
  each_vector<T>(t, pairs, [&](const Ends<T>& e, int64_t) {
    add(e.row, e.column, e);
    if (t.mirror) add(e.column, e.row, e);
  });
}

template <class T>
void listed_extreme(const Problem<T>& p, const Reduction<T>& r, const Tile<T>& t, const Listed<T>& pairs) {
  const T sign = r.op == MAX ? T(1) : T(-1);
  auto meet = [&](int64_t row, int64_t other, T z) {
    if (!(z > lower_of(r, row) && z < upper_of(r, row))) return;
    const T now = sign * z, old = sign * r.peak[row];
    if (!(now > old || (r.index && now == old))) return;
    if (r.index && (now > old || r.index[row] < 0 || p.order[other] < p.order[r.index[row]])) r.index[row] = other;
    r.peak[row] = z;
  };
  for (int64_t k = 0; k < pairs.count; ++k) {
    const int64_t row = t.r0 + (pairs.entry[k] >> 16), column = t.c0 + (pairs.entry[k] & 0xffff);
    meet(row, column, pairs.z[k]);
    if (t.mirror) meet(column, row, pairs.z[k]);
  }
}

template <class T>
void reduce_listed(const Problem<T>& p, const Reduction<T>& r, const Tile<T>& t, const Listed<T>& pairs) {
  if (r.op == LOGSUMEXP) return listed_logsumexp(r, t, pairs);
  if (r.op == MIN || r.op == MAX) return listed_extreme(p, r, t, pairs);
  if (r.op == COUNT) return listed_sum(r, t, pairs, One{});
  with_transform(r, [&](auto phi) { listed_sum(r, t, pairs, phi); });
}

}  // namespace
}  // namespace flashpair
