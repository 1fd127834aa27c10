// flashpair._C, and the one file of csrc/cpu that knows Python. It takes addresses and sizes and owns no tensor. The
// GIL is released while a kernel runs.
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
  std::vector<std::string> names;
#ifdef FLASHPAIR_X86_64
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("fma")) {
    if (__builtin_cpu_supports("avx512vnni")) names.push_back("avx512vnni");
    names.push_back("avx512");
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) names.push_back("avx2");
#endif
  names.push_back("baseline");
  return names;
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
T* ptr(Address address) {
  return reinterpret_cast<T*>(address);
}

// A reduction as tiled.py's _operands passes it. `add` below names the fields.
using Term = std::tuple<int, int, int, double, Address, Address, Address, Address, int, int, double, double, double>;

template <class T>
void bind_pass(py::module_& m, const char* name) {
  using P = Pass<T>;
  using Release = py::call_guard<py::gil_scoped_release>;
  using Lists = std::tuple<Address, Address, Address, int64_t>;  // KeptLists; zeros for none
  auto kept_lists = [](const Lists& lists) {
    const auto [count, entry, z, capacity] = lists;
    return KeptLists<T>{ptr<int32_t>(count), ptr<int32_t>(entry), ptr<T>(z), capacity};
  };
  py::class_<P>(m, name)
      .def(py::init([](const std::string& isa, int64_t n, int64_t m, int64_t num_valid, bool square, int64_t split,
                       Address pos_begin, Address pos_end, Address perm, Address row_sq_norm, Address ref_sq_norm,
                       bool squared, Address x, Address y, int64_t d, int64_t size, int64_t lanes) {
        const Problem<T> problem{n,
                                 m,
                                 num_valid,
                                 square,
                                 ptr<int64_t>(pos_begin),
                                 ptr<int64_t>(pos_end),
                                 ptr<int64_t>(perm),
                                 ptr<T>(row_sq_norm),
                                 ptr<T>(ref_sq_norm),
                                 squared,
                                 split};
        return P(kernels<T>(isa), problem, ptr<T>(x), ptr<T>(y), d, size, lanes);
      }))
      .def("add",
           [](P& pass, const Term& t, const Program* program, Address index, Address value, Address top_z,
              Address log_sum, Address grad, Address grad_scale, Address grad_offset, Address grad_ref_offset) {
             const auto [op, side, transform, scale, offset, ref_offset, lower, upper, lower_of, upper_of, lower_shift,
                         upper_shift, shift] = t;
             Reduction<T> r{};
             r.op = op, r.side = side, r.transform = program ? PROGRAM : transform, r.program = program;
             r.scale = static_cast<T>(scale), r.shift = static_cast<T>(shift);
             r.offset = ptr<T>(offset), r.ref_offset = ptr<T>(ref_offset);
             r.lower = ptr<T>(lower), r.lower_of = lower_of, r.lower_shift = lower_shift;
             r.upper = ptr<T>(upper), r.upper_of = upper_of, r.upper_shift = upper_shift;
             r.index = ptr<int64_t>(index), r.value = ptr<T>(value), r.grad = ptr<T>(grad);
             r.top_z = ptr<T>(top_z), r.log_sum = ptr<T>(log_sum);
             r.grad_scale = ptr<double>(grad_scale);
             r.grad_offset = ptr<T>(grad_offset), r.grad_ref_offset = ptr<T>(grad_ref_offset);
             pass.add(r);
           })
      .def(
          "forward",
          [kept_lists](P& pass, int threads, Address values, Address index, const Lists& kept, int listed,
                       const std::string& screen, std::shared_ptr<Int8Rows> refs) {
            // screen: the instruction set of the int8 products, or empty. refs: round_rows' references, or null.
            Tally tally;
            const Int8Kernels int8 = screen.empty() ? Int8Kernels{} : int8_kernels(screen);
            pass.forward(threads, ptr<T>(values), ptr<int64_t>(index), kept_lists(kept), listed,
                         {screen.empty() ? nullptr : &int8, std::move(refs), &tally});
            return std::array<int64_t, 5>{tally.tiles, tally.full, tally.pairs, tally.candidates, tally.kept};
          },
          Release())
      .def(
          "nearest",
          [](const P& pass, int threads, const std::string& isa, int64_t k, Address values, Address index) {
            Nearest<T>(pass).run(threads, int8_kernels(isa), k, ptr<T>(values), ptr<int64_t>(index));
          },
          Release())
      .def(
          "similarities",  // z of row rows[k] and reference cols[k], the same bits as in a tile
          [](const P& pass, int threads, int64_t count, Address rows, Address cols, Address z) {
            pass.similarities(threads, count, ptr<int64_t>(rows), ptr<int64_t>(cols), ptr<T>(z));
          },
          Release())
      .def(
          "backward",
          [kept_lists](P& pass, int threads, Address values, Address dx, Address dy, const Lists& kept) {
            pass.backward(threads, ptr<T>(values), ptr<T>(dx), ptr<T>(dy), kept_lists(kept));
          },
          Release());
}

