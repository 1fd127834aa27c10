// `onchip`: a pair-based loss and its gradient in one cooperative launch.
//
// Computes: the loss of N anchors against M references (small_batch/losses.h), and dL/dx, dL/dy.
// Never stored in global memory: the similarities. A block owns up to 16 rows and keeps their stripe of z, and then of
// weights, in shared memory from phase 2 to phase 6. Global memory sees O((N + M) D) numbers, which stay in the L2
// cache. Arithmetic: T is float, or double for float64; 16-bit embeddings are exact in float. Deterministic: every sum
// has a fixed order; no atomics. Two grid-wide barriers: after the rows (phase 1), and after the rows' log-sum-exps
// (phase 3).
//
// Because z_ij and z_ji have the same bits, the owner of row i also computes what anchor j gives to the pair, from j's
// few numbers in Row. So blocks never exchange weights. In a rectangular problem whose references' gradient is wanted,
// blocks that own references compute their own stripe of z instead.
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

// The sums over a batch, and a block's scratch for them: one number for each of up to eight warps.
enum Total : int { TOTAL_LOSS, TOTAL_VALID, TOTAL_DENOMINATOR, TOTAL_NONFINITE, NUM_TOTALS };
constexpr int SCRATCH = NUM_TOTALS * 8;

// What decides how two samples are paired.
struct Sample {
  int64_t label;
  int role;
  bool real;  // not padding
};

template <class T>
__device__ Sample sample(const Spec& spec, const Samples<T>& samples, int i) {
  if (i >= samples.count) return {0, NO_ROLE, false};
  return {samples.labels[i], spec.one_pair ? int(samples.role[i]) : int(NO_ROLE), true};
}

// The side on which reference b is to anchor a, or NO_PAIR.
__device__ inline int side_of(const Spec& spec, const Sample& a, const Sample& b) {
  if (!a.real || !b.real || (spec.one_pair && !(a.role == ANCHOR && b.role == REFERENCE))) return NO_PAIR;
  return a.label == b.label ? POSITIVE : NEGATIVE;
}

// A pair's two sides in one byte: with the own row as the anchor, and with the other row.
__device__ inline unsigned char pack(int own, int other) { return (own + 1) | (other + 1) << 2; }
__device__ inline int own_side(unsigned char sides) { return (sides & 3) - 1; }
__device__ inline int other_side(unsigned char sides) { return (sides >> 2 & 3) - 1; }
constexpr unsigned char CLOSE = 1 << 4;  // a bit beside the sides: the pair's gradient is computed from the difference

// As cpu/tile/euclidean.h: |x - y|^2 under this share of |x|^2 + |y|^2 is summed from differences, because
// |x|^2 + |y|^2 - 2 x.y would lose its digits. The gradient loses only the square root of that.
template <class T>
constexpr T CLOSE_SHARE = T(1) / 16;
template <class T>
constexpr T CLOSE_GRADIENT_SHARE = T(1) / 256;

// |a - b|^2, the same bits as |b - a|^2.
template <class T>
__device__ T squared_distance(const T* a, const T* b, int width) {
  T sum = 0;
  for (int k = 0; k < width; ++k) {
    const T difference = a[k] - b[k];
    sum += difference * difference;
  }
  return sum;
}

// sum_j w_j (y_j - x) of a row's close pairs, by one warp, into `out` (d,).
template <class T>
__device__ void close_gradients(const T* weights, const unsigned char* sides, int stride, const T* x, const T* others,
                                int width, int d, int lane, T* out) {
  for (int k = lane; k < d; k += LANES) {
    T sum = 0;
    for (int j = 0; j < stride; ++j)
      if (sides[j] & CLOSE) sum += weights[j] * (others[size_t(j) * width + k] - x[k]);
    out[k] = sum;
  }
}

