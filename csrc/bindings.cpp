// The one file that knows Python: addresses and sizes in, nothing owned, the GIL released while a kernel runs.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cmath>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/kernels.h"

namespace py = pybind11;
using namespace flashpair;

namespace {

std::vector<std::string> instruction_sets() {  // best first
  std::vector<std::string> found;
#ifdef FLASHPAIR_X86_64
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("fma"))
    found.push_back("avx512");
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) found.push_back("avx2");
#endif
  found.push_back("baseline");
  return found;
}

template <class T>
Kernels<T> kernels(const std::string& isa) {
  for (const std::string& name : instruction_sets()) {
    if (name != isa) continue;
#ifdef FLASHPAIR_X86_64
    if constexpr (sizeof(T) == 4) {
      if (isa == "avx512") return avx512::kernels_float();
      if (isa == "avx2") return avx2::kernels_float();
    } else {
      if (isa == "avx512") return avx512::kernels_double();
      if (isa == "avx2") return avx2::kernels_double();
    }
#endif
    if constexpr (sizeof(T) == 4)
      return baseline::kernels_float();
    else
      return baseline::kernels_double();
  }
  throw std::invalid_argument("this processor does not run the instruction set " + isa);
}

// One pass over tiles: the problem and its reductions, shared by all threads. The tile's numbers come with each call.
template <class T>
class Pass {
 public:
  using Address = uintptr_t;
  static T* at(Address a) { return reinterpret_cast<T*>(a); }
  static const int64_t* ints(Address a) { return reinterpret_cast<const int64_t*>(a); }

  Pass(const std::string& isa, int64_t n, int64_t m, int64_t end, bool square, Address lo, Address hi, Address order,
       Address row_square, Address ref_square)
      : kernels_(kernels<T>(isa)),
        problem_{n, m, end, square, ints(lo), ints(hi), ints(order), at(row_square), at(ref_square)} {}

  void add(int op, int side, int transform, double scale, Address offset, Address ref_offset, Address lower,
           Address upper, Address peak, Address total, Address index, Address value, Address grad, Address grad_scale,
           Address grad_offset, Address grad_ref_offset) {
    reductions_.push_back({op, side, transform, static_cast<T>(scale), at(offset), at(ref_offset), at(lower), at(upper),
                           at(peak), reinterpret_cast<double*>(total), reinterpret_cast<int64_t*>(index), at(value),
                           at(grad), reinterpret_cast<double*>(grad_scale), at(grad_offset), at(grad_ref_offset)});
  }

  using Block = std::tuple<int64_t, int64_t, int64_t, int64_t, bool, bool>;
  static Tile<T> tile(Address z, int64_t ld, const Block& b) {
    return {at(z),          ld,             std::get<0>(b), std::get<1>(b),
            std::get<2>(b), std::get<3>(b), std::get<4>(b), std::get<5>(b)};
  }

  void reduce(Address z, int64_t ld, const Block& block) const {
    const Tile<T> t = tile(z, ld, block);
    kernels_.distances(problem_, t);
    for (const Reduction<T>& r : reductions_) kernels_.reduce(problem_, r, t);
  }
  int64_t list_live(int which, Address z, int64_t ld, const Block& block, Address entry, Address live_z,
                    int64_t capacity) const {
    const Live<T> live{reinterpret_cast<int32_t*>(entry), at(live_z), capacity};
    return kernels_.list_live(problem_, reductions_[which], tile(z, ld, block), live);
  }
  bool weigh(Address z, int64_t ld, const Block& block, int64_t row_block, Address w, Address row_pull,
             Address ref_pull) const {
    const Tile<T> t = tile(z, ld, block);
    kernels_.distances(problem_, t);
    return kernels_.weigh(problem_, reductions_.data(), static_cast<int>(reductions_.size()), t, row_block, at(w),
                          at(row_pull), at(ref_pull));
  }
  void scatter(const Block& block, Address entry, Address live_z, int64_t count, int64_t row_block, Address x,
               Address y, int64_t d, Address dx, Address dy, Address row_pull, Address ref_pull) const {
    const Live<T> live{reinterpret_cast<int32_t*>(entry), at(live_z), count};
    kernels_.scatter(problem_, reductions_[0], tile(0, 0, block), live, count, row_block, at(x), at(y), d, at(dx),
                     at(dy), at(row_pull), at(ref_pull));
  }

 private:
  Kernels<T> kernels_;
  Problem<T> problem_;
  std::vector<Reduction<T>> reductions_;
};

template <class T>
void bind_pass(py::module_& m, const char* name) {
  using P = Pass<T>;
  using A = typename P::Address;
  using Release = py::call_guard<py::gil_scoped_release>;
  py::class_<P>(m, name)
      .def(py::init<const std::string&, int64_t, int64_t, int64_t, bool, A, A, A, A, A>())
      .def("add", &P::add)
      .def("reduce", &P::reduce, Release())
      .def("list_live", &P::list_live, Release())
      .def("weigh", &P::weigh, Release())
      .def("scatter", &P::scatter, Release());
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "flashpair's CPU kernels: addresses and sizes in, nothing owned.";
  m.attr("MAX_TILE") = MAX_TILE;
  m.def("instruction_sets", &instruction_sets, "What this build holds and this processor runs, best first.");
  bind_pass<float>(m, "PassFloat");
  bind_pass<double>(m, "PassDouble");
}
