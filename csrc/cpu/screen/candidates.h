// Forward over a tile's candidates, the pairs that passed the screen: exact similarities, the mining windows, and the
// rows' reductions.
//
// Never stored: anything of the tile's other pairs. Deterministic: candidates are in the order of their rows. Backward
// is in kept_pairs.h.
#pragma once
#include "kept_pairs.h"

namespace flashpair {
namespace {

// A vector of candidates: their rows, columns and z.
template <class T>
struct CandidateVector {
  int64_t row[WIDTH<T>], column[WIDTH<T>], count;
  Vec<T> z;
  CandidateVector(const Tile<T>& t, const Candidates<T>& pairs, int64_t first) : row{}, column{}, z{} {
    count = pairs.count - first < WIDTH<T> ? pairs.count - first : WIDTH<T>;
    for (int64_t k = 0; k < count; ++k) {
      const int32_t entry = pairs.entry[first + k];
      row[k] = t.r0 + entry_row(entry), column[k] = t.c0 + entry_column(entry);
      z[k] = pairs.z[first + k];
    }
  }
};

template <class T, class F>
INLINE void for_each_vector(const Tile<T>& t, const Candidates<T>& pairs, F&& f) {
  for (int64_t first = 0; first < pairs.count; first += WIDTH<T>) f(CandidateVector<T>(t, pairs, first), first);
}

template <class T>
void candidate_similarities(const Problem<T>& p, const Tile<T>& t, const int32_t* entry, int64_t count, const T* x,
                            const T* y, int64_t d, T* z) {
  constexpr int64_t CHUNK = 256;
  int64_t rows[CHUNK], cols[CHUNK];
  for (int64_t first = 0; first < count; first += CHUNK) {
    const int64_t size = clamp(count - first, 0, CHUNK);
    for (int64_t k = 0; k < size; ++k)
      rows[k] = t.r0 + entry_row(entry[first + k]), cols[k] = t.c0 + entry_column(entry[first + k]);
    pair_similarities(p, x, y, d, size, rows, cols, z + first);
  }
}

template <class T>
int64_t list_kept_candidates(const Reduction<T>* reductions, int count, const Tile<T>& t, const Candidates<T>& pairs,
                             const KeptPairs<T>& kept) {
  int64_t num_kept = 0;
  for_each_vector<T>(t, pairs, [&](const CandidateVector<T>& c, int64_t first) {
    Mask<T> in{};
    for (int k = 0; k < count; ++k) {
      in |= AnchorWindows<T>(reductions[k], c.row, c.count).contains(c.z);
      if (t.symmetric) in |= AnchorWindows<T>(reductions[k], c.column, c.count).contains(c.z);
    }
    for (int64_t k = 0; k < c.count && num_kept >= 0; ++k) {
      if (!in[k]) continue;
      if (num_kept == kept.capacity) {
        num_kept = -1;
        return;
      }
      kept.entry[num_kept] = pairs.entry[first + k];
      kept.z[num_kept++] = c.z[k];
    }
  });
  return num_kept;
}

// logsumexp in two rounds: first every row's maximum, then one exponential for each end of a pair relative to it.
template <class T>
void candidates_logsumexp(const Reduction<T>& r, const Tile<T>& t, const Candidates<T>& pairs) {
  const T direction = r.direction(), steep = r.steepness();
  auto raise_max = [&](int64_t row, T s) {
    if (s > r.row_max[row]) merge(r, r.row_max[row], r.row_sum[row], s, T(0));
  };
  auto add = [&](const int64_t* anchor, const CandidateVector<T>& c, Mask<T> in) {
    Vec<T> max{};
    for (int64_t k = 0; k < c.count; ++k)
      if (in[k]) max[k] = r.row_max[anchor[k]];
    const Vec<T> terms = exp((c.z * direction - max) * steep);
    for (int64_t k = 0; k < c.count; ++k)
      if (in[k]) r.row_sum[anchor[k]] += terms[k];
  };
  auto for_both_ends = [&](auto&& visit) {
    for_each_vector<T>(t, pairs, [&](const CandidateVector<T>& c, int64_t) {
      visit(c.row, c, AnchorWindows<T>(r, c.row, c.count).contains(c.z));
      if (t.mirror) visit(c.column, c, AnchorWindows<T>(r, c.column, c.count).contains(c.z));
    });
  };
  for_both_ends([&](const int64_t* anchor, const CandidateVector<T>& c, Mask<T> in) {
    for (int64_t k = 0; k < c.count; ++k)
      if (in[k]) raise_max(anchor[k], c.z[k] * direction);
  });
  for_both_ends(add);
}

template <class T, class Phi>
void candidates_sum(const Reduction<T>& r, const Tile<T>& t, const Candidates<T>& pairs, const Phi& transform) {
  auto add = [&](const int64_t* anchor, const int64_t* other, const CandidateVector<T>& c) {
    const AnchorWindows<T> windows(r, anchor, c.count);
    Vec<T> ref_offset{};
    for (int64_t k = 0; r.ref_offset && k < c.count; ++k) ref_offset[k] = r.ref_offset[other[k]];
    const Mask<T> in = windows.contains(c.z);
    const Vec<T> phi = transform.template value<T>(c.z * r.scale, windows.offset, ref_offset);
    for (int64_t k = 0; k < c.count; ++k)
      if (in[k]) r.row_sum[anchor[k]] += phi[k];
  };
  for_each_vector<T>(t, pairs, [&](const CandidateVector<T>& c, int64_t) {
    add(c.row, c.column, c);
    if (t.mirror) add(c.column, c.row, c);
  });
}

template <class T>
void candidates_extreme(const Problem<T>& p, const Reduction<T>& r, const Tile<T>& t, const Candidates<T>& pairs) {
  const ExtremeState<T> state(p, r);
  auto update = [&](int64_t row, int64_t other, T z) {
    if (!(z > row_lower(r, row) && z < row_upper(r, row))) return;
    if (state.may_change(row, state.sign * z)) state.update(row, state.sign * z, other);
  };
  for (int64_t k = 0; k < pairs.count; ++k) {
    const int64_t row = t.r0 + entry_row(pairs.entry[k]), column = t.c0 + entry_column(pairs.entry[k]);
    update(row, column, pairs.z[k]);
    if (t.mirror) update(column, row, pairs.z[k]);
  }
}

template <class T>
void reduce_candidates(const Problem<T>& p, const Reduction<T>& r, const Tile<T>& t, const Candidates<T>& pairs) {
  if (r.op == LOGSUMEXP) return candidates_logsumexp(r, t, pairs);
  if (r.op == MIN || r.op == MAX) return candidates_extreme(p, r, t, pairs);
  if (r.op == COUNT) return candidates_sum(r, t, pairs, One{});
  with_transform(r, [&](auto phi) { candidates_sum(r, t, pairs, phi); });
}

}  // namespace
}  // namespace flashpair
