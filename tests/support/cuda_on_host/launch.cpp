// One launch of csrc/cuda/onchip.cu for a sanitizer: a problem in numbers on standard input, its results on output.
//
// In: n m d rows loss averaging square normalize euclidean one_pair mined want_dy, scales, shifts, epsilon, labels,
// ref_labels, x, y; of a square problem without ref_labels and y.
// Out: the loss, dL/dx and, of a rectangular problem, dL/dy.
// Shared memory and workspace start as NaNs that signal: arithmetic with what nobody wrote, a comparison, too, ends the
// program (SIGFPE), also where the result would be thrown away.
#include <fenv.h>

#include <cstdio>
#include <iostream>
#include <vector>

#include "cuda_runtime.h"
#include "onchip.h"

using namespace flashpair::onchip;

constexpr uint64_t SIGNALING = 0x7FF4000000000000;

template <class T>
std::vector<T> read(size_t count) {
  std::vector<T> found(count);
  for (T& value : found) std::cin >> value;
  return found;
}

int main() {
  const auto code = read<int>(12);
  const auto numbers = read<double>(5);
  Spec spec{};
  spec.n = code[0], spec.m = code[1], spec.d = code[2], spec.rows = code[3];
  spec.number = FLOAT64, spec.loss = code[4], spec.averaging = code[5], spec.square = code[6];
  spec.normalize = code[7], spec.euclidean = code[8], spec.one_pair = code[9], spec.mined = code[10],
  spec.want_dy = code[11];
  for (int side = 0; side < 2; ++side) spec.scale[side] = numbers[side], spec.shift[side] = numbers[2 + side];
  spec.epsilon = numbers[4];
  const auto labels = read<int64_t>(spec.n), ref_labels = read<int64_t>(spec.square ? 0 : spec.m);
  const auto x = read<double>(spec.n * spec.d), y = read<double>(spec.square ? 0 : spec.m * spec.d);
  Limits device;
  Layout layout;
  std::string wrong = limits(0, device);
  if (wrong.empty()) wrong = lay_out(spec, device, layout);
  std::vector<double> loss(1), dx(x.size()), dy(y.size());
  std::vector<uint64_t> workspace(layout.workspace / sizeof(double), SIGNALING);
  const Tensors tensors{x.data(),
                        spec.square ? x.data() : y.data(),
                        labels.data(),
                        spec.square ? labels.data() : ref_labels.data(),
                        nullptr,
                        loss.data(),
                        nullptr,
                        dx.data(),
                        spec.want_dy ? dy.data() : nullptr,
                        workspace.data()};
  cuda_on_host::unwritten = SIGNALING;
  feenableexcept(FE_INVALID);
  if (wrong.empty()) wrong = launch(spec, layout, tensors, nullptr);
  fedisableexcept(FE_INVALID);
  if (!wrong.empty()) return std::fprintf(stderr, "%s\n", wrong.c_str()), 1;
  for (const auto* results : {&loss, &dx, &dy})
    for (double value : *results) std::printf("%.17g\n", value);
}
