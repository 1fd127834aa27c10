// flashpair._onchip. It takes addresses and sizes and owns no tensor. It imports without a driver: CUDA starts with the
// first Launch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <stdexcept>
#include <string>
#include <tuple>

#include "onchip.h"

namespace py = pybind11;
using namespace flashpair::onchip;

namespace {

void check(const std::string& reason) {
  if (!reason.empty()) throw std::runtime_error("onchip: " + reason);
}

// A loss of some shape, laid out once for the current device and launched many times on it.
class Launch {
 public:
  Launch(int device, const Spec& spec) : spec_(spec) {
    Limits out;
    check(limits(device, out));
    check(lay_out(spec_, out, layout_));
  }

  void operator()(uintptr_t x, uintptr_t y, uintptr_t labels, uintptr_t ref_labels, uintptr_t upstream, uintptr_t loss,
                  uintptr_t share, uintptr_t dx, uintptr_t dy, uintptr_t workspace, uintptr_t stream) const {
    auto at = [](uintptr_t address) { return reinterpret_cast<void*>(address); };
    auto ids = [&](uintptr_t address) { return static_cast<const int64_t*>(at(address)); };
    const Tensors tensors{at(x),    at(y),     ids(labels), ids(ref_labels), at(upstream),
                          at(loss), at(share), at(dx),      at(dy),          at(workspace)};
    check(launch(spec_, layout_, tensors, at(stream)));
  }

  const Layout& layout() const { return layout_; }

 private:
  Spec spec_;
  Layout layout_;
};

}  // namespace

PYBIND11_MODULE(_onchip, module) {
  using namespace py::literals;
  module.doc() = "flashpair's CUDA C++ kernel: a whole loss in one launch.";
#ifdef ONCHIP_EMULATED
  module.attr("emulated") = true;
#else
  module.attr("emulated") = false;
#endif
  module.attr("WORDS") =
      py::dict("loss"_a = FLASHPAIR_WORDS(FLASHPAIR_LOSSES), "averaging"_a = FLASHPAIR_WORDS(FLASHPAIR_AVERAGINGS),
               "number"_a = FLASHPAIR_WORDS(FLASHPAIR_NUMBERS));
  module.def(
      "limits",
      [](int device) {
        Limits out;
        check(limits(device, out));
        return std::make_tuple(out.processors, out.shared, out.cooperative != 0);
      },
      "Multiprocessors, bytes of shared memory a block may have, and whether there are cooperative launches.");
  py::class_<Launch>(module, "Launch")
      .def(py::init([](int device, const std::array<int, 5>& shape, const std::array<int, 7>& code,
                       const std::array<double, 5>& numbers,
                       bool want_dy) { return Launch(device, make_spec(shape, code, numbers, want_dy)); }))
      .def("__call__", &Launch::operator(), py::call_guard<py::gil_scoped_release>())
      .def_property_readonly("blocks", [](const Launch& l) { return l.layout().blocks; })
      .def_property_readonly("threads", [](const Launch& l) { return l.layout().threads; })
      .def_property_readonly("shared", [](const Launch& l) { return l.layout().shared; })
      .def_property_readonly("workspace", [](const Launch& l) { return l.layout().workspace; });
}
