// One launch of csrc/cuda/onchip.cu for a sanitizer: a problem in numbers on standard input, its results on output.
//
// In: n m d rows loss averaging square unit euclidean one_pair mined want_dy, scales, shifts, epsilon, labels,
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
  Job job{};
  job.n = code[0], job.m = code[1], job.d = code[2], job.rows = code[3];
  job.number = FLOAT64, job.loss = code[4], job.averaging = code[5], job.square = code[6];
  job.unit = code[7], job.euclidean = code[8], job.one_pair = code[9], job.mined = code[10], job.want_dy = code[11];
  for (int side = 0; side < 2; ++side) job.scale[side] = numbers[side], job.shift[side] = numbers[2 + side];
  job.epsilon = numbers[4];
  const auto labels = read<int64_t>(job.n), ref_labels = read<int64_t>(job.square ? 0 : job.m);
  const auto x = read<double>(job.n * job.d), y = read<double>(job.square ? 0 : job.m * job.d);
  Limits device;
  Layout layout;
  std::string wrong = limits(0, device);
  if (wrong.empty()) wrong = lay_out(job, device, layout);
  std::vector<double> loss(1), dx(x.size()), dy(y.size());
  std::vector<uint64_t> workspace(layout.workspace / sizeof(double), SIGNALING);
  const Tensors tensors{x.data(),
                        job.square ? x.data() : y.data(),
                        labels.data(),
                        job.square ? labels.data() : ref_labels.data(),
                        nullptr,
                        loss.data(),
                        nullptr,
                        dx.data(),
                        job.want_dy ? dy.data() : nullptr,
                        workspace.data()};
  cuda_on_host::unwritten = SIGNALING;
  feenableexcept(FE_INVALID);
  if (wrong.empty()) wrong = launch(job, layout, tensors, nullptr);
  fedisableexcept(FE_INVALID);
  if (!wrong.empty()) return std::fprintf(stderr, "%s\n", wrong.c_str()), 1;
  for (const auto* results : {&loss, &dx, &dy})
    for (double value : *results) std::printf("%.17g\n", value);
}
