// The compiled module: checks what Python passes (addresses, sizes, a stream) and hands it to the
// kernels. It knows no torch, so one build serves every version of it.
#include "bindings.h"

#include <pybind11/stl.h>

#include <initializer_list>
#include <vector>

#include "cpu/kernels.h"

namespace py = pybind11;

namespace {

using fusedres::at;
using fusedres::dtype_of;
using fusedres::needed;
using fusedres::cpu::DType;
using fusedres::cpu::Image;
using fusedres::cpu::kernels;
using fusedres::cpu::Shape;

// Below this many values a thread costs more than it brings.
constexpr int64_t kValuesPerThread = 16 * 1024;

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
  return {dtype_of<DType>(dtype), shape,
          useful < threads ? (useful < 1 ? 1 : int(useful)) : threads};
}

struct ImageCall {
  DType dtype;
  Image image;
  int threads;
};

ImageCall call(const std::string& dtype, int64_t n, int64_t c, int64_t h, int64_t w, bool planes,
               int threads) {
  if (h < 1 || w < 1) throw std::invalid_argument("an activation must not be empty");
  const Call k = call(dtype, n, c, h * w, planes, threads);
  return {k.dtype, {n, c, h, w, planes}, k.threads};
}

void check_together(const char* names, std::initializer_list<uintptr_t> addresses) {
  for (uintptr_t address : addresses) {
    if ((address == 0) != (*addresses.begin() == 0)) {
      throw std::invalid_argument(std::string(names) + " go together");
    }
  }
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
         uintptr_t x, uintptr_t stats, uintptr_t residual, uintptr_t residual_stats, bool relu,
         uintptr_t z) {
        const Call k = call(dtype, n, c, hw, planes, threads);
        if (residual_stats != 0) needed("residual", residual);
        kernels().bn_act(k.dtype, k.shape, at<void>(needed("x", x)),
                         at<float>(needed("stats", stats)), at<void>(residual),
                         at<float>(residual_stats), relu, at<void>(needed("z", z)), k.threads);
      },
      nogil());
  m.def(
      "cpu_bn_act_backward_reduce",
      [](const std::string& dtype, int64_t n, int64_t c, int64_t hw, bool planes, int threads,
         uintptr_t grad, uintptr_t x, uintptr_t z, uintptr_t stats, uintptr_t residual,
         uintptr_t residual_stats, bool relu, uintptr_t du, uintptr_t sums,
         uintptr_t residual_sums) {
        const Call k = call(dtype, n, c, hw, planes, threads);
        check_together("z and du", {z, du});
        check_together("residual, residual_stats and residual_sums",
                       {residual, residual_stats, residual_sums});
        if (z != 0 && !relu) throw std::invalid_argument("z is for the mask of a ReLU");
        if (relu && residual != 0) needed("z", z);
        kernels().bn_act_backward_reduce(
            k.dtype, k.shape, at<void>(needed("grad", grad)), at<void>(needed("x", x)), at<void>(z),
            at<float>(needed("stats", stats)), at<void>(residual), at<float>(residual_stats), relu,
            at<void>(du), at<float>(needed("sums", sums)), at<float>(residual_sums), k.threads);
      },
      nogil());
  m.def(
      "cpu_bn_act_backward_apply",
      [](const std::string& dtype, int64_t n, int64_t c, int64_t hw, bool planes, int threads,
         uintptr_t grad, uintptr_t x, uintptr_t stats, uintptr_t sums, uintptr_t residual,
         uintptr_t residual_stats, uintptr_t residual_sums, bool relu, uintptr_t dx,
         uintptr_t dresidual) {
        const Call k = call(dtype, n, c, hw, planes, threads);
        check_together("residual, residual_stats and dresidual",
                       {residual, residual_stats, dresidual});
        if (residual_sums != 0) needed("residual", residual);
        if (relu && residual != 0) {
          throw std::invalid_argument("with a residual grad is behind the ReLU already");
        }
        kernels().bn_act_backward_apply(k.dtype, k.shape, at<void>(needed("grad", grad)),
                                        at<void>(needed("x", x)), at<float>(needed("stats", stats)),
                                        at<float>(sums), at<void>(residual),
                                        at<float>(residual_stats), at<float>(residual_sums), relu,
                                        at<void>(needed("dx", dx)), at<void>(dresidual), k.threads);
      },
      nogil());
  m.def(
      "cpu_bn_relu_maxpool",
      [](const std::string& dtype, int64_t n, int64_t c, int64_t h, int64_t w, bool planes,
         int threads, uintptr_t x, uintptr_t stats, uintptr_t z, uintptr_t index) {
        const ImageCall k = call(dtype, n, c, h, w, planes, threads);
        kernels().bn_relu_maxpool(k.dtype, k.image, at<void>(needed("x", x)),
                                  at<float>(needed("stats", stats)), at<void>(needed("z", z)),
                                  at<uint8_t>(needed("index", index)), k.threads);
      },
      nogil());
  m.def(
      "cpu_bias_relu_maxpool",
      [](const std::string& dtype, int64_t n, int64_t c, int64_t h, int64_t w, bool planes,
         int threads, uintptr_t x, uintptr_t bias, uintptr_t z) {
        const ImageCall k = call(dtype, n, c, h, w, planes, threads);
        kernels().bias_relu_maxpool(k.dtype, k.image, at<void>(needed("x", x)), at<float>(bias),
                                    at<void>(needed("z", z)), k.threads);
      },
      nogil());
  m.def(
      "cpu_bn_relu_maxpool_backward_reduce",
      [](const std::string& dtype, int64_t n, int64_t c, int64_t h, int64_t w, bool planes,
         int threads, uintptr_t grad, uintptr_t index, uintptr_t x, uintptr_t stats,
         uintptr_t sums) {
        const ImageCall k = call(dtype, n, c, h, w, planes, threads);
        kernels().bn_relu_maxpool_backward_reduce(
            k.dtype, k.image, at<void>(needed("grad", grad)), at<uint8_t>(needed("index", index)),
            at<void>(needed("x", x)), at<float>(needed("stats", stats)),
            at<float>(needed("sums", sums)), k.threads);
      },
      nogil());
  m.def(
      "cpu_bn_relu_maxpool_backward_apply",
      [](const std::string& dtype, int64_t n, int64_t c, int64_t h, int64_t w, bool planes,
         int threads, uintptr_t grad, uintptr_t index, uintptr_t x, uintptr_t stats, uintptr_t sums,
         uintptr_t dx) {
        const ImageCall k = call(dtype, n, c, h, w, planes, threads);
        kernels().bn_relu_maxpool_backward_apply(
            k.dtype, k.image, at<void>(needed("grad", grad)), at<uint8_t>(needed("index", index)),
            at<void>(needed("x", x)), at<float>(needed("stats", stats)), at<float>(sums),
            at<void>(needed("dx", dx)), k.threads);
      },
      nogil());

#if defined(FUSEDRES_CUDA)
  fusedres::bind_cuda(m);
#endif
  m.attr("cuda_archs") = py::tuple(py::cast(std::vector<std::string>{FUSEDRES_CUDA_ARCHS}));
  m.attr("cuda_reason") = FUSEDRES_CUDA_REASON;
  py::dict build;
  build["compiler"] = FUSEDRES_CXX;
  build["nvcc"] = FUSEDRES_NVCC;
  build["openmp"] = FUSEDRES_OPENMP;
  build["type"] = FUSEDRES_BUILD_TYPE;
  m.attr("build") = build;
}
