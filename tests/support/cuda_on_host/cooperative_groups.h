#pragma once
#include "cuda_runtime.h"

namespace cooperative_groups {

struct grid_group {
  void sync(const char* file = __builtin_FILE(), int line = __builtin_LINE()) const {
    using cuda_on_host::self;
    if (!cuda_on_host::skipped(file, line)) self.grid->barrier.wait(self.grid->threads, true);
  }
};
inline grid_group this_grid() { return {}; }

}  // namespace cooperative_groups
