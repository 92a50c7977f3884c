// The compiled module: checks what Python passes (addresses, sizes, a stream) and hands it to the
// kernels. It knows no torch, so one build serves every version of it.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/kernels.h"
#if defined(FUSEDRES_CUDA)
#include "cuda/bn_act.h"
#endif

namespace py = pybind11;

namespace {

using fusedres::cpu::DType;
using fusedres::cpu::kernels;
using fusedres::cpu::Shape;

DType dtype_of(const std::string& name) {
  if (name == "float32") return DType::float32;
  if (name == "bfloat16") return DType::bfloat16;
  if (name == "float16") return DType::float16;
  throw std::invalid_argument("dtype must be float32, bfloat16 or float16, got " + name);
}

// Below this many values a thread costs more than it brings.
constexpr int64_t kValuesPerThread = 16 * 1024;

// An address as Python's integer; 0 for a tensor that isn't there.
template <class T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);  // NOLINT
}

struct Call {
  DType dtype;
  Shape shape;
  int threads;
};

Call call(const std::string& dtype, int64_t n, int64_t c, int64_t hw, bool planes, int threads) {
  if (n < 1 || c < 1 || hw < 1) throw std::invalid_argument("an activation must not be empty");
  if (threads < 1) throw std::invalid_argument("threads must be at least 1");
  const Shape shape{n, c, hw, planes};
  const int64_t useful = shape.numel() / kValuesPerThread;
  return {dtype_of(dtype), shape, useful < threads ? (useful < 1 ? 1 : int(useful)) : threads};
}

uintptr_t needed(const char* name, uintptr_t address) {
  if (address == 0) throw std::invalid_argument(std::string(name) + " must not be null");
  return address;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "The compiled kernels of fusedres, called with addresses and sizes.";
  using nogil = py::call_guard<py::gil_scoped_release>;

  m.def("cpu_isa", [] { return std::string(kernels().isa); });
  m.def("use_cpu_isa", [](const std::string& isa) { fusedres::cpu::use_isa(isa.c_str()); });

  m.def(
      "cpu_bn_stats",
      [](const std::string& dtype, int64_t n, int64_t c, int64_t hw, bool planes, int threads,
         uintptr_t x, uintptr_t weight, uintptr_t bias, double eps, uintptr_t stats) {
        const Call k = call(dtype, n, c, hw, planes, threads);
        kernels().bn_stats(k.dtype, k.shape, at<void>(needed("x", x)), at<float>(weight),
                           at<float>(bias), eps, at<float>(needed("stats", stats)), k.threads);
      },
      nogil());
  m.def(
      "cpu_bn_running_stats",
      [](int64_t c, uintptr_t mean, uintptr_t var, uintptr_t weight, uintptr_t bias, double eps,
         uintptr_t stats) {
        fusedres::cpu::bn_finalize(c, at<float>(needed("running_mean", mean)),
                                   at<float>(needed("running_var", var)), at<float>(weight),
                                   at<float>(bias), eps, at<float>(needed("stats", stats)));
      },
      nogil());
  m.def(
      "cpu_bn_update_running_",
      [](int64_t c, uintptr_t mean, uintptr_t var, uintptr_t stats, int64_t count,
         double momentum) {
        fusedres::cpu::bn_update_running(c, at<float>(needed("running_mean", mean)),
                                         at<float>(needed("running_var", var)),
                                         at<float>(needed("stats", stats)), count, momentum);
      },
      nogil());
  m.def(
      "cpu_bn_act",
      [](const std::string& dtype, int64_t n, int64_t c, int64_t hw, bool planes, int threads,
         uintptr_t x, uintptr_t stats, uintptr_t residual, bool relu, uintptr_t z) {
        const Call k = call(dtype, n, c, hw, planes, threads);
        kernels().bn_act(k.dtype, k.shape, at<void>(needed("x", x)),
                         at<float>(needed("stats", stats)), at<void>(residual), relu,
                         at<void>(needed("z", z)), k.threads);
      },
      nogil());
  m.def(
      "cpu_bn_act_backward_reduce",
      [](const std::string& dtype, int64_t n, int64_t c, int64_t hw, bool planes, int threads,
         uintptr_t grad, uintptr_t x, uintptr_t z, uintptr_t stats, bool relu, uintptr_t du,
         uintptr_t sums) {
        const Call k = call(dtype, n, c, hw, planes, threads);
        if ((z == 0) != (du == 0)) throw std::invalid_argument("z and du go together");
        if (z != 0 && !relu) throw std::invalid_argument("z is for the mask of a ReLU");
        kernels().bn_act_backward_reduce(k.dtype, k.shape, at<void>(needed("grad", grad)),
                                         at<void>(needed("x", x)), at<void>(z),
                                         at<float>(needed("stats", stats)), relu, at<void>(du),
                                         at<float>(needed("sums", sums)), k.threads);
      },
      nogil());
  m.def(
      "cpu_bn_act_backward_apply",
      [](const std::string& dtype, int64_t n, int64_t c, int64_t hw, bool planes, int threads,
         uintptr_t grad, uintptr_t x, uintptr_t stats, uintptr_t sums, bool relu, uintptr_t dx) {
        const Call k = call(dtype, n, c, hw, planes, threads);
        kernels().bn_act_backward_apply(k.dtype, k.shape, at<void>(needed("grad", grad)),
                                        at<void>(needed("x", x)), at<float>(needed("stats", stats)),
                                        at<float>(sums), relu, at<void>(needed("dx", dx)),
                                        k.threads);
      },
      nogil());

#if defined(FUSEDRES_CUDA)
  m.def(
      "cuda_bn_act",
      [](const std::string& dtype, int64_t rows, int64_t channels, int multiprocessors, uintptr_t x,
         uintptr_t stats, uintptr_t residual, bool relu, uintptr_t z, uintptr_t stream) {
        fusedres::cuda::bn_act(static_cast<fusedres::cuda::DType>(dtype_of(dtype)), rows, channels,
                               multiprocessors, at<void>(needed("x", x)),
                               at<float>(needed("stats", stats)), at<void>(residual), relu,
                               at<void>(needed("z", z)), at<void>(stream));
      },
      nogil());
#endif
  m.attr("cuda_archs") = py::tuple(py::cast(std::vector<std::string>{FUSEDRES_CUDA_ARCHS}));
  m.attr("cuda_reason") = FUSEDRES_CUDA_REASON;
}
