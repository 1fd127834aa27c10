// Which tiles are visited, in which order. Fixed by the shapes alone.
#pragma once
#include <algorithm>
#include <utility>

#include "cpu/types.h"

namespace flashpair {

struct Place {
  int64_t row_block, col_block, lane;
};

// All N x M pairs in blocks of `size`; of a square problem the upper triangle of blocks, and of one with a split the
// first group's blocks by the second's, which start anew at the split: no block holds rows of both.
// Lanes are copies of the rows' state over disjoint ranges of columns: they keep many threads busy when anchors are
// few.
struct Grid {
  int64_t n, m, size, lanes;
  bool square;
  int64_t split = 0;  // Problem's, of a square one

  int64_t row_end() const { return split ? split : n; }  // of the rows of blocks; their columns start at `split`
  int64_t row_blocks() const { return (row_end() + size - 1) / size; }
  int64_t col_blocks() const { return (m - split + size - 1) / size; }
  bool triangle() const { return square && !split; }
  int64_t lane_width() const { return (col_blocks() + lanes - 1) / lanes; }
  int64_t players() const { return row_blocks() + row_blocks() % 2; }

  int64_t stride() const { return (size + STRIDE - 1) / STRIDE * STRIDE; }  // of a tile's rows
  int64_t area() const { return size * stride(); }

  int64_t count() const {
    if (triangle()) return row_blocks() + (row_blocks() ? (players() - 1) * (players() / 2) : 0);
    return lane_width() * lanes * row_blocks();
  }

  // The k-th tile, false where there is none. Square: the diagonal, then every pair of blocks once, in rounds in which
  // no block plays twice (the circle method). Rectangular: neighbours in the order differ in lane or in column, and,
  // where there are several rows of blocks, in row.
  bool at(int64_t k, Place& p) const {
    const int64_t blocks = row_blocks();
    if (!triangle()) {
      const int64_t i = k % blocks, lane = k / blocks % lanes, step = k / blocks / lanes;
      p = {i, lane * lane_width() + (step + i) % lane_width(), lane};
      return p.col_block < col_blocks();
    }
    if (k < blocks) {
      p = {k, k, 0};
      return true;
    }
    const int64_t games = players() / 2, rounds = players() - 1, turn = (k - blocks) / games,
                  game = (k - blocks) % games;
    const int64_t a = game ? (turn + game) % rounds : rounds, b = (turn + rounds - game) % rounds;
    p = {std::min(a, b), std::max(a, b), 0};
    return p.col_block < blocks;
  }

  template <class T>
  Tile<T> tile(const Place& p, T* z) const {
    const int64_t r0 = p.row_block * size, c0 = split + p.col_block * size;
    const bool mirror = square && r0 != c0;
    return {z, stride(), r0, std::min(size, row_end() - r0), c0, std::min(size, m - c0), square, mirror};
  }

  // Where a tile's list of live pairs is kept.
  int64_t slot(const Place& p) const {
    const int64_t i = p.row_block, j = p.col_block;
    return triangle() ? i * row_blocks() - i * (i - 1) / 2 + j - i : i * col_blocks() + j;
  }
};

constexpr int64_t BAND_ROWS = 16;

// The tiles that hold all positives: for each block of sorted rows, the columns from its first to its last positive.
// The rows of a block are of one group, in which alone the intervals ascend.
template <class T>
struct Band {
  const Problem<T>& p;
  int64_t size, stride;

  static int64_t blocks(int64_t rows) { return (rows + BAND_ROWS - 1) / BAND_ROWS; }
  int64_t count() const { return blocks(p.split) + blocks(p.n - p.split); }
  std::pair<int64_t, int64_t> rows_of(int64_t block) const {  // the first, and how many
    const int64_t before = blocks(p.split);
    const bool second = block >= before;
    const int64_t r0 = second ? p.split + (block - before) * BAND_ROWS : block * BAND_ROWS;
    return {r0, std::min(BAND_ROWS, (second ? p.n : p.split) - r0)};
  }
  int64_t pairs() const {
    int64_t area = 0;
    for (int64_t block = 0; block < count(); ++block) {
      const auto [r0, rows] = rows_of(block);
      area += rows * (p.hi[r0 + rows - 1] - p.lo[r0]);
    }
    return area;
  }
  template <class Visit>
  void visit(int64_t block, T* z, Visit&& f) const {
    const auto [r0, rows] = rows_of(block);
    const int64_t last = p.hi[r0 + rows - 1];
    for (int64_t c0 = p.lo[r0]; c0 < last; c0 += size)
      f(Tile<T>{z, stride, r0, rows, c0, std::min(size, last - c0), p.square, false});
  }
};

}  // namespace flashpair
