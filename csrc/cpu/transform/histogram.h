// Soft histograms: a run of sums of triangles whose nodes follow each other. One table look-up a pair replaces one sum
// a node.
//
// A pair at u = scale * z + the first node's offset, between nodes p and p + 1, adds 1 - f to p and f to p + 1, with
// f = u - p. In backward its weight is the difference of the two nodes' gradients; exactly on a node it has none.
// Stores one table of nodes a row, and of a mirrored tile one a column. Deterministic: as reduce.h.
#pragma once
#include <new>

#include "cpu/tile/reduce.h"

namespace flashpair {
namespace {

constexpr int MAX_NODES = 256, MIN_NODES = 4;

// How many reductions from the first on are the nodes of one histogram; 0 where a table is not worth it.
template <class T>
int histogram_nodes(const Reduction<T>* r, int count) {
  auto is_node = [](const Reduction<T>& n) {
    const bool plain = !n.offset && !n.lower && !n.upper && !n.grad_scale;
    return plain && n.op == SUM && n.transform == TRIANGLE;
  };
  const T slack = 8 * (sizeof(T) == 4 ? T(1.1920928955078125e-7) : T(2.220446049250313e-16));
  int nodes = 0;
  for (; nodes < count && nodes < MAX_NODES && is_node(r[nodes]); ++nodes) {
    const T expected = r[0].shift - static_cast<T>(nodes), off = r[nodes].shift - expected;
    const T size = (expected < 0 ? -expected : expected) + static_cast<T>(nodes) + T(1);
    if (off > slack * size || off < -slack * size) break;
    if (r[nodes].side != r[0].side || r[nodes].scale != r[0].scale) break;
  }
  return nodes >= MIN_NODES ? nodes : 0;
}

// Zeroed memory for a table, freed at the end. It is no standard container, because code of a container compiled for
// one instruction set could be linked into another.
template <class T>
struct Table {
  T* data;
  explicit Table(int64_t size) : data(static_cast<T*>(::operator new(size * sizeof(T)))) {
    memset(data, 0, size * sizeof(T));
  }
  ~Table() { ::operator delete(data); }
  Table(const Table&) = delete;
};

// The cells of a vector of pairs at s = scale * z: cell p + 1 in [0, nodes], where cell 0 is before the first node, and
// f. Pairs outside of the mask, and of all nodes, have cell -1.
// f is s minus the node, as it is where each node is a sum by itself. u, which may be as large as there are nodes, is
// rounded more and would put pairs close to a node on its other side.
template <class T>
struct Cells {
  typename VecTypes<T>::Int cell[WIDTH<T>];
  T f[WIDTH<T>];
  template <class M>
  INLINE Cells(Vec<T> s, T shift, int nodes, M m) {
    shift += T(1);
    const Vec<T> u = s + shift;  // u + 1 above; truncation is the floor of what is not negative
    const Mask<T> in = (u > T(0)) & (u < T(nodes + 1));
    Mask<T> floor = __builtin_convertvector(in ? u : Vec<T>{}, Mask<T>);
    Vec<T> fraction = s + (shift - __builtin_convertvector(floor, Vec<T>));
    // Where the rounding of u has crossed a node, take the cell beside it.
    const Mask<T> below = fraction < T(0), above = fraction >= T(1);
    floor += below - above;  // a lane of a mask is -1 where it is true
    fraction += (below ? splat(T(1)) : Vec<T>{}) - (above ? splat(T(1)) : Vec<T>{});
    const Mask<T> valid = mask_and<T>(in & (floor >= 0) & (floor <= nodes), m);
    const Mask<T> cells = valid ? floor : Mask<T>{} - 1;
    memcpy(cell, &cells, sizeof cell), memcpy(f, &fraction, sizeof f);
  }
};

template <class T>
void histogram(const Problem<T>& p, const Reduction<T>* r, int nodes, const Tile<T>& t) {
  const int64_t width = nodes + 2;  // one node before the first, and one past the last
  Table<T> col_table(t.mirror ? t.cols * width : 1);
  T row_table[2 * (MAX_NODES + 2)];  // two tables, so that neighbours of one cell do not wait for each other
  for (int64_t i = 0; i < t.rows; ++i) {
    const T* z = t.z + i * t.ld;
    memset(row_table, 0, 2 * width * sizeof(T));
    sweep(p, r->side, t, i, [&](int64_t v, auto m) ALWAYS {
      const Cells<T> c(load(z + v) * r->scale, r->shift, nodes, m);
      for (int64_t k = 0; k < WIDTH<T>; ++k) {
        if (c.cell[k] < 0) continue;
        T* row = row_table + (k & 1) * width + c.cell[k];
        row[0] += T(1) - c.f[k], row[1] += c.f[k];
        if (!t.mirror) continue;
        T* column = col_table.data + (v + k) * width + c.cell[k];
        column[0] += T(1) - c.f[k], column[1] += c.f[k];
      }
    });
    for (int n = 0; n < nodes; ++n) r[n].row_sum[t.r0 + i] += row_table[n + 1] + row_table[width + n + 1];
  }
  if (!t.mirror) return;
  for (int n = 0; n < nodes; ++n)
    for (int64_t j = 0; j < t.cols; ++j) r[n].row_sum[t.c0 + j] += col_table.data[j * width + n + 1];
}

// slope (anchors, nodes + 1): dL/du of the anchor's pairs in each cell.
template <class T>
void cell_slopes(const Reduction<T>* r, int nodes, int64_t first, int64_t anchors, T* slope) {
  for (int64_t i = 0; i < anchors; ++i)
    for (int n = 0; n <= nodes; ++n)
      slope[i * (nodes + 1) + n] = (n < nodes ? r[n].grad[first + i] : T(0)) - (n ? r[n - 1].grad[first + i] : T(0));
}

template <class T>
void backward_histogram(const Problem<T>& p, const Reduction<T>* r, int nodes, const Tile<T>& t, T* w) {
  Table<T> rows(t.rows * (nodes + 1)), columns(t.symmetric ? t.cols * (nodes + 1) : 1);
  cell_slopes(r, nodes, t.r0, t.rows, rows.data);
  if (t.symmetric) cell_slopes(r, nodes, t.c0, t.cols, columns.data);
  for (int64_t i = 0; i < t.rows; ++i) {
    const T *z = t.z + i * t.ld, *row_slopes = rows.data + i * (nodes + 1);
    T* wi = w + i * t.ld;
    sweep(p, r->side, t, i, [&](int64_t v, auto m) ALWAYS {
      const Cells<T> c(load(z + v) * r->scale, r->shift, nodes, m);
      for (int64_t k = 0; k < WIDTH<T>; ++k) {
        if (c.cell[k] < 0 || c.f[k] == T(0)) continue;
        T slope = row_slopes[c.cell[k]];
        if (t.symmetric) slope += columns.data[(v + k) * (nodes + 1) + c.cell[k]];
        wi[v + k] += slope * r->scale;
      }
    });
  }
}

// All reductions of a tile: histograms where nodes follow each other, else one by one.
template <class T>
void reduce(const Problem<T>& p, const Reduction<T>* reductions, int count, const Tile<T>& t) {
  for (int k = 0; k < count;) {
    const int nodes = histogram_nodes(reductions + k, count - k);
    if (nodes)
      histogram(p, reductions + k, nodes, t);
    else
      reduce_one(p, reductions[k], t);
    k += nodes ? nodes : 1;
  }
}

}  // namespace
}  // namespace flashpair
