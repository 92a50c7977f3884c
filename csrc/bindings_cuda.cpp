// The CUDA ops' part of the compiled module: addresses and sizes from Python to the launchers.
#include "bindings_cuda.h"

#include <pybind11/stl.h>

#include <tuple>
#include <vector>

namespace py = pybind11;

namespace fusedres {
namespace {

using cuda::DType;
using std::string;

// dtype, rows, channels
struct Matrix {
  DType dtype;
  int64_t rows, channels;
};
Matrix matrix(const string& dtype, int64_t rows, int64_t channels) {
  if (rows < 1 || channels < 1) throw std::invalid_argument("an activation must not be empty");
  return {dtype_of<DType>(dtype), rows, channels};
}

void check_branch(uintptr_t residual, uintptr_t residual_stats) {
  if ((residual == 0) != (residual_stats == 0)) {
    throw std::invalid_argument("residual and residual_stats go together");
  }
}

}  // namespace

void bind_cuda(py::module_& m) {
  using nogil = py::call_guard<py::gil_scoped_release>;

  m.def("cuda_bn_workspace", [](const string& dtype, int64_t rows, int64_t channels, int quantities,
                                int multiprocessors) {
    const Matrix x = matrix(dtype, rows, channels);
    return cuda::bn_workspace(x.dtype, x.rows, x.channels, quantities, multiprocessors);
  });
  m.def(
      "cuda_bn_stats",
      [](const string& dtype, int64_t rows, int64_t channels, uintptr_t x, uintptr_t weight,
         uintptr_t bias, float eps, uintptr_t workspace, uintptr_t stats, int multiprocessors,
         uintptr_t stream) {
        const Matrix a = matrix(dtype, rows, channels);
        cuda::bn_stats(a.dtype, a.rows, a.channels, to<void>("x", x), at<float>(weight),
                       at<float>(bias), eps, to<float>("workspace", workspace),
                       to<float>("stats", stats), device(multiprocessors, stream));
      },
      nogil());
  m.def(
      "cuda_bn_running_stats",
      [](int64_t channels, uintptr_t mean, uintptr_t var, uintptr_t weight, uintptr_t bias,
         float eps, uintptr_t stats, int multiprocessors, uintptr_t stream) {
        cuda::bn_running_stats(channels, to<float>("running_mean", mean),
                               to<float>("running_var", var), at<float>(weight), at<float>(bias),
                               eps, to<float>("stats", stats), device(multiprocessors, stream));
      },
      nogil());
  m.def(
      "cuda_bn_update_running_",
      [](int64_t channels, uintptr_t mean, uintptr_t var, uintptr_t stats, int64_t count,
         float momentum, int multiprocessors, uintptr_t stream) {
        cuda::bn_update_running(channels, to<float>("running_mean", mean),
                                to<float>("running_var", var), to<float>("stats", stats), count,
                                momentum, device(multiprocessors, stream));
      },
      nogil());
  m.def(
      "cuda_bn_act",
      [](const string& dtype, int64_t rows, int64_t channels, uintptr_t x, uintptr_t stats,
         uintptr_t residual, uintptr_t residual_stats, bool relu, uintptr_t z, int multiprocessors,
         uintptr_t stream) {
        const Matrix a = matrix(dtype, rows, channels);
        cuda::bn_act(a.dtype, a.rows, a.channels, to<void>("x", x), to<float>("stats", stats),
                     at<void>(residual), at<float>(residual_stats), relu, to<void>("z", z),
                     device(multiprocessors, stream));
      },
      nogil());
  m.def(
      "cuda_bn_act_backward_reduce",
      [](const string& dtype, int64_t rows, int64_t channels, uintptr_t grad, uintptr_t x,
         uintptr_t z, uintptr_t stats, uintptr_t residual, uintptr_t residual_stats, bool relu,
         uintptr_t workspace, uintptr_t du, uintptr_t sums, uintptr_t residual_sums,
         int multiprocessors, uintptr_t stream) {
        const Matrix a = matrix(dtype, rows, channels);
        check_branch(residual, residual_stats);
        if ((z == 0) != (du == 0)) throw std::invalid_argument("z and du go together");
        if (z != 0 && !relu) throw std::invalid_argument("z is for the mask of a ReLU");
        if (residual != 0 && relu && z == 0) {
          throw std::invalid_argument("z must be given where a residual went through the ReLU");
        }
        if (residual != 0) needed("residual_sums", residual_sums);
        cuda::bn_act_backward_reduce(
            a.dtype, a.rows, a.channels, to<void>("grad", grad), to<void>("x", x), at<void>(z),
            to<float>("stats", stats), at<void>(residual), at<float>(residual_stats), relu,
            to<float>("workspace", workspace), at<void>(du), to<float>("sums", sums),
            at<float>(residual_sums), device(multiprocessors, stream));
      },
      nogil());
  m.def(
      "cuda_bn_act_backward_apply",
      [](const string& dtype, int64_t rows, int64_t channels, uintptr_t grad, uintptr_t x,
         uintptr_t stats, uintptr_t sums, uintptr_t residual, uintptr_t residual_stats,
         uintptr_t residual_sums, bool relu, uintptr_t dx, uintptr_t dresidual, int multiprocessors,
         uintptr_t stream) {
        const Matrix a = matrix(dtype, rows, channels);
        check_branch(residual, residual_stats);
        if (residual != 0) needed("dresidual", dresidual);
        if (residual != 0 && relu) {
          throw std::invalid_argument("with a residual the gradient is behind the ReLU already");
        }
        cuda::bn_act_backward_apply(a.dtype, a.rows, a.channels, to<void>("grad", grad),
                                    to<void>("x", x), to<float>("stats", stats), at<float>(sums),
                                    at<void>(residual), at<float>(residual_stats),
                                    at<float>(residual_sums), relu, to<void>("dx", dx),
                                    at<void>(dresidual), device(multiprocessors, stream));
      },
      nogil());

  m.def("cuda_bn_relu_maxpool_workspace", [](const string& dtype, int64_t n, int64_t height,
                                             int64_t width, int64_t channels, int multiprocessors) {
    return cuda::bn_relu_maxpool_workspace(dtype_of<DType>(dtype),
                                           image(n, height, width, channels), multiprocessors);
  });
  m.def(
      "cuda_bn_relu_maxpool",
      [](const string& dtype, int64_t n, int64_t height, int64_t width, int64_t channels,
         uintptr_t x, uintptr_t stats, uintptr_t z, uintptr_t index, int multiprocessors,
         uintptr_t stream) {
        cuda::bn_relu_maxpool(dtype_of<DType>(dtype), image(n, height, width, channels),
                              to<void>("x", x), to<float>("stats", stats), to<void>("z", z),
                              to<uint8_t>("index", index), device(multiprocessors, stream));
      },
      nogil());
  m.def(
      "cuda_bias_relu_maxpool",
      [](const string& dtype, int64_t n, int64_t height, int64_t width, int64_t channels,
         uintptr_t x, uintptr_t bias, uintptr_t z, int multiprocessors, uintptr_t stream) {
        cuda::bias_relu_maxpool(dtype_of<DType>(dtype), image(n, height, width, channels),
                                to<void>("x", x), at<float>(bias), to<void>("z", z),
                                device(multiprocessors, stream));
      },
      nogil());
  m.def(
      "cuda_bn_relu_maxpool_backward_reduce",
      [](const string& dtype, int64_t n, int64_t height, int64_t width, int64_t channels,
         uintptr_t grad, uintptr_t index, uintptr_t x, uintptr_t stats, uintptr_t workspace,
         uintptr_t sums, int multiprocessors, uintptr_t stream) {
        cuda::bn_relu_maxpool_backward_reduce(
            dtype_of<DType>(dtype), image(n, height, width, channels), to<void>("grad", grad),
            to<uint8_t>("index", index), to<void>("x", x), to<float>("stats", stats),
            to<float>("workspace", workspace), to<float>("sums", sums),
            device(multiprocessors, stream));
      },
      nogil());
  m.def(
      "cuda_bn_relu_maxpool_backward_apply",
      [](const string& dtype, int64_t n, int64_t height, int64_t width, int64_t channels,
         uintptr_t grad, uintptr_t index, uintptr_t x, uintptr_t stats, uintptr_t sums,
         uintptr_t dx, int multiprocessors, uintptr_t stream) {
        cuda::bn_relu_maxpool_backward_apply(
            dtype_of<DType>(dtype), image(n, height, width, channels), to<void>("grad", grad),
            to<uint8_t>("index", index), to<void>("x", x), to<float>("stats", stats),
            at<float>(sums), to<void>("dx", dx), device(multiprocessors, stream));
      },
      nogil());

  m.def(
      "cuda_global_avg_pool",
      [](const string& dtype, int64_t n, int64_t height, int64_t width, int64_t channels,
         uintptr_t x, uintptr_t out, int multiprocessors, uintptr_t stream) {
        cuda::global_avg_pool(dtype_of<DType>(dtype), image(n, height, width, channels),
                              to<void>("x", x), to<void>("out", out),
                              device(multiprocessors, stream));
      },
      nogil());
  m.def(
      "cuda_global_avg_pool_backward",
      [](const string& dtype, int64_t n, int64_t height, int64_t width, int64_t channels,
         uintptr_t grad, uintptr_t dx, int multiprocessors, uintptr_t stream) {
        cuda::global_avg_pool_backward(dtype_of<DType>(dtype), image(n, height, width, channels),
                                       to<void>("grad", grad), to<void>("dx", dx),
                                       device(multiprocessors, stream));
      },
      nogil());

  // each weight: address, address of its cast, outer, inner, taps
  using Entry = std::tuple<uintptr_t, uintptr_t, int64_t, int64_t, int64_t>;
  m.def(
      "cuda_cast_weights",
      [](const string& dtype, const std::vector<Entry>& entries, int multiprocessors,
         uintptr_t stream) {
        std::vector<cuda::Weight> weights;
        for (const auto& [weight, cast, outer, inner, taps] : entries) {
          if (outer < 1 || inner < 1 || taps < 1) {
            throw std::invalid_argument("a weight must not be empty");
          }
          weights.push_back(
              {to<float>("weight", weight), to<void>("cast", cast), outer, inner, taps});
        }
        cuda::cast_weights(dtype_of<DType>(dtype), weights.data(),
                           static_cast<int64_t>(weights.size()), device(multiprocessors, stream));
      },
      nogil());
  bind_cuda_conv(m);
  bind_cuda_stem(m);
}

}  // namespace fusedres
