// The one file that knows Python: addresses and sizes in, nothing owned, the GIL released while a kernel runs.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/screen/nearest.h"
#include "cpu/small_batch.h"
#include "cpu/tile/pass.h"
#include "cpu/tile/rows.h"

namespace py = pybind11;
using namespace flashpair;

namespace {

std::vector<std::string> instruction_sets() {  // best first
  std::vector<std::string> found;
#ifdef FLASHPAIR_X86_64
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("fma")) {
    if (__builtin_cpu_supports("avx512vnni")) found.push_back("avx512vnni");
    found.push_back("avx512");
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) found.push_back("avx2");
#endif
  found.push_back("baseline");
  return found;
}

void check(const std::string& isa) {
  for (const std::string& name : instruction_sets())
    if (name == isa) return;
  throw std::invalid_argument("this processor does not run the instruction set " + isa);
}

template <class T>
Kernels<T> kernels(const std::string& isa) {
  check(isa);
#ifdef FLASHPAIR_X86_64
  const bool wide = isa == "avx512" || isa == "avx512vnni";
  if constexpr (sizeof(T) == 4) {
    if (wide) return avx512::kernels_float();
    if (isa == "avx2") return avx2::kernels_float();
  } else {
    if (wide) return avx512::kernels_double();
    if (isa == "avx2") return avx2::kernels_double();
  }
#endif
  if constexpr (sizeof(T) == 4)
    return baseline::kernels_float();
  else
    return baseline::kernels_double();
}

Int8Kernels int8_kernels(const std::string& isa) {
  check(isa);
#ifdef FLASHPAIR_X86_64
  if (isa == "avx512vnni") return avx512vnni::int8_kernels();
  if (isa == "avx512") return avx512::int8_kernels();
  if (isa == "avx2") return avx2::int8_kernels();
#endif
  return baseline::int8_kernels();
}

using Address = uintptr_t;
template <class T>
T* at(Address a) {
  return reinterpret_cast<T*>(a);
}

// tiled.py's _operands: op, side, transform, scale, offset, ref_offset, lower, upper, the bounds' reductions and
// shifts, and the offset where it is one number.
using Term = std::tuple<int, int, int, double, Address, Address, Address, Address, int, int, double, double, double>;

template <class T>
void bind_pass(py::module_& m, const char* name) {
  using P = Pass<T>;
  using Release = py::call_guard<py::gil_scoped_release>;
  using Lists = std::tuple<Address, Address, Address, int64_t>;  // LiveLists; zeros for none
  auto lists = [](const Lists& l) {
    return LiveLists<T>{at<int32_t>(std::get<0>(l)), at<int32_t>(std::get<1>(l)), at<T>(std::get<2>(l)),
                        std::get<3>(l)};
  };
  py::class_<P>(m, name)
      .def(py::init([](const std::string& isa, int64_t n, int64_t m, int64_t end, bool square, int64_t split,
                       Address lo, Address hi, Address order, Address row_square, Address ref_square, bool squared,
                       Address x, Address y, int64_t d, int64_t size, int64_t lanes) {
        const Problem<T> problem{n,
                                 m,
                                 end,
                                 square,
                                 at<int64_t>(lo),
                                 at<int64_t>(hi),
                                 at<int64_t>(order),
                                 at<T>(row_square),
                                 at<T>(ref_square),
                                 squared,
                                 split};
        return P(kernels<T>(isa), problem, at<T>(x), at<T>(y), d, size, lanes);
      }))
      .def("add",
           [](P& pass, const Term& t, const Program* program, Address index, Address value, Address top, Address rest,
              Address grad, Address grad_scale, Address grad_offset, Address grad_ref_offset) {
             const auto [op, side, transform, scale, offset, ref_offset, lower, upper, lower_of, upper_of, lower_shift,
                         upper_shift, shift] = t;
             pass.add({op,
                       side,
                       program ? PROGRAM : transform,
                       static_cast<T>(scale),
                       static_cast<T>(shift),
                       at<T>(offset),
                       at<T>(ref_offset),
                       at<T>(lower),
                       at<T>(upper),
                       lower_of,
                       upper_of,
                       lower_shift,
                       upper_shift,
                       nullptr,
                       nullptr,
                       at<int64_t>(index),
                       at<T>(value),
                       at<T>(grad),
                       at<T>(top),
                       at<T>(rest),
                       at<double>(grad_scale),
                       at<T>(grad_offset),
                       at<T>(grad_ref_offset),
                       program});
           })
      .def(
          "forward",
          [lists](P& pass, int threads, Address values, Address index, const Lists& live, int listed,
                  const std::string& screen, std::shared_ptr<Int8Rows> refs) {
            // screen: the instruction set of its products, or empty; refs: round_rows' of the references, or null
            Tally tally;
            const Int8Kernels int8 = screen.empty() ? Int8Kernels{} : int8_kernels(screen);
            pass.forward(threads, at<T>(values), at<int64_t>(index), lists(live), listed,
                         {screen.empty() ? nullptr : &int8, std::move(refs), &tally});
            return std::array<int64_t, 5>{tally.tiles, tally.whole, tally.pairs, tally.candidates, tally.live};
          },
          Release())
      .def(
          "nearest",
          [](const P& pass, int threads, const std::string& isa, int64_t k, Address values, Address index) {
            Nearest<T>(pass).run(threads, int8_kernels(isa), k, at<T>(values), at<int64_t>(index));
          },
          Release())
      .def(
          "similarities",  // z of row rows[k] and reference cols[k], the same bits as in a tile
          [](const P& pass, int threads, int64_t count, Address rows, Address cols, Address z) {
            pass.similarities(threads, count, at<int64_t>(rows), at<int64_t>(cols), at<T>(z));
          },
          Release())
      .def(
          "backward",
          [lists](P& pass, int threads, Address values, Address dx, Address dy, const Lists& live) {
            pass.backward(threads, at<T>(values), at<T>(dx), at<T>(dy), lists(live));
          },
          Release());
}

