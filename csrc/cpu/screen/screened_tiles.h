// The forward pass over tiles that are screened first, and when a screen does not pay.
//
// A screen (screen.h) proves most pairs of a tile irrelevant; the candidates that are left are computed exactly. A tile
// with many candidates is computed in full.
// Never stored: similarities, beside those of candidates. Deterministic: as pass.h.
#pragma once
#include <atomic>
#include <utility>

#include "cpu/tile/tiles.h"
#include "screen.h"

namespace flashpair {

// Kept pairs of all tiles: count (slots,), entry (slots, capacity), z (slots, capacity). Where count is -1 the tile's
// pairs are not listed, and backward visits the tile.
template <class T>
struct KeptLists {
  int32_t *count, *entry;
  T* z;
  int64_t capacity;
  KeptPairs<T> at(int64_t slot) const { return {entry + slot * capacity, z + slot * capacity, capacity}; }
};

// What the screens of a pass did: how many tiles were screened, how many of these were computed in full after all, and
// the other tiles' candidates. Where pairs are kept for backward, also all pairs of these tiles, and those kept.
struct Tally {
  std::atomic<int64_t> tiles{0}, full{0}, pairs{0}, candidates{0}, kept{0};
};

// What a pass needs to screen.
struct Screening {
  const Int8Kernels* int8 = nullptr;               // null: nothing is screened
  std::shared_ptr<const Int8Rows> refs = nullptr;  // the references' int8 rows where they are at hand
  Tally* tally = nullptr;
};

constexpr int64_t CANDIDATES_PAY = 12;  // one candidate in so many pairs of a tile: more cost as much as the full tile

template <class T>
class ScreenedTiles {
 public:
  ScreenedTiles(const Screening& s, const Kernels<T>& kernels, const Problem<T>& p, const T* x, const T* y, int64_t d,
                const Grid& grid, int threads)
      : kernels_(kernels),
        p_(p),
        x_(x),
        y_(y),
        d_(d),
        grid_(grid),
        screen_(*s.int8, p, x, y, d, threads, s.refs),
        tally_(*s.tally) {}

  // Takes one stage's reductions, those of each lane. Returns whether a screen pays for them: it does where at least
  // one tile in SPARSE_TILES has few candidates, because the others stop early. It looks at some tiles off the
  // diagonal, spread over the grid.
  bool begin_stage(const std::vector<std::vector<Reduction<T>>>& by_lane) {
    screen_.set_reductions(by_lane);
    weighted_.clear();
    for (const Reduction<T>& r : by_lane[0])
      if (r.op == LOGSUMEXP || r.op == SUM) weighted_.push_back(r);
    if (screen_.narrows()) return true;  // there is nothing to look at before the first extremes
    const int64_t first = p_.square ? grid_.row_blocks() : 0, tiles = grid_.count() - first;
    const int64_t samples = std::min(SAMPLES, (tiles + 15) / 16);
    std::vector<int32_t> entry(samples ? capacity() : 0);
    int64_t seen = 0, sparse = 0;
    for (int64_t k = 0; k < samples; ++k) {
      TileIndex index;
      if (!grid_.index(first + k * tiles / samples, index)) continue;
      sparse += screen_.candidates(grid_.tile<T>(index, nullptr), index.lane, entry.data(), capacity()) >= 0;
      ++seen;
    }
    return sparse * SPARSE_TILES >= seen;
  }

  // Accumulates the tile's candidates into `reductions` and lists those that windows let through. Returns false, with
  // nothing done, where they are too many. scratch: as large as the tile.
  bool reduce(const std::vector<Reduction<T>>& reductions, const Tile<T>& t, const TileIndex& index, T* scratch,
              const KeptLists<T>& kept) {
    int32_t* entry = reinterpret_cast<int32_t*>(scratch);
    const int64_t num_candidates = screen_.candidates(t, index.lane, entry, capacity());
    ++tally_.tiles, ++tally_.full;
    if (num_candidates < 0) return false;
    kernels_.candidate_similarities(p_, t, entry, num_candidates, x_, y_, d_, t.z);
    const Candidates<T> pairs{entry, t.z, num_candidates};
    if (kept.count && !weighted_.empty()) {
      const int64_t slot = grid_.slot(index), count = static_cast<int64_t>(weighted_.size());
      const int64_t listed =
          kernels_.list_kept_candidates(weighted_.data(), static_cast<int>(count), t, pairs, kept.at(slot));
      if (listed < 0) return false;
      kept.count[slot] = static_cast<int32_t>(listed);
      tally_.kept += listed, tally_.pairs += t.rows * t.cols;
    }
    for (const Reduction<T>& r : reductions) kernels_.reduce_candidates(p_, r, t, pairs);
    --tally_.full, tally_.candidates += num_candidates;
    return true;
  }

  // To be called after each tile, screened or full.
  void update(const Tile<T>& t, const TileIndex& index) { screen_.update(t, index.lane); }

 private:
  static constexpr int64_t SAMPLES = 8, SPARSE_TILES = 4;

  int64_t capacity() const { return grid_.size * grid_.size / CANDIDATES_PAY; }

  const Kernels<T>& kernels_;
  const Problem<T>& p_;
  const T *x_, *y_;
  int64_t d_;
  const Grid& grid_;
  Screen<T> screen_;
  std::vector<Reduction<T>> weighted_;  // those whose pairs have a weight in backward
  Tally& tally_;
};

}  // namespace flashpair
