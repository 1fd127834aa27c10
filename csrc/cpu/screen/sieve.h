// A pass' forward over the pairs that a screen leaves of each tile, and when that does not pay.
#pragma once
#include <atomic>
#include <utility>

#include "cpu/tile/tiles.h"
#include "screen.h"

namespace flashpair {

// The lists of live pairs: (slots,), (slots, capacity), (slots, capacity). A count of -1: the tile is not listed.
template <class T>
struct LiveLists {
  int32_t *count, *entry;
  T* z;
  int64_t capacity;
  Live<T> at(int64_t slot) const { return {entry + slot * capacity, z + slot * capacity, capacity}; }
};

// What screens did: tiles looked at, those computed whole after all, and of the others the pairs not proved dead; and
// where pairs are listed for backward, all pairs of these and those listed.
struct Tally {
  std::atomic<int64_t> tiles{0}, whole{0}, pairs{0}, candidates{0}, live{0};
};

// What a pass needs to screen: refs, the references' rows where they were rounded before.
struct Screening {
  const Int8Kernels* int8 = nullptr;  // null: nothing is screened
  std::shared_ptr<const Int8Rows> refs = nullptr;
  Tally* tally = nullptr;
};

constexpr int64_t MOST_CANDIDATES = 12;  // one in so many pairs of a tile: more cost as much as all

template <class T>
class Sieve {
 public:
  Sieve(const Screening& s, const Kernels<T>& kernels, const Problem<T>& p, const T* x, const T* y, int64_t d,
        const Grid& grid, int threads)
      : kernels_(kernels),
        p_(p),
        x_(x),
        y_(y),
        d_(d),
        grid_(grid),
        screen_(*s.int8, p, x, y, d, threads, s.refs),
        tally_(*s.tally) {}

  // One stage's reductions from now on. False where a screen does not pay, as it does if few pairs live in a part of
  // the tiles alone: the others it leaves early. A look at some tiles off the diagonal, spread over the grid.
  bool begin(const std::vector<std::vector<Reduction<T>>>& by_lane) {
    screen_.want(by_lane);
    weighing_.clear();
    for (const Reduction<T>& r : by_lane[0])
      if (r.op == LOGSUMEXP || r.op == SUM) weighing_.push_back(r);
    if (screen_.running()) return true;  // which has nothing to go by yet
    const int64_t first = p_.square ? grid_.row_blocks() : 0, tiles = grid_.count() - first;
    const int64_t samples = std::min(SAMPLES, (tiles + 15) / 16);
    std::vector<int32_t> entry(samples ? capacity() : 0);
    int64_t seen = 0, few = 0;
    for (int64_t k = 0; k < samples; ++k) {
      Place place;
      if (!grid_.at(first + k * tiles / samples, place)) continue;
      few += screen_.candidates(grid_.tile<T>(place, nullptr), place.lane, entry.data(), capacity()) >= 0;
      ++seen;
    }
    return few * ENOUGH >= seen;
  }

  // Folds the tile's surviving pairs into `reductions`, and lists those that weigh; false, with nothing done, when they
  // are too many. scratch: as large as the tile.
  bool sift(const std::vector<Reduction<T>>& reductions, const Tile<T>& t, const Place& place, T* scratch,
            const LiveLists<T>& live) {
    int32_t* entry = reinterpret_cast<int32_t*>(scratch);
    const int64_t found = screen_.candidates(t, place.lane, entry, capacity());
    ++tally_.tiles, ++tally_.whole;
    if (found < 0) return false;
    kernels_.similar(p_, t, entry, found, x_, y_, d_, t.z);
    const Listed<T> pairs{entry, t.z, found};
    if (live.count && !weighing_.empty()) {
      const int64_t slot = grid_.slot(place), count = static_cast<int64_t>(weighing_.size());
      const int64_t kept = kernels_.keep_live(weighing_.data(), static_cast<int>(count), t, pairs, live.at(slot));
      if (kept < 0) return false;
      live.count[slot] = static_cast<int32_t>(kept);
      tally_.live += kept, tally_.pairs += t.rows * t.cols;
    }
    for (const Reduction<T>& r : reductions) kernels_.reduce_listed(p_, r, t, pairs);
    --tally_.whole, tally_.candidates += found;
    return true;
  }

  void renew(const Tile<T>& t, const Place& place) { screen_.renew(t, place.lane); }

 private:
  static constexpr int64_t SAMPLES = 8, ENOUGH = 4;  // one tile of so many in which few pairs live

  int64_t capacity() const { return grid_.size * grid_.size / MOST_CANDIDATES; }

  const Kernels<T>& kernels_;
  const Problem<T>& p_;
  const T *x_, *y_;
  int64_t d_;
  const Grid& grid_;
  Screen<T> screen_;
  std::vector<Reduction<T>> weighing_;
  Tally& tally_;
};

}  // namespace flashpair