// Phase 2 after the product: turns z into distances where it is one, and writes the sides of each pair. Both are
// (ROWS, stride); padding is no pair.
template <class T, int ROWS>
__device__ void classify_pairs(const Spec& spec, const Work<T>& work, bool owns_anchors, int first, int stride, T* z,
                               unsigned char* sides) {
  const Samples<T>&own = owns_anchors ? work.anchors : work.refs, &others = owns_anchors ? work.refs : work.anchors;
  for (int j = threadIdx.x; j < stride; j += THREADS) {
    const Sample sample_j = sample(spec, others, j);
    const T sq_norm_j = others.sq_norm[j];
    for (int r = 0; r < ROWS; ++r) {
      const int i = first + r, at = r * stride + j;
      const Sample sample_i = sample(spec, own, i);
      const bool self = spec.square && i == j;
      sides[at] = pack(owns_anchors && !self ? side_of(spec, sample_i, sample_j) : NO_PAIR,
                       (spec.square || !owns_anchors) && !self ? side_of(spec, sample_j, sample_i) : NO_PAIR);
      if (!spec.euclidean || !sample_i.real) continue;
      const T sq_norms = own.sq_norm[i] + sq_norm_j;
      T d2 = sq_norms - 2 * z[at];
      if (self) {
        d2 = 0;
      } else if (sample_j.real && !(d2 > CLOSE_SHARE<T> * sq_norms)) {  // also where the squared norms overflow
        d2 = squared_distance(own.rows + size_t(i) * work.width, others.rows + size_t(j) * work.width, work.width);
      }
      if (d2 <= CLOSE_GRADIENT_SHARE<T> * sq_norms) sides[at] |= CLOSE;
      z[at] = sqrt(d2 > T(0) ? d2 : T(0));
    }
  }
  __syncthreads();
}

// Phase 3 of one anchor, by one warp: its hardest pairs, windows, log-sum-exps, loss, and what its pairs' weights are
// computed from.
template <class T>
__device__ Row<T> reduce_row(const Formula<T>& formula, const T* z, const unsigned char* sides, int stride,
                             bool takes_part, int lane) {
  Row<T> row;
  AnchorWithLse<T>& state = row.anchor;
  T hardest[2] = {-INFINITY, -INFINITY}, sum[2] = {0, 0}, positives = 0, nonfinite = 0;
  for (int j = lane; j < stride; j += LANES) {
    const int side = own_side(sides[j]);
    const T hard = hardness(formula, side, z[j]);
    if (side == POSITIVE && hard > hardest[POSITIVE]) hardest[POSITIVE] = hard;
    if (side == NEGATIVE && hard > hardest[NEGATIVE]) hardest[NEGATIVE] = hard;
    positives += side == POSITIVE;
    nonfinite += side == NO_PAIR ? T(0) : z[j] * T(0);  // a product of finite numbers may overflow
  }
  positives = warp_sum(positives), nonfinite = warp_sum(nonfinite);
  for (int side = 0; side < 2; ++side) hardest[side] = warp_max(hardest[side]), state.bound[side] = -INFINITY;
  if (formula.mined) {  // eq. 11-12; one decision for both sides, so that both are empty or neither is
    for (int side = 0; side < 2; ++side) state.bound[side] = -(hardest[1 - side] + formula.epsilon);
    if (!(hardest[0] > state.bound[0] && hardest[1] > state.bound[1])) state.bound[0] = state.bound[1] = INFINITY;
  }
  for (int j = lane; j < stride; j += LANES) {
    const int side = own_side(sides[j]);
    if (side == NO_PAIR) continue;
    const T hard = hardness(formula, side, z[j]);
    if (!(hard > pick(state.bound, side))) continue;
    const T term = exp((hard - pick(hardest, side)) * fabs(pick(formula.scale, side)));
    sum[POSITIVE] += side == POSITIVE ? term : T(0), sum[NEGATIVE] += side == POSITIVE ? T(0) : term;
  }
  for (int side = 0; side < 2; ++side) {
    sum[side] = warp_sum(sum[side]);
    const bool some = sum[side] > 0;
    state.top_z[side] = some ? hardness(formula, side, hardest[side]) : T(0);
    state.log_sum[side] = some ? log(sum[side]) : T(INFINITY);
    state.lse[side] = some ? formula.scale[side] * state.top_z[side] + state.log_sum[side] : T(-INFINITY);
  }
  const int summed = summed_side(formula.loss);
  T total = 0, slopes = 0;
  if (summed != NO_PAIR) {
    for (int j = lane; j < stride; j += LANES) {
      if (own_side(sides[j]) != summed) continue;
      const T t = plus_other_lse(formula, state, summed, z[j]);
      total += softplus(t), slopes += sigmoid(t);
    }
    total = warp_sum(total), slopes = warp_sum(slopes);
  }
  finish_row(formula, row, positives, takes_part, total, slopes, sum_of_lses(formula, state));
  row.loss += nonfinite, state.slope[POSITIVE] += nonfinite, state.slope[NEGATIVE] += nonfinite;
  return row;
}

