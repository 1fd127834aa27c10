// Which tiles are visited, in which order. The shapes alone fix it, so that every run adds in the same order.
#pragma once
#include <algorithm>
#include <utility>

#include "cpu/types.h"

namespace flashpair {

struct TileIndex {
  int64_t row_block, col_block, lane;
};

// All N x M pairs in blocks of `size` rows and columns. Of a square problem the upper triangle of blocks. Of a square
// problem with a split the first group's blocks by the second's, which start anew at the split, so that no block holds
// rows of both.
// lanes: copies of the rows' state, each over its own range of columns. With few anchors they keep many threads busy.
struct Grid {
  int64_t n, m, size, lanes;
  bool square;
  int64_t split = 0;  // Problem's, of a square one

  int64_t row_end() const { return split ? split : n; }  // of the blocks' rows; their columns start at `split`
  int64_t row_blocks() const { return (row_end() + size - 1) / size; }
  int64_t col_blocks() const { return (m - split + size - 1) / size; }
  bool triangle() const { return square && !split; }
  int64_t lane_width() const { return (col_blocks() + lanes - 1) / lanes; }
  int64_t even_blocks() const { return row_blocks() + row_blocks() % 2; }  // as a round-robin needs them

  int64_t stride() const { return (size + STRIDE - 1) / STRIDE * STRIDE; }  // of a tile's rows
  int64_t area() const { return size * stride(); }

  int64_t count() const {
    if (triangle()) return row_blocks() + (row_blocks() ? (even_blocks() - 1) * (even_blocks() / 2) : 0);
    return lane_width() * lanes * row_blocks();
  }

  // Sets `index` to the k-th tile; returns false where there is none. Tiles that follow each other share as few rows as
  // possible, so that threads rarely wait.
  // Triangle: first the diagonal, then a round-robin of blocks (the circle method): each pair of blocks once, in rounds
  // in which no block occurs twice. Rectangle: neighbours in the order differ in lane or in column, and, where there
  // are several rows of blocks, in row.
  bool index(int64_t k, TileIndex& index) const {
    const int64_t blocks = row_blocks();
    if (!triangle()) {
      const int64_t i = k % blocks, lane = k / blocks % lanes, step = k / blocks / lanes;
      index = {i, lane * lane_width() + (step + i) % lane_width(), lane};
      return index.col_block < col_blocks();
    }
    if (k < blocks) {
      index = {k, k, 0};
      return true;
    }
    const int64_t per_round = even_blocks() / 2, rounds = even_blocks() - 1, round = (k - blocks) / per_round,
                  pair = (k - blocks) % per_round;
    const int64_t a = pair ? (round + pair) % rounds : rounds, b = (round + rounds - pair) % rounds;
    index = {std::min(a, b), std::max(a, b), 0};
    return index.col_block < blocks;
  }

  template <class T>
  Tile<T> tile(const TileIndex& index, T* z) const {
    const int64_t r0 = index.row_block * size, c0 = split + index.col_block * size;
    const bool mirror = square && r0 != c0;
    return {z, stride(), r0, std::min(size, row_end() - r0), c0, std::min(size, m - c0), square, mirror};
  }

  // Where a tile's list of kept pairs stands.
  int64_t slot(const TileIndex& index) const {
    const int64_t i = index.row_block, j = index.col_block;
    return triangle() ? i * row_blocks() - i * (i - 1) / 2 + j - i : i * col_blocks() + j;
  }
};

constexpr int64_t POSITIVE_BLOCK_ROWS = 16;

// The tiles that hold all positives: for each block of sorted rows, the columns from its first to its last positive. A
// block's rows are of one group, because intervals ascend within a group only.
template <class T>
struct PositiveTiles {
  const Problem<T>& p;
  int64_t size, stride;

  static int64_t blocks(int64_t rows) { return (rows + POSITIVE_BLOCK_ROWS - 1) / POSITIVE_BLOCK_ROWS; }
  int64_t count() const { return blocks(p.split) + blocks(p.n - p.split); }
  std::pair<int64_t, int64_t> rows_of(int64_t block) const {  // the first row, and how many
    const int64_t before = blocks(p.split);
    const bool second = block >= before;
    const int64_t r0 = second ? p.split + (block - before) * POSITIVE_BLOCK_ROWS : block * POSITIVE_BLOCK_ROWS;
    return {r0, std::min(POSITIVE_BLOCK_ROWS, (second ? p.n : p.split) - r0)};
  }
  int64_t pairs() const {
    int64_t area = 0;
    for (int64_t block = 0; block < count(); ++block) {
      const auto [r0, rows] = rows_of(block);
      area += rows * (p.pos_end[r0 + rows - 1] - p.pos_begin[r0]);
    }
    return area;
  }
  template <class Visit>
  void visit(int64_t block, T* z, Visit&& f) const {
    const auto [r0, rows] = rows_of(block);
    const int64_t last = p.pos_end[r0 + rows - 1];
    for (int64_t c0 = p.pos_begin[r0]; c0 < last; c0 += size)
      f(Tile<T>{z, stride, r0, rows, c0, std::min(size, last - c0), p.square, false});
  }
};

}  // namespace flashpair
