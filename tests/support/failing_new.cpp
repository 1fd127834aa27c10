// Preloaded: operator new throws where flashpair's extension asks for memory, at the call that was chosen.
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <new>

static std::atomic<long> countdown{-1}, calls{0};
static uintptr_t first = 0, last = 0;  // addresses of the extension's code

extern "C" void fail_within(uintptr_t from, uintptr_t to) { first = from, last = to; }
extern "C" void fail_at(long call) { calls = 0, countdown = call; }
extern "C" long calls_seen() { return calls; }

static void* get(size_t bytes, void* caller) {
  const uintptr_t at = reinterpret_cast<uintptr_t>(caller);
  if (at >= first && at < last && bytes >= 512) {  // pybind11 itself does not survive a failure of its own few bytes
    ++calls;
    if (countdown >= 0 && countdown.fetch_sub(1) == 0) throw std::bad_alloc();
  }
  void* memory = malloc(bytes ? bytes : 1);
  if (!memory) throw std::bad_alloc();
  return memory;
}

void* operator new(size_t bytes) { return get(bytes, __builtin_return_address(0)); }
void* operator new[](size_t bytes) { return get(bytes, __builtin_return_address(0)); }
void operator delete(void* memory) noexcept { free(memory); }
void operator delete[](void* memory) noexcept { free(memory); }
void operator delete(void* memory, size_t) noexcept { free(memory); }
void operator delete[](void* memory, size_t) noexcept { free(memory); }
