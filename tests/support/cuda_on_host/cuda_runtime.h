// CUDA's words on the host, for csrc/cuda: a std::thread for each thread, barriers for warp, block and grid.
//
// Made to find mistakes, not to be fast. Shared memory starts as NaN. Barriers of a block and of the grid order memory,
// as ThreadSanitizer sees it, and a shuffle orders none, as in CUDA. CUDA_ON_HOST_SKIP=<file>:<line> leaves out the
// barrier on that line: a test that passes without it does not test it.
#pragma once
#include <linux/futex.h>
#include <math.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <map>
#include <memory>
#include <string>
#include <thread>
#include <tuple>
#include <utility>
#include <vector>

#define __host__
#define __device__
#define __global__
#define __grid_constant__
#define __launch_bounds__(...)
#define DYNAMIC_SHARED(name) unsigned char* name = cuda_on_host::self.block->shared

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned count = 1) : x(count) {}
};

namespace cuda_on_host {

constexpr int LANES = 32;
inline uint64_t unwritten = ~uint64_t(0);  // what shared memory starts as: NaN, as float and as double

inline int setting(const char* name, int otherwise) {
  const char* word = std::getenv(name);
  return word ? std::atoi(word) : otherwise;
}

class Barrier {
 public:
  // ordered: what was written before is seen after it.
  void wait(unsigned all, bool ordered) {
    const auto order = ordered ? std::memory_order_acq_rel : std::memory_order_relaxed;
    const auto see = ordered ? std::memory_order_acquire : std::memory_order_relaxed;
    const uint32_t phase = phase_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, order) + 1 == all) {
      arrived_.store(0, std::memory_order_relaxed);
      phase_.fetch_add(1, order);
      syscall(SYS_futex, &phase_, FUTEX_WAKE_PRIVATE, std::numeric_limits<int>::max(), nullptr, nullptr, 0);
      return;
    }
    while (phase_.load(see) == phase) syscall(SYS_futex, &phase_, FUTEX_WAIT_PRIVATE, phase, nullptr, nullptr, 0);
  }

 private:
  std::atomic<uint32_t> arrived_{0}, phase_{0};
};

struct Warp {
  Barrier barrier;
  std::atomic<uint64_t> slot[2][LANES];  // by turns: one barrier a shuffle
};

struct Grid {
  unsigned threads;
  Barrier barrier;
};

struct Block {
  unsigned threads;
  unsigned char* shared;
  Barrier barrier;
  std::vector<Warp> warps;
};

struct Thread {
  Grid* grid;
  Block* block;
  dim3 thread, block_place, grid_size;
  int turn = 0;
};
inline thread_local Thread self;

inline bool skipped(const char* file, int line) {
  static const char* skip = std::getenv("CUDA_ON_HOST_SKIP");
  const char* name = std::strrchr(file, '/');
  return skip && std::string(name ? name + 1 : file) + ":" + std::to_string(line) == skip;
}

inline void sync_block(const char* file, int line) {
  if (!skipped(file, line)) self.block->barrier.wait(self.block->threads, true);
}

template <class... A, size_t... K>
void call(void (*kernel)(A...), void** args, std::index_sequence<K...>) {
  kernel(*static_cast<std::decay_t<A>*>(args[K])...);
}

}  // namespace cuda_on_host

#define threadIdx cuda_on_host::self.thread
#define blockIdx cuda_on_host::self.block_place
#define gridDim cuda_on_host::self.grid_size
#define __syncthreads() cuda_on_host::sync_block(__FILE__, __LINE__)

inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }

template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  using namespace cuda_on_host;
  const int lane = threadIdx.x % LANES;
  Warp& warp = self.block->warps[threadIdx.x / LANES];
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  auto& slot = warp.slot[self.turn ^= 1];
  slot[lane].store(bits, std::memory_order_relaxed);
  warp.barrier.wait(LANES, false);
  bits = slot[lane ^ mask].load(std::memory_order_relaxed);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorCooperativeLaunchTooLarge = 720 };
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
  cudaDevAttrCooperativeLaunch
};
struct cudaFuncAttributes {};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
using cudaStream_t = void*;

inline const char* cudaGetErrorString(cudaError_t) { return "invalid value"; }

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int) {
  using cuda_on_host::setting;
  *value = which == cudaDevAttrMultiProcessorCount            ? setting("CUDA_ON_HOST_PROCESSORS", 8)
           : which == cudaDevAttrMaxSharedMemoryPerBlockOptin ? setting("CUDA_ON_HOST_SHARED", 227 * 1024)
                                                              : setting("CUDA_ON_HOST_COOPERATIVE", 1);
  return cudaSuccess;
}

// A kernel's dynamic shared memory, at most; 48 KB unless it was told otherwise.
template <class Kernel>
size_t& shared_limit(Kernel kernel) {
  static std::map<Kernel, size_t> limits;
  return limits.emplace(kernel, 48 * 1024).first->second;
}

template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel kernel, cudaFuncAttribute, int value) {
  return shared_limit(kernel) = value, cudaSuccess;
}

template <class Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, Kernel) {
  return cudaSuccess;
}

template <class... A>
cudaError_t cudaLaunchCooperativeKernel(void (*kernel)(A...), dim3 blocks, dim3 threads, void** args, size_t shared,
                                        cudaStream_t) {
  using namespace cuda_on_host;
  if (shared > shared_limit(kernel)) return cudaErrorInvalidValue;
  if (blocks.x > unsigned(setting("CUDA_ON_HOST_PROCESSORS", 8))) return cudaErrorCooperativeLaunchTooLarge;
  Grid grid{blocks.x * threads.x, {}};
  std::vector<std::unique_ptr<uint64_t[]>> memory;
  std::vector<std::unique_ptr<Block>> all;
  std::vector<std::thread> running;
  for (unsigned b = 0; b < blocks.x; ++b) {
    const size_t words = shared / 8 + 1;
    memory.emplace_back(new uint64_t[words]);
    std::fill_n(memory.back().get(), words, unwritten);
    auto* bytes = reinterpret_cast<unsigned char*>(memory.back().get());
    all.emplace_back(new Block{threads.x, bytes, {}, std::vector<Warp>(threads.x / LANES)});
  }
  for (unsigned b = 0; b < blocks.x; ++b)
    for (unsigned t = 0; t < threads.x; ++t)
      running.emplace_back([&, b, t] {
        self = {&grid, all[b].get(), dim3(t), dim3(b), blocks};
        call(kernel, args, std::index_sequence_for<A...>());
      });
  for (std::thread& thread : running) thread.join();
  return cudaSuccess;
}
