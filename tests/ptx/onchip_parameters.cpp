// What the kernel of csrc/cuda/onchip.cu gets, packed as its launch packs it, for tests/ptx/onchip.py.
#include <cstring>

#include "cuda_runtime.h"
#include "workspace.h"

using namespace flashpair::onchip;

namespace {

template <class T>
void pack(const Spec& spec, const Tensors& tensors, char* out, int64_t* workspace) {
  Work<T> work;
  *workspace = sizeof(T) * divide_workspace(spec, tensors, work);
  const struct {
    Spec spec;
    Tensors tensors;
    Work<T> work;
  } all{spec, tensors, work};
  std::memcpy(out, &all, sizeof all);
}

}  // namespace

// at: the ten addresses of Tensors. out: 1024 bytes. workspace: how many bytes of it there are.
extern "C" void onchip_parameters(const int* shape, const int* code, const double* numbers, bool want_dy, void** at,
                                  char* out, int64_t* workspace) {
  std::array<int, 5> shapes;
  std::array<int, 7> codes;
  std::array<double, 5> values;
  std::copy_n(shape, 5, shapes.begin()), std::copy_n(code, 7, codes.begin()), std::copy_n(numbers, 5, values.begin());
  const Spec spec = make_spec(shapes, codes, values, want_dy);
  auto ids = [&](int k) { return static_cast<const int64_t*>(at[k]); };
  const Tensors tensors{at[0], at[1], ids(2), ids(3), at[4], at[5], at[6], at[7], at[8], at[9]};
  if (spec.number == FLOAT64)
    pack<double>(spec, tensors, out, workspace);
  else
    pack<float>(spec, tensors, out, workspace);
}