// Takes make_spec's tuples, the addresses of small_batch::Tensors, the fields of Tiling, and how many threads.
void small_batch_loss(const std::string& isa, const std::array<int, 5>& shape, const std::array<int, 7>& code,
                      const std::array<double, 5>& numbers, Address x, Address y, Address labels, Address ref_labels,
                      Address upstream, Address out, Address share, Address dx, Address dy, int64_t size, int64_t lanes,
                      int64_t slots, int64_t capacity, int threads) {
  const small_batch::Spec spec = small_batch::make_spec(shape, code, numbers, dy != 0);
  const small_batch::Tensors tensors{
      ptr<void>(x),        ptr<void>(y),   ptr<int64_t>(labels), ptr<int64_t>(ref_labels),
      ptr<void>(upstream), ptr<void>(out), ptr<void>(share),     ptr<void>(dx),
      ptr<void>(dy),       nullptr};
  const Tiling tiling{size, lanes, slots, capacity};
  if (spec.number == small_batch::FLOAT64)
    SmallBatchLoss<double>(kernels<double>(isa), spec, tensors, tiling, threads).run();
  else
    SmallBatchLoss<float>(kernels<float>(isa), spec, tensors, tiling, threads).run();
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  using namespace py::literals;
  m.doc() = "flashpair's CPU kernels: addresses and sizes in, nothing owned.";
  m.attr("SOURCES") = FLASHPAIR_SOURCES;  // extension.py refuses a build of other sources
  m.attr("WORDS") =
      py::dict("op"_a = FLASHPAIR_WORDS(FLASHPAIR_OPS), "side"_a = FLASHPAIR_WORDS(FLASHPAIR_SIDES),
               "transform"_a = FLASHPAIR_WORDS(FLASHPAIR_TRANSFORMS), "step"_a = FLASHPAIR_WORDS(FLASHPAIR_STEP_OPS),
               "loss"_a = FLASHPAIR_WORDS(FLASHPAIR_LOSSES), "averaging"_a = FLASHPAIR_WORDS(FLASHPAIR_AVERAGINGS),
               "number"_a = FLASHPAIR_WORDS(FLASHPAIR_NUMBERS));
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
      [](bool is_double, Address x, Address perm, int64_t n, int64_t d, Address y, Address inverse_norm, int threads) {
        const int64_t* rows = ptr<int64_t>(perm);
        is_double ? sorted_rows(ptr<double>(x), rows, n, d, ptr<double>(y), ptr<double>(inverse_norm), threads)
                  : sorted_rows(ptr<float>(x), rows, n, d, ptr<float>(y), ptr<float>(inverse_norm), threads);
      },
      Release());
  m.def(
      "sorted_rows_backward",
      [](bool is_double, Address g, Address y, Address inverse, Address order, int64_t n, int64_t d, Address dx,
         int threads) {
        const int64_t* rows = ptr<int64_t>(order);
        is_double ? sorted_rows_backward(ptr<double>(g), ptr<double>(y), ptr<double>(inverse), rows, n, d,
                                         ptr<double>(dx), threads)
                  : sorted_rows_backward(ptr<float>(g), ptr<float>(y), ptr<float>(inverse), rows, n, d, ptr<float>(dx),
                                         threads);
      },
      Release());
  py::class_<Program>(m, "Program", "A transform's steps. The transform keeps this object alive.")
      .def(py::init(
          [](const std::vector<std::tuple<int, int, int, int, double>>& steps, int value, int slope, int d_offset) {
            const int count = static_cast<int>(steps.size());
            if (count > MAX_STEPS)
              throw std::invalid_argument("a program may have " + std::to_string(MAX_STEPS) + " steps");
            Program program{{}, value, slope, d_offset};
            for (const auto& [op, a, b, c, constant] : steps) program.steps.push_back({op, a, b, c, constant});
            return program;
          }));
  m.attr("MAX_STEPS") = MAX_STEPS;
  py::class_<Int8Rows, std::shared_ptr<Int8Rows>>(m, "Int8Rows");
  m.def(
      "round_rows",
      [](const std::string& isa, bool is_double, Address x, int64_t n, int64_t d, Address sq_norm, int threads) {
        const Int8Kernels int8 = int8_kernels(isa);
        return is_double ? quantize_rows(int8, ptr<double>(x), n, d, ptr<double>(sq_norm), threads)
                         : quantize_rows(int8, ptr<float>(x), n, d, ptr<float>(sq_norm), threads);
      },
      Release());
  m.def("small_batch_loss", &small_batch_loss, Release(), "tiled.py's run_small_batch");
  bind_pass<float>(m, "PassFloat");
  bind_pass<double>(m, "PassDouble");
}
