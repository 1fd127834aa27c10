// Compiled once for each instruction set, which FLASHPAIR_ISA names and the compiler's flags choose.
#include "kernels.h"

#include "euclidean.h"
#include "histogram.h"
#include "survivors.h"
#include "weigh.h"

namespace flashpair {
namespace FLASHPAIR_ISA {

Kernels<float> kernels_float() {
  return {distances<float>, reduce<float>, list_live<float>, similar<float>,      reduce_listed<float>,
          keep_live<float>, weigh<float>,  scatter<float>,   dot_products<float>, add_product<float>};
}
Kernels<double> kernels_double() {
  return {distances<double>, reduce<double>, list_live<double>, similar<double>,      reduce_listed<double>,
          keep_live<double>, weigh<double>,  scatter<double>,   dot_products<double>, add_product<double>};
}

}  // namespace FLASHPAIR_ISA
}  // namespace flashpair