// The sums over a batch, the same bits in every block.
template <class T>
struct Totals {
  T loss = 0, valid = 0, denominator = 0, nonfinite = 0;
};

template <class T>
__device__ Totals<T> batch_totals(const Spec& spec, const Work<T>& work, T* scratch) {
  T sum[NUM_TOTALS] = {};
  for (int i = threadIdx.x; i < work.anchors.count; i += THREADS) {
    sum[TOTAL_LOSS] += work.value(LOSS, i), sum[TOTAL_VALID] += work.value(VALID, i);
    sum[TOTAL_DENOMINATOR] += work.value(DENOMINATOR, i), sum[TOTAL_NONFINITE] += work.anchors.nonfinite[i];
  }
  for (int j = threadIdx.x; !spec.square && j < work.refs.count; j += THREADS)
    sum[TOTAL_NONFINITE] += work.refs.nonfinite[j];
  for (int k = 0; k < NUM_TOTALS; ++k) {
    sum[k] = warp_sum(sum[k]);
    if (threadIdx.x % LANES == 0) scratch[k * WARPS + threadIdx.x / LANES] = sum[k];
  }
  __syncthreads();
  for (int k = 0; k < NUM_TOTALS; ++k) {
    sum[k] = 0;
    for (int w = 0; w < WARPS; ++w) sum[k] += scratch[k * WARPS + w];
  }
  return {sum[TOTAL_LOSS], sum[TOTAL_VALID], sum[TOTAL_DENOMINATOR], sum[TOTAL_NONFINITE]};
}

