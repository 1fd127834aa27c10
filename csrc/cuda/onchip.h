// What the binding and the kernel of `onchip` share: no CUDA header, nothing that owns memory.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>

#include "../small_batch/job.h"

namespace flashpair::onchip {

using namespace whole;

struct Layout {
  int blocks, threads;
  int64_t shared, workspace;  // bytes a block, bytes in all
};

struct Limits {
  int processors, shared, cooperative;
};

// These return what went wrong, empty if nothing did. `device` is the current one.
std::string limits(int device, Limits& found);
std::string lay_out(const Job& job, const Limits& device, Layout& found);  // and makes the kernel ready
std::string launch(const Job& job, const Layout& layout, const Tensors& tensors, void* stream);

}  // namespace flashpair::onchip
