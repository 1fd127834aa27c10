// Compiled once for each instruction set, which FLASHPAIR_ISA names and the compiler's flags choose.
#include "kernels.h"

#include "cpu/screen/survivors.h"
#include "cpu/tile/euclidean.h"
#include "cpu/tile/weigh.h"
#include "cpu/transform/histogram.h"

namespace flashpair {
namespace FLASHPAIR_ISA {

template <class T>
Kernels<T> kernels() {
  return {similarities<T>, reduce<T>, list_live<T>,    similar<T>, pair_similarities<T>, reduce_listed<T>,
          keep_live<T>,    weigh<T>,  scatter_near<T>, scatter<T>, add_product<T>,       VECTOR_BYTES > 16};
}
Kernels<float> kernels_float() { return kernels<float>(); }
Kernels<double> kernels_double() { return kernels<double>(); }

}  // namespace FLASHPAIR_ISA
}  // namespace flashpair
