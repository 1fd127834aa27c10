// What this process already has and we must not have twice: the BLAS that torch carries and its OpenMP threads.
//
// Both are addresses found at run time, so the build needs neither. Without them: the kernels' own products, and
// ordinary threads. A second OpenMP runtime is what has to be avoided: its threads would spin beside torch's.
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
  static Runtime found;
  return found;
}

// Runs `job` on up to `threads` threads at once, the caller's among them. What it throws on any of them, the first of
// it, is thrown here after all have ended: no exception may leave an OpenMP thread, or a thread of any kind.
template <class Job>
void run_together(int threads, Job&& job) {
  auto set = runtime().set_blas_threads;
  if (threads <= 1) {
    struct Restore {  // the caller's setting, whatever happens
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
  auto alone = [&] {
    const int before = set ? set(1) : 0;
    try {
      job();
    } catch (...) {
      if (!failed.exchange(true)) error = std::current_exception();
    }
    if (set) set(before);
  };
  if (runtime().parallel) {
    runtime().parallel([](void* f) { (*static_cast<decltype(alone)*>(f))(); }, &alone, threads, 0);
  } else {
    std::vector<std::thread> others;
    try {
      others.reserve(threads - 1);
      for (int k = 1; k < threads; ++k) others.emplace_back(alone);
    } catch (...) {  // no memory, or no thread to be had: those that there are do all of it
    }
    alone();
    for (std::thread& t : others) t.join();
  }
  if (error) std::rethrow_exception(error);
}

// Calls work(first, last) for the rows [0, n) in chunks, each on some thread.
template <class Work>
void in_chunks(int64_t n, int threads, Work&& work) {
  constexpr int64_t CHUNK = 512;
  if (n <= CHUNK) return work(0, n);
  std::atomic<int64_t> next{0};
  run_together(threads, [&] {
    for (int64_t first; (first = next.fetch_add(CHUNK)) < n;) work(first, std::min(first + CHUNK, n));
  });
}

// Hands out items 0, 1, ..., count - 1. Items that touch the same thing are worked on in that order, so that results
// do not depend on the number of threads; `touches(item)` gives two things, -1 for none.
template <class Touches, class Work>
void in_order(int64_t count, int64_t things, int threads, Touches&& touches, Work&& work) {
  std::vector<int64_t> issued(things);
  std::vector<std::atomic<int64_t>> done(things);
  std::mutex turn;
  int64_t next = 0;
  std::exception_ptr error;  // of an item, after which the others that wait for its turn must not wait any more
  std::atomic<bool> failed{false};
  auto wait = [&](int64_t thing, int64_t place) {
    for (int spins = 0; done[thing].load(std::memory_order_acquire) != place && !failed; ++spins)
      if (spins > 64) std::this_thread::yield();
  };
  run_together(threads, [&] {
    for (;;) {
      int64_t item, first, second, first_place = 0, second_place = 0;
      {
        std::lock_guard<std::mutex> hold(turn);
        if (next == count || failed) return;
        item = next++;
        const auto pair = touches(item);
        first = pair.first, second = pair.second;
        if (first >= 0) first_place = issued[first]++;
        if (second >= 0) second_place = issued[second]++;
      }
      if (first >= 0) wait(first, first_place);
      if (second >= 0) wait(second, second_place);
      try {
        if (!failed) work(item);
      } catch (...) {
        std::lock_guard<std::mutex> hold(turn);
        if (!failed.exchange(true)) error = std::current_exception();
      }
      if (first >= 0) done[first].store(first_place + 1, std::memory_order_release);
      if (second >= 0) done[second].store(second_place + 1, std::memory_order_release);
    }
  });
  if (error) std::rethrow_exception(error);
}

// A worker's tile buffers, kept between passes: fresh pages cost more than a small tile's product.
class Buffers {
 public:
  explicit Buffers(size_t bytes) {
    std::lock_guard<std::mutex> hold(lock());
    if (!free_list().empty()) {
      memory_ = std::move(free_list().back());
      free_list().pop_back();
    }
    if (memory_.size() < bytes + ALIGN) memory_.resize(bytes + ALIGN);
  }
  ~Buffers() {
    std::lock_guard<std::mutex> hold(lock());
    try {
      free_list().push_back(std::move(memory_));
    } catch (const std::bad_alloc&) {  // no room to remember it: it goes back to the system
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
