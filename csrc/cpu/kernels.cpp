// The kernels of one instruction set. This file is compiled once for each: FLASHPAIR_ISA names it, and the compiler's
// flags choose it.
#include "kernels.h"

#include "cpu/screen/candidates.h"
#include "cpu/tile/backward.h"
#include "cpu/tile/euclidean.h"
#include "cpu/transform/histogram.h"

namespace flashpair {
namespace FLASHPAIR_ISA {

template <class T>
Kernels<T> kernels() {
  return {similarities<T>,
          reduce<T>,
          list_kept<T>,
          candidate_similarities<T>,
          pair_similarities<T>,
          reduce_candidates<T>,
          list_kept_candidates<T>,
          backward<T>,
          scatter_close<T>,
          scatter_kept<T>,
          add_product<T>,
          VECTOR_BYTES > 16};
}
Kernels<float> kernels_float() { return kernels<float>(); }
Kernels<double> kernels_double() { return kernels<double>(); }

}  // namespace FLASHPAIR_ISA
}  // namespace flashpair