// What whole::job_of takes, the loss' tensors (x to dy; addresses), and how it is cut into tiles and threads.
void whole_loss(const std::string& isa, const std::array<int, 5>& shape, const std::array<int, 7>& code,
                const std::array<double, 5>& numbers, Address x, Address y, Address labels, Address ref_labels,
                Address upstream, Address out, Address share, Address dx, Address dy, int64_t size, int64_t lanes,
                int64_t slots, int64_t capacity, int threads) {
  const whole::Job job = whole::job_of(shape, code, numbers, dy != 0);
  const whole::Tensors tensors{at<void>(x),        at<void>(y),   at<int64_t>(labels), at<int64_t>(ref_labels),
                               at<void>(upstream), at<void>(out), at<void>(share),     at<void>(dx),
                               at<void>(dy),       nullptr};
  const Cut cut{size, lanes, slots, capacity};
  if (job.number == whole::FLOAT64)
    WholeLoss<double>(kernels<double>(isa), job, tensors, cut, threads).run();
  else
    WholeLoss<float>(kernels<float>(isa), job, tensors, cut, threads).run();
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "flashpair's CPU kernels: addresses and sizes in, nothing owned.";
  m.attr("INTERFACE") = 4;  // extension.py's: a build of other sources is refused
  m.attr("MAX_TILE") = MAX_TILE;
  m.def("instruction_sets", &instruction_sets, "What this build holds and this processor runs, best first.");
  m.def(
      "use_runtime",
      [](Address sgemm, Address dgemm, Address set_blas_threads, Address parallel) {
        Runtime& r = runtime();
        r.sgemm = reinterpret_cast<Gemm<float>>(sgemm);
        r.dgemm = reinterpret_cast<Gemm<double>>(dgemm);
        r.set_blas_threads = reinterpret_cast<int (*)(int)>(set_blas_threads);
        r.parallel = reinterpret_cast<decltype(r.parallel)>(parallel);
      },
      "Addresses of sgemm_, dgemm_, MKL_Set_Num_Threads_Local and GOMP_parallel; 0 for none.");
  using Release = py::call_guard<py::gil_scoped_release>;
  m.def(
      "sorted_rows",
      [](bool wide, Address x, Address order, int64_t n, int64_t d, Address y, Address inverse, int threads) {
        const int64_t* by = at<int64_t>(order);
        wide ? sorted_rows(at<double>(x), by, n, d, at<double>(y), at<double>(inverse), threads)
             : sorted_rows(at<float>(x), by, n, d, at<float>(y), at<float>(inverse), threads);
      },
      Release());
  m.def(
      "sorted_rows_backward",
      [](bool wide, Address g, Address y, Address inverse, Address order, int64_t n, int64_t d, Address dx,
         int threads) {
        const int64_t* by = at<int64_t>(order);
        wide
            ? sorted_rows_backward(at<double>(g), at<double>(y), at<double>(inverse), by, n, d, at<double>(dx), threads)
            : sorted_rows_backward(at<float>(g), at<float>(y), at<float>(inverse), by, n, d, at<float>(dx), threads);
      },
      Release());
  py::class_<Program>(m, "Program", "A transform's steps; what it is made for keeps it alive.")
      .def(py::init(
          [](const std::vector<std::tuple<int, int, int, int, double>>& steps, int value, int slope, int own_slope) {
            const int count = static_cast<int>(steps.size());
            if (count > MAX_STEPS)
              throw std::invalid_argument("a program may have " + std::to_string(MAX_STEPS) + " steps");
            Program program{{}, value, slope, own_slope};
            for (const auto& [op, a, b, c, constant] : steps) program.steps.push_back({op, a, b, c, constant});
            return program;
          }));
  m.attr("MAX_STEPS") = MAX_STEPS;
  py::class_<Int8Rows, std::shared_ptr<Int8Rows>>(m, "Int8Rows");
  m.def(
      "round_rows",
      [](const std::string& isa, bool wide, Address x, int64_t n, int64_t d, Address square, int threads) {
        const Int8Kernels int8 = int8_kernels(isa);
        return wide ? rounded_rows(int8, at<double>(x), n, d, at<double>(square), threads)
                    : rounded_rows(int8, at<float>(x), n, d, at<float>(square), threads);
      },
      Release());
  m.def("whole_loss", &whole_loss, Release(), "tiled.py's run_small_batch");
  bind_pass<float>(m, "PassFloat");
  bind_pass<double>(m, "PassDouble");
}
