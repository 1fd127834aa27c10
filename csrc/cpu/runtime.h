// The BLAS and the OpenMP threads of torch, threads in a fixed order, and scratch memory.
//
// BLAS and OpenMP are addresses that Python finds at run time, so the build needs neither. Without them the kernels use
// their own products and ordinary threads. A second OpenMP runtime must be avoided: its threads would spin beside
// torch's.
// Deterministic: run_in_order fixes the order in which results are added, for any number of threads.
#pragma once
#include <algorithm>
#include <atomic>
#include <exception>
#include <mutex>
#include <new>
#include <thread>
#include <vector>

#include "types.h"

namespace flashpair {

// Fortran BLAS, 32-bit integers: column-major C (m, n) = alpha op(A) op(B) + beta C.
template <class T>
using Gemm = void (*)(const char* ta, const char* tb, const int* m, const int* n, const int* k, const T* alpha,
                      const T* a, const int* lda, const T* b, const int* ldb, const T* beta, T* c, const int* ldc);

struct Runtime {
  Gemm<float> sgemm = nullptr;
  Gemm<double> dgemm = nullptr;
  int (*set_blas_threads)(int) = nullptr;  // of the calling thread; returns the old setting
  void (*parallel)(void (*)(void*), void*, unsigned threads, unsigned flags) = nullptr;  // GOMP_parallel

  template <class T>
  Gemm<T> gemm() const {
    if constexpr (sizeof(T) == 4)
      return sgemm;
    else
      return dgemm;
  }
};

inline Runtime& runtime() {
  static Runtime instance;
  return instance;
}

// Runs `job` on up to `threads` threads at once, the caller's among them. No exception may leave a thread, so the first
// one that is thrown on any of them is thrown again here, after all have ended.
template <class Job>
void run_on_threads(int threads, Job&& job) {
  auto set = runtime().set_blas_threads;
  if (threads <= 1) {
    struct Restore {  // sets the caller's setting again, whatever happens
      int (*set)(int);
      int before;
      ~Restore() {
        if (set) set(before);
      }
    } restore{set, set ? set(1) : 0};
    return job();
  }
  std::exception_ptr error;
  std::atomic<bool> failed{false};
  auto worker = [&] {
    const int before = set ? set(1) : 0;
    try {
      job();
    } catch (...) {
      if (!failed.exchange(true)) error = std::current_exception();
    }
    if (set) set(before);
  };
  if (runtime().parallel) {
    runtime().parallel([](void* f) { (*static_cast<decltype(worker)*>(f))(); }, &worker, threads, 0);
  } else {
    std::vector<std::thread> others;
    try {
      others.reserve(threads - 1);
      for (int k = 1; k < threads; ++k) others.emplace_back(worker);
    } catch (...) {  // no memory or no more threads: those that have started do all of the work
    }
    worker();
    for (std::thread& t : others) t.join();
  }
  if (error) std::rethrow_exception(error);
}

// Calls work(first, last) for chunks of the rows [0, n), each on some thread.
template <class Work>
void parallel_chunks(int64_t n, int threads, Work&& work) {
  constexpr int64_t CHUNK = 512;
  if (n <= CHUNK) return work(0, n);
  std::atomic<int64_t> next{0};
  run_on_threads(threads, [&] {
    for (int64_t first; (first = next.fetch_add(CHUNK)) < n;) work(first, std::min(first + CHUNK, n));
  });
}

// Calls work(item) for the items 0, 1, ..., count - 1 on several threads. Items that touch the same resource run in
// that order, so that results do not depend on the number of threads. touches(item) is a pair of
// resources, -1 for none.
template <class Touches, class Work>
void run_in_order(int64_t count, int64_t resources, int threads, Touches&& touches, Work&& work) {
  std::vector<int64_t> issued(resources);
  std::vector<std::atomic<int64_t>> done(resources);
  std::mutex handing_out;
  int64_t next = 0;
  std::exception_ptr error;  // of an item; once it is set, no item waits for its turn
  std::atomic<bool> failed{false};
  auto wait = [&](int64_t resource, int64_t turn) {
    for (int spins = 0; done[resource].load(std::memory_order_acquire) != turn && !failed; ++spins)
      if (spins > 64) std::this_thread::yield();
  };
  run_on_threads(threads, [&] {
    for (;;) {
      int64_t item, first, second, first_turn = 0, second_turn = 0;
      {
        std::lock_guard<std::mutex> hold(handing_out);
        if (next == count || failed) return;
        item = next++;
        const auto pair = touches(item);
        first = pair.first, second = pair.second;
        if (first >= 0) first_turn = issued[first]++;
        if (second >= 0) second_turn = issued[second]++;
      }
      if (first >= 0) wait(first, first_turn);
      if (second >= 0) wait(second, second_turn);
      try {
        if (!failed) work(item);
      } catch (...) {
        std::lock_guard<std::mutex> hold(handing_out);
        if (!failed.exchange(true)) error = std::current_exception();
      }
      if (first >= 0) done[first].store(first_turn + 1, std::memory_order_release);
      if (second >= 0) done[second].store(second_turn + 1, std::memory_order_release);
    }
  });
  if (error) std::rethrow_exception(error);
}

// A worker's scratch memory, kept between passes: fresh pages cost more than a small tile's product.
class ScratchBuffer {
 public:
  explicit ScratchBuffer(size_t bytes) {
    std::lock_guard<std::mutex> hold(lock());
    if (!free_list().empty()) {
      memory_ = std::move(free_list().back());
      free_list().pop_back();
    }
    if (memory_.size() < bytes + ALIGN) memory_.resize(bytes + ALIGN);
  }
  ~ScratchBuffer() {
    std::lock_guard<std::mutex> hold(lock());
    try {
      free_list().push_back(std::move(memory_));
    } catch (const std::bad_alloc&) {  // the list cannot grow: the memory goes back to the system
    }
  }
  void* get() {
    const uintptr_t at = reinterpret_cast<uintptr_t>(memory_.data());
    return reinterpret_cast<void*>((at + ALIGN - 1) / ALIGN * ALIGN);
  }

 private:
  static constexpr size_t ALIGN = 64;
  static std::mutex& lock() {
    static std::mutex m;
    return m;
  }
  static std::vector<std::vector<unsigned char>>& free_list() {
    static std::vector<std::vector<unsigned char>> list;
    return list;
  }
  std::vector<unsigned char> memory_;
};

}  // namespace flashpair