template <class T, int ROWS>
__global__ void __launch_bounds__(THREADS, 1)
    loss_and_gradient(const __grid_constant__ Spec spec, const __grid_constant__ Tensors at,
                      const __grid_constant__ Work<T> work) {
  DYNAMIC_SHARED(memory);
  const cooperative_groups::grid_group grid = cooperative_groups::this_grid();
  const Samples<T>&anchors = work.anchors, &refs = work.refs;
  const int lane = threadIdx.x % LANES, warp = threadIdx.x / LANES;
  const int every_warp = blockIdx.x * WARPS + warp, warps = gridDim.x * WARPS, width = work.width;

  // 1. Rows: normalised, transposed, and with one_pair their roles. The anchors' first, then the references'.
  const int anchor_quads = anchors.padded / 4, quads = anchor_quads + (spec.square ? 0 : refs.padded / 4);
  for (int quad = every_warp; quad < quads; quad += warps) {
    const bool of_anchors = quad < anchor_quads;
    prepare(spec, of_anchors ? anchors : refs, width, 4 * (of_anchors ? quad : quad - anchor_quads), lane);
  }
  for (int i = every_warp; spec.one_pair && i < anchors.count + (spec.square ? 0 : refs.count); i += warps) {
    const bool of_anchors = i < anchors.count;
    const Samples<T>&own = of_anchors ? anchors : refs, &other = of_anchors ? refs : anchors;
    assign_role(spec, own, other, of_anchors, of_anchors ? i : i - anchors.count, lane);
  }
  grid.sync();

  // 2. Pairs: the stripe (ROWS, others) of the block's own rows, their similarities and sides.
  const int anchor_blocks = anchor_blocks_of(anchors.count, ROWS);
  const bool owns_anchors = int(blockIdx.x) < anchor_blocks;
  const Samples<T>&own = owns_anchors ? anchors : refs, &others = owns_anchors ? refs : anchors;
  const int first = (owns_anchors ? blockIdx.x : blockIdx.x - anchor_blocks) * ROWS;
  const int count = max(0, min(ROWS, own.count - first)), stride = others.padded;
  const int widest = max(anchors.padded, refs.padded);
  T* z = reinterpret_cast<T*>(memory);   // (ROWS, stride)
  T* own_rows = z + ROWS * widest;       // (ROWS, width): own rows, then their gradients
  T* scratch = own_rows + ROWS * width;  // (4, WARPS), SCRATCH numbers
  Anchor<T>* own_anchors = reinterpret_cast<Anchor<T>*>(scratch + SCRATCH);     // (ROWS,)
  unsigned char* sides = reinterpret_cast<unsigned char*>(own_anchors + ROWS);  // (ROWS, stride)
  for (int k = threadIdx.x; k < ROWS * width; k += THREADS)
    own_rows[k] = k < count * width ? own.rows[size_t(first) * width + k] : T(0);
  __syncthreads();
  product<T, ROWS>(own_rows, others.columns, width, stride, groups_of(widest, width), z);
  classify_pairs<T, ROWS>(spec, work, owns_anchors, first, stride, z, sides);

  // 3. Rows: windows, log-sum-exps, losses and slopes.
  for (int r = warp; owns_anchors && r < count; r += WARPS) {
    const int i = first + r;
    const bool takes_part = !spec.one_pair || anchors.role[i] == ANCHOR;
    Row<T> row = reduce_row(work.formula, z + r * stride, sides + r * stride, stride, takes_part, lane);
    if (lane) continue;
    const T upstream = at.upstream ? static_cast<const T*>(at.upstream)[i] : T(1);
    work.value(LOSS, i) = row.loss, work.value(VALID, i) = row.valid, work.value(DENOMINATOR, i) = row.denominator;
    for (int side = 0; side < 2; ++side) {
      row.anchor.slope[side] *= upstream;
      work.value(TOP_Z + side, i) = row.anchor.top_z[side], work.value(LOG_SUM + side, i) = row.anchor.log_sum[side];
      work.value(SLOPE + side, i) = row.anchor.slope[side], work.value(BOUND + side, i) = row.anchor.bound[side];
    }
    own_anchors[r] = row.anchor;
  }
  grid.sync();

  // 4. The loss. With NONE the caller averages, and upstream holds its weights.
  const Totals<T> totals = batch_totals(spec, work, scratch);
  const bool averaged = spec.averaging != SUM && spec.averaging != NONE;
  const T divisor = averaged && totals.denominator > T(1) ? totals.denominator : T(1);
  T* loss = static_cast<T*>(at.loss);
  if (loss && spec.averaging == NONE) {
    for (int r = threadIdx.x; owns_anchors && r < count; r += THREADS)
      loss[first + r] = work.value(LOSS, first + r) + totals.nonfinite;
  } else if (loss && blockIdx.x == 0 && threadIdx.x == 0) {
    *loss = totals.loss / divisor + totals.nonfinite;
  }
  if (at.share && blockIdx.x == 0 && threadIdx.x == 0) *static_cast<T*>(at.share) = totals.valid / divisor;
  T* out = static_cast<T*>(owns_anchors ? at.dx : at.dy);
  if (!out) return;

  // 5. Weights, in z's place: what the anchors at both ends give to a pair. Of a distance z the weight is -w / z.
  for (int j = threadIdx.x; j < stride; j += THREADS) {
    const bool from_others = (spec.square || !owns_anchors) && j < others.count;
    Anchor<T> other = {};
    if (from_others) other = work.anchor(j);
    for (int r = 0; r < ROWS; ++r) {
      const int at = r * stride + j;
      const T value = z[at];
      T weight = 0;
      if (owns_anchors && r < count) weight = pair_weight(work.formula, own_anchors[r], own_side(sides[at]), value);
      if (from_others) weight += pair_weight(work.formula, other, other_side(sides[at]), value);
      if (spec.euclidean) weight = value > T(0) ? -weight / value : T(0);
      z[at] = weight;
    }
  }
  __syncthreads();

  // 6. Gradient: close pairs by differences, then weights times the others' rows, then through distance and norm.
  for (int r = warp; spec.euclidean && r < count; r += WARPS)
    close_gradients(z + r * stride, sides + r * stride, stride, own.rows + size_t(first + r) * width, others.rows,
                    width, spec.d, lane, out + size_t(first + r) * spec.d);
  if (spec.euclidean) {  // close pairs take no part in the product
    __syncthreads();
    for (int at = threadIdx.x; at < count * stride; at += THREADS)
      if (sides[at] & CLOSE) z[at] = 0;
    __syncthreads();
  }
  product<T, ROWS>(z, others.rows, stride, width, groups_of(width, stride), own_rows);
  for (int r = warp; r < count; r += WARPS) {
    T norm_grad = 0, radial = 0;
    for (int j = lane; spec.euclidean && j < stride; j += LANES) norm_grad -= z[r * stride + j];
    norm_grad = warp_sum(norm_grad);
    const T* row = own.rows + size_t(first + r) * width;
    if (spec.euclidean)
      for (int k = lane; k < spec.d; k += LANES) own_rows[r * width + k] += out[size_t(first + r) * spec.d + k];
    for (int k = lane; k < width; k += LANES) radial += (own_rows[r * width + k] + norm_grad * row[k]) * row[k];
    radial = spec.normalize ? warp_sum(radial) : T(0);
    const T scale = own.inverse_norm[first + r] / divisor;
    for (int k = lane; k < spec.d; k += LANES)
      out[size_t(first + r) * spec.d + k] =
          (own_rows[r * width + k] + norm_grad * row[k] - radial * row[k]) * scale + totals.nonfinite;
  }
}

