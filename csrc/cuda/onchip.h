// What the binding and the kernel of `onchip` share. It needs no CUDA header and owns no memory.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>

#include "../small_batch/spec.h"

namespace flashpair::onchip {

using namespace small_batch;

struct Layout {
  int blocks, threads;
  int64_t shared, workspace;  // bytes a block, bytes in all
};

struct Limits {
  int processors, shared, cooperative;
};

// Each returns what went wrong, or an empty string. `device` is the current one.
std::string limits(int device, Limits& out);
std::string lay_out(const Spec& spec, const Limits& device, Layout& out);  // also sets up the kernel
std::string launch(const Spec& spec, const Layout& layout, const Tensors& tensors, void* stream);

}  // namespace flashpair::onchip
