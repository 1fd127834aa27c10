// `onchip`: a pair-based loss and its gradient in one cooperative launch.
//
// Computes: the loss of N anchors against M references (whole/losses.h), and dL/dx, dL/dy.
// Never leaves the chip: the similarities. A block owns up to 16 rows and keeps their stripe of z, and then of weights,
// in shared memory from phase 2 to phase 6. Global memory sees O((N + M) D) numbers, which stay in the L2 cache.
// Arithmetic: T is float, or double for float64; 16-bit embeddings are exact in float.
// Deterministic: every sum has a fixed order; no atomics.
// Two grid-wide barriers: after the rows (phase 1), and after the rows' log-sum-exps (phase 3).
//
// Because z_ij and z_ji have the same bits, the owner of row i computes what anchor j gives to the pair as well, from
// j's few numbers in Row: no tile of weights is ever exchanged. Of a rectangular problem whose references want a
// gradient, blocks that own references compute their own stripe of z instead.
#include <cooperative_groups.h>
#include <cuda_runtime.h>

#include "product.h"
#include "rows.h"
#include "workspace.h"

#ifndef DYNAMIC_SHARED  // how a kernel names its block's memory
#define DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]
#endif

namespace flashpair::onchip {
namespace {

constexpr int SCRATCH = 4 * 8;  // numbers of a block, for four sums over up to eight warps

// What decides how two samples are paired.
struct Member {
  int64_t label;
  int role;
  bool real;  // not padding
};

template <class T>
__device__ Member member(const Job& job, const Set<T>& set, int i) {
  if (i >= set.count) return {0, NO_ROLE, false};
  return {set.labels[i], job.one_pair ? int(set.role[i]) : int(NO_ROLE), true};
}

// The side on which reference b is to anchor a, or NO_PAIR.
__device__ inline int side_of(const Job& job, const Member& a, const Member& b) {
  if (!a.real || !b.real || (job.one_pair && !(a.role == ANCHOR && b.role == REFERENCE))) return NO_PAIR;
  return a.label == b.label ? POSITIVE : NEGATIVE;
}

// Both sides of a pair in a byte: of the own row as the anchor, and of the other one.
__device__ inline unsigned char pack(int own, int other) { return (own + 1) | (other + 1) << 2; }
__device__ inline int own_side(unsigned char sides) { return (sides & 3) - 1; }
__device__ inline int other_side(unsigned char sides) { return (sides >> 2 & 3) - 1; }
constexpr unsigned char CLOSE = 1 << 4;  // so near to each other that their gradient is taken from the difference

// |x - y|^2 under this share of |x|^2 + |y|^2 is added up from differences: |x|^2 + |y|^2 - 2 x.y would lose its
// digits.
template <class T>
constexpr T NEAR = T(1) / 16;
template <class T>
constexpr T NEAR_GRADIENT = T(1) / 256;  // of the gradient, whose terms lose the square root of it

// |a - b|^2, the same bits as |b - a|^2.
template <class T>
__device__ T apart(const T* a, const T* b, int width) {
  T sum = 0;
  for (int k = 0; k < width; ++k) {
    const T difference = a[k] - b[k];
    sum += difference * difference;
  }
  return sum;
}

// sum_j w_j (y_j - x) of a row's close pairs, by one warp, into `out` (d,).
template <class T>
__device__ void add_close(const T* weights, const unsigned char* sides, int stride, const T* x, const T* others,
                          int width, int d, int lane, T* out) {
  for (int k = lane; k < d; k += LANES) {
    T sum = 0;
    for (int j = 0; j < stride; ++j)
      if (sides[j] & CLOSE) sum += weights[j] * (others[size_t(j) * width + k] - x[k]);
    out[k] = sum;
  }
}

// Phase 2 behind the product: z, where it is a distance, and who is what to whom. (ROWS, stride), padding is no pair.
template <class T, int ROWS>
__device__ void relate(const Job& job, const Work<T>& work, bool owns_anchors, int first, int stride, T* z,
                       unsigned char* sides) {
  const Set<T>&own = owns_anchors ? work.anchors : work.refs, &others = owns_anchors ? work.refs : work.anchors;
  for (int j = threadIdx.x; j < stride; j += THREADS) {
    const Member other = member(job, others, j);
    const T other_square = others.square[j];
    for (int r = 0; r < ROWS; ++r) {
      const int i = first + r, at = r * stride + j;
      const Member mine = member(job, own, i);
      const bool self = job.square && i == j;
      sides[at] = pack(owns_anchors && !self ? side_of(job, mine, other) : NO_PAIR,
                       (job.square || !owns_anchors) && !self ? side_of(job, other, mine) : NO_PAIR);
      if (!job.euclidean || !mine.real) continue;
      const T squares = own.square[i] + other_square;
      T d2 = squares - 2 * z[at];
      if (self) {
        d2 = 0;
      } else if (other.real && !(d2 > NEAR<T> * squares)) {  // squares that overflow among them
        d2 = apart(own.rows + size_t(i) * work.width, others.rows + size_t(j) * work.width, work.width);
      }
      if (d2 <= NEAR_GRADIENT<T> * squares) sides[at] |= CLOSE;
      z[at] = sqrt(d2 > T(0) ? d2 : T(0));
    }
  }
  __syncthreads();
}

// Phase 3 of one anchor, by one warp: its hardest pairs, windows, log-sum-exps, loss, and what it weighs pairs by.
template <class T>
__device__ Row<T> reduce_row(const Formula<T>& formula, const T* z, const unsigned char* sides, int stride, bool anchor,
                             int lane) {
  Row<T> row;
  Known<T>& gives = row.gives;
  T hardest[2] = {-INFINITY, -INFINITY}, sum[2] = {0, 0}, positives = 0, poison = 0;
  for (int j = lane; j < stride; j += LANES) {
    const int side = own_side(sides[j]);
    const T hard = harder(formula, side, z[j]);
    if (side == POSITIVE && hard > hardest[POSITIVE]) hardest[POSITIVE] = hard;
    if (side == NEGATIVE && hard > hardest[NEGATIVE]) hardest[NEGATIVE] = hard;
    positives += side == POSITIVE;
    poison += side == NO_PAIR ? T(0) : z[j] * T(0);  // a product of finite numbers may overflow
  }
  positives = warp_sum(positives), poison = warp_sum(poison);
  for (int side = 0; side < 2; ++side) hardest[side] = warp_max(hardest[side]), gives.bound[side] = -INFINITY;
  if (formula.mined) {  // eq. 11-12; one decision for both sides, so that both are empty or neither is
    for (int side = 0; side < 2; ++side) gives.bound[side] = -(hardest[1 - side] + formula.epsilon);
    if (!(hardest[0] > gives.bound[0] && hardest[1] > gives.bound[1])) gives.bound[0] = gives.bound[1] = INFINITY;
  }
  for (int j = lane; j < stride; j += LANES) {
    const int side = own_side(sides[j]);
    if (side == NO_PAIR) continue;
    const T hard = harder(formula, side, z[j]);
    if (!(hard > pick(gives.bound, side))) continue;
    const T term = exp((hard - pick(hardest, side)) * fabs(pick(formula.scale, side)));
    sum[POSITIVE] += side == POSITIVE ? term : T(0), sum[NEGATIVE] += side == POSITIVE ? T(0) : term;
  }
  for (int side = 0; side < 2; ++side) {
    sum[side] = warp_sum(sum[side]);
    const bool some = sum[side] > 0;
    gives.top[side] = some ? harder(formula, side, hardest[side]) : T(0);
    gives.rest[side] = some ? log(sum[side]) : T(INFINITY);
    gives.lse[side] = some ? formula.scale[side] * gives.top[side] + gives.rest[side] : T(-INFINITY);
  }
  const int summed = summed_side(formula.loss);
  T total = 0, slopes = 0;
  if (summed != NO_PAIR) {
    for (int j = lane; j < stride; j += LANES) {
      if (own_side(sides[j]) != summed) continue;
      const T t = beside_other(formula, gives, summed, z[j]);
      total += softplus(t), slopes += sigmoid(t);
    }
    total = warp_sum(total), slopes = warp_sum(slopes);
  }
  finish_row(formula, row, positives, anchor, total, slopes, both_sides(formula, gives));
  row.loss += poison, gives.slope[POSITIVE] += poison, gives.slope[NEGATIVE] += poison;
  return row;
}

// Sums over a batch, the same bits in every block.
template <class T>
struct Totals {
  T loss = 0, valid = 0, divides = 0, poison = 0;
};

template <class T>
__device__ Totals<T> batch_totals(const Job& job, const Work<T>& work, T* scratch) {
  T sum[4] = {};
  for (int i = threadIdx.x; i < work.anchors.count; i += THREADS) {
    sum[0] += work.of(LOSS, i), sum[1] += work.of(VALID, i), sum[2] += work.of(DIVIDES, i);
    sum[3] += work.anchors.poison[i];
  }
  for (int j = threadIdx.x; !job.square && j < work.refs.count; j += THREADS) sum[3] += work.refs.poison[j];
  for (int k = 0; k < 4; ++k) {
    sum[k] = warp_sum(sum[k]);
    if (threadIdx.x % LANES == 0) scratch[k * WARPS + threadIdx.x / LANES] = sum[k];
  }
  __syncthreads();
  for (int k = 0; k < 4; ++k) {
    sum[k] = 0;
    for (int w = 0; w < WARPS; ++w) sum[k] += scratch[k * WARPS + w];
  }
  return {sum[0], sum[1], sum[2], sum[3]};
}

template <class T, int ROWS>
__global__ void __launch_bounds__(THREADS, 1)
    loss_and_gradient(const __grid_constant__ Job job, const __grid_constant__ Tensors at,
                      const __grid_constant__ Work<T> work) {
  DYNAMIC_SHARED(memory);
  const cooperative_groups::grid_group grid = cooperative_groups::this_grid();
  const Set<T>&anchors = work.anchors, &refs = work.refs;
  const int lane = threadIdx.x % LANES, warp = threadIdx.x / LANES;
  const int every_warp = blockIdx.x * WARPS + warp, warps = gridDim.x * WARPS, width = work.width;

  // 1. Rows: normalised, transposed, and who takes part. The anchors' first, then the references'.
  const int anchor_quads = anchors.padded / 4, quads = anchor_quads + (job.square ? 0 : refs.padded / 4);
  for (int quad = every_warp; quad < quads; quad += warps) {
    const bool of_anchors = quad < anchor_quads;
    prepare(job, of_anchors ? anchors : refs, width, 4 * (of_anchors ? quad : quad - anchor_quads), lane);
  }
  for (int i = every_warp; job.one_pair && i < anchors.count + (job.square ? 0 : refs.count); i += warps) {
    const bool of_anchors = i < anchors.count;
    const Set<T>&own = of_anchors ? anchors : refs, &other = of_anchors ? refs : anchors;
    assign_role(job, own, other, of_anchors, of_anchors ? i : i - anchors.count, lane);
  }
  grid.sync();

  // 2. Pairs: the stripe (ROWS, others) of the block's own rows, their similarities and sides.
  const int anchor_blocks = anchor_blocks_of(anchors.count, ROWS);
  const bool owns_anchors = int(blockIdx.x) < anchor_blocks;
  const Set<T>&own = owns_anchors ? anchors : refs, &others = owns_anchors ? refs : anchors;
  const int first = (owns_anchors ? blockIdx.x : blockIdx.x - anchor_blocks) * ROWS;
  const int count = max(0, min(ROWS, own.count - first)), stride = others.padded;
  const int widest = max(anchors.padded, refs.padded);
  T* z = reinterpret_cast<T*>(memory);                                 // (ROWS, stride)
  T* mine = z + ROWS * widest;                                         // (ROWS, width): own rows, then their gradients
  T* scratch = mine + ROWS * width;                                    // (4, WARPS), SCRATCH numbers
  Anchor<T>* gives = reinterpret_cast<Anchor<T>*>(scratch + SCRATCH);  // (ROWS,)
  unsigned char* sides = reinterpret_cast<unsigned char*>(gives + ROWS);  // (ROWS, stride)
  for (int k = threadIdx.x; k < ROWS * width; k += THREADS)
    mine[k] = k < count * width ? own.rows[size_t(first) * width + k] : T(0);
  __syncthreads();
  product<T, ROWS>(mine, others.columns, width, stride, groups_of(widest, width), z);
  relate<T, ROWS>(job, work, owns_anchors, first, stride, z, sides);

  // 3. Rows: windows, log-sum-exps, losses and slopes.
  for (int r = warp; owns_anchors && r < count; r += WARPS) {
    const int i = first + r;
    const bool anchor = !job.one_pair || anchors.role[i] == ANCHOR;
    Row<T> row = reduce_row(work.formula, z + r * stride, sides + r * stride, stride, anchor, lane);
    if (lane) continue;
    const T upstream = at.upstream ? static_cast<const T*>(at.upstream)[i] : T(1);
    work.of(LOSS, i) = row.loss, work.of(VALID, i) = row.valid, work.of(DIVIDES, i) = row.divides;
    for (int side = 0; side < 2; ++side) {
      row.gives.slope[side] *= upstream;
      work.of(TOP + side, i) = row.gives.top[side], work.of(REST + side, i) = row.gives.rest[side];
      work.of(SLOPE + side, i) = row.gives.slope[side], work.of(BOUND + side, i) = row.gives.bound[side];
    }
    gives[r] = row.gives;
  }
  grid.sync();

  // 4. The loss. A row's own average comes from upstream, if it has one.
  const Totals<T> totals = batch_totals(job, work, scratch);
  const bool averaged = job.averaging != SUM && job.averaging != NONE;
  const T divisor = averaged && totals.divides > T(1) ? totals.divides : T(1);
  T* loss = static_cast<T*>(at.loss);
  if (loss && job.averaging == NONE) {
    for (int r = threadIdx.x; owns_anchors && r < count; r += THREADS)
      loss[first + r] = work.of(LOSS, first + r) + totals.poison;
  } else if (loss && blockIdx.x == 0 && threadIdx.x == 0) {
    *loss = totals.loss / divisor + totals.poison;
  }
  if (at.share && blockIdx.x == 0 && threadIdx.x == 0) *static_cast<T*>(at.share) = totals.valid / divisor;
  T* out = static_cast<T*>(owns_anchors ? at.dx : at.dy);
  if (!out) return;

  // 5. Weights, in z's place: what both ends of a pair, being anchors, give to it. Of a distance: over it, negative.
  for (int j = threadIdx.x; j < stride; j += THREADS) {
    const bool from_others = (job.square || !owns_anchors) && j < others.count;
    Anchor<T> other = {};
    if (from_others) other = work.anchor(j);
    for (int r = 0; r < ROWS; ++r) {
      const int at = r * stride + j;
      const T value = z[at];
      T weight = 0;
      if (owns_anchors && r < count) weight = pair_weight(work.formula, gives[r], own_side(sides[at]), value);
      if (from_others) weight += pair_weight(work.formula, other, other_side(sides[at]), value);
      if (job.euclidean) weight = value > T(0) ? -weight / value : T(0);
      z[at] = weight;
    }
  }
  __syncthreads();

  // 6. Gradient: weights times the others' rows, then through the distance and the norm.
  for (int r = warp; job.euclidean && r < count; r += WARPS)
    add_close(z + r * stride, sides + r * stride, stride, own.rows + size_t(first + r) * width, others.rows, width,
              job.d, lane, out + size_t(first + r) * job.d);
  if (job.euclidean) {  // close pairs have had their part
    __syncthreads();
    for (int at = threadIdx.x; at < count * stride; at += THREADS)
      if (sides[at] & CLOSE) z[at] = 0;
    __syncthreads();
  }
  product<T, ROWS>(z, others.rows, stride, width, groups_of(width, stride), mine);
  for (int r = warp; r < count; r += WARPS) {
    T pull = 0, along = 0;
    for (int j = lane; job.euclidean && j < stride; j += LANES) pull -= z[r * stride + j];
    pull = warp_sum(pull);
    const T* row = own.rows + size_t(first + r) * width;
    if (job.euclidean)
      for (int k = lane; k < job.d; k += LANES) mine[r * width + k] += out[size_t(first + r) * job.d + k];
    for (int k = lane; k < width; k += LANES) along += (mine[r * width + k] + pull * row[k]) * row[k];
    along = job.unit ? warp_sum(along) : T(0);
    const T scale = own.inverse[first + r] / divisor;
    for (int k = lane; k < job.d; k += LANES)
      out[size_t(first + r) * job.d + k] =
          (mine[r * width + k] + pull * row[k] - along * row[k]) * scale + totals.poison;
  }
}

template <class T>
using Kernel = void (*)(Job, Tensors, Work<T>);

template <class T>
Kernel<T> kernel_of(int rows) {
  switch (rows) {
    case 1:
      return loss_and_gradient<T, 1>;
    case 2:
      return loss_and_gradient<T, 2>;
    case 4:
      return loss_and_gradient<T, 4>;
    case 8:
      return loss_and_gradient<T, 8>;
    default:
      return loss_and_gradient<T, 16>;
  }
}

std::string words(cudaError_t error) { return error == cudaSuccess ? "" : cudaGetErrorString(error); }

template <class T>
std::string lay_out_as(const Job& job, const Limits& device, Layout& found) {
  const int64_t others = round_up(max(job.n, job.m)), width = round_up(job.d), vectors = sizeof(Anchor<T>) / sizeof(T);
  Work<T> work;
  Tensors anywhere{};
  anywhere.workspace = &work;  // to count from
  found.threads = THREADS;
  found.blocks = anchor_blocks_of(job.n, job.rows) + (job.want_dy ? blocks_of(job.m, job.rows) : 0);
  found.shared = sizeof(T) * (job.rows * (others + width + vectors) + SCRATCH) + job.rows * others;
  if (found.blocks > device.processors) return "more blocks than multiprocessors";
  found.workspace = sizeof(T) * divide_workspace(job, anywhere, work);
  // All that there is: another shape's launch of the same kernel may need more.
  return words(
      cudaFuncSetAttribute(kernel_of<T>(job.rows), cudaFuncAttributeMaxDynamicSharedMemorySize, device.shared));
}

template <class T>
std::string launch_as(const Job& job, const Layout& layout, const Tensors& tensors, cudaStream_t stream) {
  Work<T> work;
  divide_workspace(job, tensors, work);
  void* arguments[] = {const_cast<Job*>(&job), const_cast<Tensors*>(&tensors), &work};
  return words(cudaLaunchCooperativeKernel(kernel_of<T>(job.rows), dim3(layout.blocks), dim3(layout.threads), arguments,
                                           size_t(layout.shared), stream));
}

}  // namespace

std::string limits(int device, Limits& found) {
  cudaError_t error = cudaDeviceGetAttribute(&found.processors, cudaDevAttrMultiProcessorCount, device);
  if (!error) error = cudaDeviceGetAttribute(&found.shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (!error) error = cudaDeviceGetAttribute(&found.cooperative, cudaDevAttrCooperativeLaunch, device);
  cudaFuncAttributes machine_code;  // for the current device: none where this file was not compiled for it
  if (!error) error = cudaFuncGetAttributes(&machine_code, kernel_of<float>(1));
  return words(error);
}

std::string lay_out(const Job& job, const Limits& device, Layout& found) {
  return job.number == FLOAT64 ? lay_out_as<double>(job, device, found) : lay_out_as<float>(job, device, found);
}

std::string launch(const Job& job, const Layout& layout, const Tensors& tensors, void* stream) {
  const cudaStream_t at = static_cast<cudaStream_t>(stream);
  return job.number == FLOAT64 ? launch_as<double>(job, layout, tensors, at)
                               : launch_as<float>(job, layout, tensors, at);
}

}  // namespace flashpair::onchip