template <class T>
using Kernel = void (*)(Spec, Tensors, Work<T>);

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

std::string error_text(cudaError_t error) { return error == cudaSuccess ? "" : cudaGetErrorString(error); }

template <class T>
std::string lay_out_as(const Spec& spec, const Limits& device, Layout& out) {
  const int64_t others = round_up(max(spec.n, spec.m)), width = round_up(spec.d),
                vectors = sizeof(Anchor<T>) / sizeof(T);
  Work<T> work;
  Tensors anywhere{};
  anywhere.workspace = &work;  // any address, to count from
  out.threads = THREADS;
  out.blocks = anchor_blocks_of(spec.n, spec.rows) + (spec.want_dy ? blocks_of(spec.m, spec.rows) : 0);
  out.shared = sizeof(T) * (spec.rows * (others + width + vectors) + SCRATCH) + spec.rows * others;
  if (out.blocks > device.processors) return "more blocks than multiprocessors";
  out.workspace = sizeof(T) * divide_workspace(spec, anywhere, work);
  // Allow all that the device has, because another shape's launch of the same kernel may need more.
  return error_text(
      cudaFuncSetAttribute(kernel_of<T>(spec.rows), cudaFuncAttributeMaxDynamicSharedMemorySize, device.shared));
}

template <class T>
std::string launch_as(const Spec& spec, const Layout& layout, const Tensors& tensors, cudaStream_t stream) {
  Work<T> work;
  divide_workspace(spec, tensors, work);
  void* arguments[] = {const_cast<Spec*>(&spec), const_cast<Tensors*>(&tensors), &work};
  return error_text(cudaLaunchCooperativeKernel(kernel_of<T>(spec.rows), dim3(layout.blocks), dim3(layout.threads),
                                                arguments, size_t(layout.shared), stream));
}

}  // namespace

std::string limits(int device, Limits& out) {
  cudaError_t error = cudaDeviceGetAttribute(&out.processors, cudaDevAttrMultiProcessorCount, device);
  if (!error) error = cudaDeviceGetAttribute(&out.shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (!error) error = cudaDeviceGetAttribute(&out.cooperative, cudaDevAttrCooperativeLaunch, device);
  cudaFuncAttributes machine_code;  // for the current device: none where this file was not compiled for it
  if (!error) error = cudaFuncGetAttributes(&machine_code, kernel_of<float>(1));
  return error_text(error);
}

std::string lay_out(const Spec& spec, const Limits& device, Layout& out) {
  return spec.number == FLOAT64 ? lay_out_as<double>(spec, device, out) : lay_out_as<float>(spec, device, out);
}

std::string launch(const Spec& spec, const Layout& layout, const Tensors& tensors, void* stream) {
  const cudaStream_t at = static_cast<cudaStream_t>(stream);
  return spec.number == FLOAT64 ? launch_as<double>(spec, layout, tensors, at)
                                : launch_as<float>(spec, layout, tensors, at);
}

}  // namespace flashpair::onchip
