// `onchip`: a pair-based loss and its gradient in one cooperative launch.
//
// Computes: the loss of N anchors against M references (whole/losses.h), and dL/dx, dL/dy.
// Never leaves the chip: the similarities. A block owns up to 16 rows and keeps their stripe of z, and then of weights,
// in shared memory from phase 2 to phase 6. Global memory sees O((N + M) D) numbers, which stay in the L2 cache.
// Arithmetic: T is float, or double for float64; 16-bit embeddings are read once, and are exact in float.
// Deterministic: every sum has a fixed order; no atomics.
// Two grid-wide barriers: after the rows (phase 1), and after the rows' log-sum-exps (phase 3).
//
// Because z_ij and z_ji have the same bits, the owner of row i computes what anchor j gives to the pair as well, from
// j's few numbers in Row: no tile of weights is ever exchanged. Of a rectangular problem whose references want a
// gradient, blocks that own references compute their own stripe of z instead.
#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "../whole/losses.h"
#include "onchip.h"
#include "product.h"

#ifndef DYNAMIC_SHARED  // how a kernel names its block's memory
#define DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]
#endif

namespace flashpair::onchip {
namespace {

constexpr int SCRATCH = 4 * 8;  // numbers of a block, for four sums over up to eight warps

inline int round_up(int value) { return (value + 3) / 4 * 4; }
__host__ __device__ inline int blocks_of(int count, int rows) { return (count + rows - 1) / rows; }
__host__ __device__ inline int anchor_blocks_of(int n, int rows) { return n > rows ? blocks_of(n, rows) : 1; }

// Anchors or references as phase 1 leaves them; padded with zeros to multiples of four rows and columns.
template <class T>
struct Set {
  const void* raw;
  const int64_t* labels;
  int count, padded;
  T *rows, *columns;                    // (padded, width) and its transpose
  T *square, *inverse, *poison, *role;  // (padded,): |row|^2, 1 / norm, 0 or NaN, and with one_pair who takes part
};
enum Role : int { NO_ROLE, ANCHOR, REFERENCE };

// The workspace: the anchors' and the references' Set (the same one in a square problem), and the numbers of the
// anchors' Row as vectors (padded,).
enum Vector : int { LOSS, VALID, DIVIDES, LSE, SLOPE = LSE + 2, BOUND = SLOPE + 2, VECTORS = BOUND + 2 };

template <class T>
struct Work {
  Set<T> anchors, refs;
  Formula<T> formula;
  int width;  // round_up(D)
  T* row;
  __device__ T& of(int vector, int i) const { return row[size_t(vector) * anchors.padded + i]; }
  __device__ Anchor<T> anchor(int i) const {
    return {{of(LSE, i), of(LSE + 1, i)}, {of(SLOPE, i), of(SLOPE + 1, i)}, {of(BOUND, i), of(BOUND + 1, i)}};
  }
};

// Returns how many numbers of T the workspace holds.
template <class T>
int64_t divide_workspace(const Job& job, const Tensors& at, Work<T>& work) {
  T *const begin = static_cast<T*>(at.workspace), *next = begin;
  work.formula = formula_of<T>(job);
  work.width = round_up(job.d);
  auto take = [&](int64_t numbers) { return next += numbers, next - numbers; };
  auto place = [&](const void* raw, const int64_t* labels, int count) {
    const int padded = round_up(count);
    const int64_t matrix = int64_t(padded) * work.width;
    T *rows = take(matrix), *columns = take(matrix);
    T *square = take(padded), *inverse = take(padded), *poison = take(padded), *role = take(padded);
    return Set<T>{raw, labels, count, padded, rows, columns, square, inverse, poison, role};
  };
  work.anchors = place(at.x, at.labels, job.n);
  work.refs = job.square ? work.anchors : place(at.y, at.ref_labels, job.m);
  work.row = take(int64_t(VECTORS) * work.anchors.padded);
  return next - begin;
}

template <class T>
__device__ T warp_sum(T value) {
  for (int step = LANES / 2; step; step /= 2) value += __shfl_xor_sync(0xffffffffu, value, step);
  return value;
}

template <class T>
__device__ T warp_max(T value) {
  for (int step = LANES / 2; step; step /= 2) {
    const T other = __shfl_xor_sync(0xffffffffu, value, step);
    value = other > value ? other : value;
  }
  return value;
}

__device__ inline double widen(double value) { return value; }
__device__ inline float widen(float value) { return value; }
__device__ inline float widen(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ inline float widen(__half value) { return __half2float(value); }

// Phase 1 of four rows, by one warp: normalised, zero-padded, as they are and transposed. E: what embeddings come in.
template <class T, class E>
__device__ void prepare_rows(const Job& job, const Set<T>& set, int width, int first, int lane) {
  const E* raw = static_cast<const E*>(set.raw);
  auto read = [&](int k, T(&v)[4]) {  // four loads on their way at once
    for (int r = 0; r < 4; ++r) v[r] = widen(raw[size_t(min(first + r, set.count - 1)) * job.d + k]);
    for (int r = 0; r < 4; ++r) v[r] = first + r < set.count ? v[r] : T(0);
  };
  T inverse[4] = {1, 1, 1, 1}, square[4] = {}, poison[4] = {};
  if (job.unit) {
    T sum[4] = {}, v[4];
#pragma unroll 2
    for (int k = lane; k < job.d; k += LANES) {
      read(k, v);
      for (int r = 0; r < 4; ++r) sum[r] += v[r] * v[r];
    }
    const T zero = sizeof(T) == 8 ? T(1.4916681462400413e-154) : T(1.0842021724855044e-19);  // whose square underflows
    for (int r = 0; r < 4; ++r) {
      const T norm = sqrt(warp_sum(sum[r]));
      inverse[r] = norm <= zero ? T(0) : norm < T(INFINITY) ? T(1) / norm : T(NAN);
    }
  }
#pragma unroll 2
  for (int k = lane; k < width; k += LANES) {
    Quad<T> column = {};
    if (k < job.d) read(k, column.v);
    for (int r = 0; r < 4; ++r) {
      const T v = column.v[r] *= inverse[r];
      set.rows[size_t(first + r) * width + k] = v;
      square[r] += v * v;
      poison[r] += v * T(0);
    }
    *reinterpret_cast<Quad<T>*>(set.columns + size_t(k) * set.padded + first) = column;
  }
  for (int r = 0; r < 4; ++r) {
    square[r] = warp_sum(square[r]), poison[r] = warp_sum(poison[r]);
    if (lane) continue;
    set.square[first + r] = square[r], set.inverse[first + r] = inverse[r], set.poison[first + r] = poison[r];
  }
}

template <class T>
__device__ void prepare(const Job& job, const Set<T>& set, int width, int first, int lane) {
  if constexpr (sizeof(T) == sizeof(double)) {
    prepare_rows<T, double>(job, set, width, first, lane);
  } else {
    if (job.number == FLOAT32) prepare_rows<T, float>(job, set, width, first, lane);
    if (job.number == BFLOAT16) prepare_rows<T, __nv_bfloat16>(job, set, width, first, lane);
    if (job.number == FLOAT16) prepare_rows<T, __half>(job, set, width, first, lane);
  }
}

// Phase 1 of one label, by one warp: a class's first sample is its anchor; its positive is the second one, or of a
// rectangular problem the first reference. Classes without both take no part.
template <class T>
__device__ void assign_role(const Job& job, const Set<T>& own, const Set<T>& other, bool anchor, int i, int lane) {
  int before = 0, same = 0;
  for (int j = lane; j < own.count; j += LANES) before += j < i && own.labels[j] == own.labels[i];
  for (int j = lane; j < other.count; j += LANES) same += other.labels[j] == own.labels[i];
  before = warp_sum(before), same = warp_sum(same);
  int role = before == 0 && same > 0 ? (anchor ? ANCHOR : REFERENCE) : NO_ROLE;
  if (job.square) role = before == 0 && same > 1 ? ANCHOR : before == 1 ? REFERENCE : NO_ROLE;
  if (lane == 0) own.role[i] = role;
}

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
__device__ inline int other_side(unsigned char sides) { return (sides >> 2) - 1; }

// Phase 2 behind the product: z, where it is a distance, and who is what to whom. (ROWS, stride), padding is no pair.
template <class T, int ROWS>
__device__ void relate(const Job& job, const Work<T>& work, bool owns_anchors, int first, int stride, T* z,
                       unsigned char* sides) {
  const Set<T>&own = owns_anchors ? work.anchors : work.refs, &others = owns_anchors ? work.refs : work.anchors;
  const T noise = 8 * (sizeof(T) == 8 ? T(2.220446049250313e-16) : T(1.1920928955078125e-07));
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
      const T squares = own.square[i] + other_square, d2 = squares - 2 * z[at];
      z[at] = d2 > noise * squares ? sqrt(d2) : T(0);
    }
  }
  __syncthreads();
}

// Phase 3 of one anchor, by one warp: its hardest pairs, windows, log-sum-exps, loss, and what it weighs pairs by.
template <class T>
__device__ Row<T> reduce_row(const Formula<T>& formula, const T* z, const unsigned char* sides, int stride, bool anchor,
                             int lane) {
  Row<T> row;
  Anchor<T>& gives = row.gives;
  T hardest[2] = {-INFINITY, -INFINITY}, peak[2], sum[2] = {0, 0}, positives = 0, poison = 0;
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
  for (int side = 0; side < 2; ++side) peak[side] = fabs(formula.scale[side]) * hardest[side];
  for (int j = lane; j < stride; j += LANES) {
    const int side = own_side(sides[j]);
    if (side == NO_PAIR || !(harder(formula, side, z[j]) > pick(gives.bound, side))) continue;
    const T term = exp(pick(formula.scale, side) * z[j] - pick(peak, side));
    sum[POSITIVE] += side == POSITIVE ? term : T(0), sum[NEGATIVE] += side == POSITIVE ? T(0) : term;
  }
  for (int side = 0; side < 2; ++side) {
    sum[side] = warp_sum(sum[side]);
    gives.lse[side] = sum[side] > 0 ? peak[side] + log(sum[side]) : T(-INFINITY);
  }
  const int summed = summed_side(formula.loss);
  T total = 0, slopes = 0;
  if (summed != NO_PAIR) {
    for (int j = lane; j < stride; j += LANES) {
      if (own_side(sides[j]) != summed) continue;
      const T t = pick(formula.scale, summed) * z[j] + pick(gives.lse, 1 - summed);
      total += softplus(t), slopes += sigmoid(t);
    }
    total = warp_sum(total), slopes = warp_sum(slopes);
  }
  finish_row(formula, row, positives, anchor, total, slopes);
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
      work.of(LSE + side, i) = row.gives.lse[side], work.of(SLOPE + side, i) = row.gives.slope[side];
      work.of(BOUND + side, i) = row.gives.bound[side];
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
    Anchor<T> other = {};
    if (job.square || !owns_anchors) other = work.anchor(j);
    for (int r = 0; r < ROWS; ++r) {
      const int at = r * stride + j;
      const T value = z[at];
      T weight = pair_weight(work.formula, gives[r], own_side(sides[at]), value);
      weight += pair_weight(work.formula, other, other_side(sides[at]), value);
      if (job.euclidean) weight = value > T(0) ? -weight / value : T(0);
      z[at] = weight;
    }
  }
  __syncthreads();

  // 6. Gradient: weights times the others' rows, then through the distance and the norm.
  product<T, ROWS>(z, others.rows, stride, width, groups_of(width, stride), mine);
  for (int r = warp; r < count; r += WARPS) {
    T pull = 0, along = 0;
    for (int j = lane; job.euclidean && j < stride; j += LANES) pull -= z[r * stride + j];
    pull = warp_sum(pull);
    const T* row = own.rows + size_t(first + r) * width;
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
