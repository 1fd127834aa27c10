// Declares the kernels of every instruction set that this build holds.
#pragma once
#include "types.h"

namespace flashpair {
#define FLASHPAIR_DECLARE(isa)      \
  namespace isa {                   \
  Kernels<float> kernels_float();   \
  Kernels<double> kernels_double(); \
  }
FLASHPAIR_DECLARE(baseline)
#ifdef FLASHPAIR_X86_64
FLASHPAIR_DECLARE(avx2)
FLASHPAIR_DECLARE(avx512)
#endif
#undef FLASHPAIR_DECLARE
}  // namespace flashpair
