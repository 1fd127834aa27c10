// Soft histograms: a run of sums of triangles whose nodes follow each other is one look-up a pair, not one sum a node.
//
// A pair at u = scale * z + the first node's offset, between nodes p and p + 1, counts 1 - f for p and f for p + 1,
// f = u - p. In backward its weight is the difference of the two nodes' gradients; on a node it has none.
#pragma once
#include <new>

#include "cpu/tile/reduce.h"

namespace flashpair {
namespace {

constexpr int MOST_NODES = 256, FEWEST_NODES = 4;

// How many reductions from the first on are the nodes of one histogram; 0 for fewer than are worth a table.
template <class T>
int run_of_nodes(const Reduction<T>* r, int count) {
  auto node = [](const Reduction<T>& n) {
    const bool plain = !n.offset && !n.lower && !n.upper && !n.grad_scale;
    return plain && n.op == SUM && n.transform == TRIANGLE;
  };
  const T slack = 8 * (sizeof(T) == 4 ? T(1.1920928955078125e-7) : T(2.220446049250313e-16));
  int nodes = 0;
  for (; nodes < count && nodes < MOST_NODES && node(r[nodes]); ++nodes) {
    const T expected = r[0].shift - static_cast<T>(nodes), off = r[nodes].shift - expected;
    const T size = (expected < 0 ? -expected : expected) + static_cast<T>(nodes) + T(1);
    if (off > slack * size || off < -slack * size) break;
    if (r[nodes].side != r[0].side || r[nodes].scale != r[0].scale) break;
  }
  return nodes >= FEWEST_NODES ? nodes : 0;
}

// Memory for a table, given back at the end; no container, whose code would be linked between instruction sets.
template <class T>
struct Table {
  T* at;
  explicit Table(int64_t size) : at(static_cast<T*>(::operator new(size * sizeof(T)))) {
    memset(at, 0, size * sizeof(T));
  }
  ~Table() { ::operator delete(at); }
  Table(const Table&) = delete;
};

// The cells of a vector of pairs at s = scale * z: p + 1 in [0, nodes], 0 before the first node, and f; pairs outside
// of the mask, and of all nodes, are in cell -1. f is of s less the node, as it is where each node is a sum: u, which
// may be as large as there are nodes, is rounded more and would put pairs next to a node on its other side.
template <class T>
struct Cells {
  typename Lanes<T>::Int cell[WIDTH<T>];
  T f[WIDTH<T>];
  template <class M>
  INLINE Cells(Vec<T> s, T shift, int nodes, M m) {
    shift += T(1);
    const Vec<T> about = s + shift;  // truncation is the floor of what is not negative
    const Mask<T> in = (about > T(0)) & (about < T(nodes + 1));
    Mask<T> whole = __builtin_convertvector(in ? about : Vec<T>{}, Mask<T>);
    Vec<T> rest = s + (shift - __builtin_convertvector(whole, Vec<T>));
    const Mask<T> below = rest < T(0), above = rest >= T(1);
    whole += below - above;  // a truth is -1
    rest += (below ? splat(T(1)) : Vec<T>{}) - (above ? splat(T(1)) : Vec<T>{});
    const Mask<T> kept = both<T>(in & (whole >= 0) & (whole <= nodes), m);
    const Mask<T> found = kept ? whole : Mask<T>{} - 1;
    memcpy(cell, &found, sizeof cell), memcpy(f, &rest, sizeof f);
  }
};

template <class T>
void histogram(const Problem<T>& p, const Reduction<T>* r, int nodes, const Tile<T>& t) {
  const int64_t width = nodes + 2;  // a node before the first, and one past the last
  Table<T> of_columns(t.mirror ? t.cols * width : 1);
  T of_row[2 * (MOST_NODES + 2)];  // two tables, so that neighbours of one cell do not wait for each other
  for (int64_t i = 0; i < t.rows; ++i) {
    const T* z = t.z + i * t.ld;
    memset(of_row, 0, 2 * width * sizeof(T));
    sweep(p, r->side, t, i, [&](int64_t v, auto m) ALWAYS {
      const Cells<T> c(load(z + v) * r->scale, r->shift, nodes, m);
      for (int64_t k = 0; k < WIDTH<T>; ++k) {
        if (c.cell[k] < 0) continue;
        T* row = of_row + (k & 1) * width + c.cell[k];
        row[0] += T(1) - c.f[k], row[1] += c.f[k];
        if (!t.mirror) continue;
        T* column = of_columns.at + (v + k) * width + c.cell[k];
        column[0] += T(1) - c.f[k], column[1] += c.f[k];
      }
    });
    for (int n = 0; n < nodes; ++n) r[n].total[t.r0 + i] += of_row[n + 1] + of_row[width + n + 1];
  }
  if (!t.mirror) return;
  for (int n = 0; n < nodes; ++n)
    for (int64_t j = 0; j < t.cols; ++j) r[n].total[t.c0 + j] += of_columns.at[j * width + n + 1];
}

// slope (anchors, nodes + 1): dL/du of a pair of the anchor in each cell, from before the first node on.
template <class T>
void slopes_of_cells(const Reduction<T>* r, int nodes, int64_t first, int64_t anchors, T* slope) {
  for (int64_t i = 0; i < anchors; ++i)
    for (int n = 0; n <= nodes; ++n)
      slope[i * (nodes + 1) + n] = (n < nodes ? r[n].grad[first + i] : T(0)) - (n ? r[n - 1].grad[first + i] : T(0));
}

template <class T>
void weigh_histogram(const Problem<T>& p, const Reduction<T>* r, int nodes, const Tile<T>& t, T* w) {
  Table<T> rows(t.rows * (nodes + 1)), columns(t.symmetric ? t.cols * (nodes + 1) : 1);
  slopes_of_cells(r, nodes, t.r0, t.rows, rows.at);
  if (t.symmetric) slopes_of_cells(r, nodes, t.c0, t.cols, columns.at);
  for (int64_t i = 0; i < t.rows; ++i) {
    const T *z = t.z + i * t.ld, *mine = rows.at + i * (nodes + 1);
    T* wi = w + i * t.ld;
    sweep(p, r->side, t, i, [&](int64_t v, auto m) ALWAYS {
      const Cells<T> c(load(z + v) * r->scale, r->shift, nodes, m);
      for (int64_t k = 0; k < WIDTH<T>; ++k) {
        if (c.cell[k] < 0 || c.f[k] == T(0)) continue;
        T slope = mine[c.cell[k]];
        if (t.symmetric) slope += columns.at[(v + k) * (nodes + 1) + c.cell[k]];
        wi[v + k] += slope * r->scale;
      }
    });
  }
}

template <class T>
void reduce(const Problem<T>& p, const Reduction<T>* reductions, int count, const Tile<T>& t) {
  for (int k = 0; k < count;) {
    const int nodes = run_of_nodes(reductions + k, count - k);
    if (nodes)
      histogram(p, reductions + k, nodes, t);
    else
      reduce_one(p, reductions[k], t);
    k += nodes ? nodes : 1;
  }
}

}  // namespace
}  // namespace flashpair
