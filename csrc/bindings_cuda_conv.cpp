// The convolutions' part of the CUDA ops.
#include "bindings_cuda.h"

namespace py = pybind11;

namespace fusedres {
namespace {

using cuda::Conv;
using cuda::DType;
using std::string;

Conv conv(int64_t n, int64_t height, int64_t width, int64_t channels, int64_t filters, int side,
          int stride) {
  if (n < 1 || height < 1 || width < 1 || channels < 1 || filters < 1) {
    throw std::invalid_argument("a convolution must not be empty");
  }
  if (channels % 8 != 0 || filters % 8 != 0) {
    throw std::invalid_argument("channels and filters must be multiples of 8, got " +
                                std::to_string(channels) + " and " + std::to_string(filters));
  }
  if ((side != 1 && side != 3) || (stride != 1 && stride != 2)) {
    throw std::invalid_argument("side must be 1 or 3 and stride 1 or 2, got " +
                                std::to_string(side) + " and " + std::to_string(stride));
  }
  return {n, height, width, channels, filters, side, stride};
}

}  // namespace

void bind_cuda_conv(py::module_& m) {
  using nogil = py::call_guard<py::gil_scoped_release>;

  m.def("cuda_conv_fwd_workspace",
        [](const string& dtype, int64_t n, int64_t height, int64_t width, int64_t channels,
           int64_t filters, int side, int stride, int multiprocessors) {
          return cuda::conv_fwd_workspace(dtype_of<DType>(dtype),
                                          conv(n, height, width, channels, filters, side, stride),
                                          multiprocessors);
        });
  m.def(
      "cuda_conv_fwd",
      [](const string& dtype, int64_t n, int64_t height, int64_t width, int64_t channels,
         int64_t filters, int side, int stride, uintptr_t x, uintptr_t stats, bool relu,
         uintptr_t weight, uintptr_t norm_weight, uintptr_t norm_bias, float eps,
         uintptr_t workspace, uintptr_t y, uintptr_t y_stats, int multiprocessors,
         uintptr_t stream) {
        if (y_stats != 0) needed("workspace", workspace);
        cuda::conv_fwd(dtype_of<DType>(dtype),
                       conv(n, height, width, channels, filters, side, stride), to<void>("x", x),
                       at<float>(stats), relu, to<void>("weight", weight), at<float>(norm_weight),
                       at<float>(norm_bias), eps, at<float>(workspace), to<void>("y", y),
                       at<float>(y_stats), device(multiprocessors, stream));
      },
      nogil());
  m.def(
      "cuda_conv_bias_act",
      [](const string& dtype, int64_t n, int64_t height, int64_t width, int64_t channels,
         int64_t filters, int side, int stride, uintptr_t x, uintptr_t weight, uintptr_t bias,
         uintptr_t residual, bool relu, uintptr_t z, int multiprocessors, uintptr_t stream) {
        cuda::conv_bias_act(
            dtype_of<DType>(dtype), conv(n, height, width, channels, filters, side, stride),
            to<void>("x", x), to<void>("weight", weight), at<float>(bias), at<void>(residual), relu,
            to<void>("z", z), device(multiprocessors, stream));
      },
      nogil());
  m.def(
      "cuda_bottleneck_infer",
      [](const string& dtype, int64_t n, int64_t height, int64_t width, int64_t channels,
         int64_t inner, uintptr_t x, uintptr_t weight1, uintptr_t bias1, uintptr_t weight2,
         uintptr_t bias2, uintptr_t weight3, uintptr_t bias3, uintptr_t z, int multiprocessors,
         uintptr_t stream) {
        conv(n, height, width, channels, inner, 3, 1);
        if (channels % 128 != 0) {
          throw std::invalid_argument("channels must be a multiple of 128, got " +
                                      std::to_string(channels));
        }
        cuda::bottleneck_infer(
            dtype_of<DType>(dtype), {n, height, width, channels, inner}, to<void>("x", x),
            to<void>("weight1", weight1), to<float>("bias1", bias1), to<void>("weight2", weight2),
            to<float>("bias2", bias2), to<void>("weight3", weight3), to<float>("bias3", bias3),
            to<void>("z", z), device(multiprocessors, stream));
      },
      nogil());
  m.def("cuda_conv_dgrad_workspace", [](const string& dtype, int64_t n, int64_t height,
                                        int64_t width, int64_t channels, int multiprocessors) {
    return cuda::conv_dgrad_workspace(dtype_of<DType>(dtype), image(n, height, width, channels),
                                      multiprocessors);
  });
  m.def(
      "cuda_conv_dgrad",
      [](const string& dtype, int64_t n, int64_t height, int64_t width, int64_t channels,
         int64_t filters, int side, uintptr_t du, uintptr_t y, uintptr_t y_stats, uintptr_t y_sums,
         uintptr_t weight, uintptr_t add, int64_t add_pitch, bool compact, uintptr_t x,
         uintptr_t x_stats, bool relu, uintptr_t workspace, uintptr_t dx, uintptr_t x_sums,
         int multiprocessors, uintptr_t stream) {
        if (y_sums != 0 && (y == 0 || y_stats == 0)) {
          throw std::invalid_argument("y_sums needs y and y_stats");
        }
        if ((x == 0) != (x_stats == 0) || (x_sums != 0 && (x == 0 || workspace == 0))) {
          throw std::invalid_argument(
              "x and x_stats go together, x_sums needs them and a workspace");
        }
        cuda::conv_dgrad(dtype_of<DType>(dtype), image(n, height, width, channels), filters, side,
                         to<void>("du", du), at<void>(y), at<float>(y_stats), at<float>(y_sums),
                         to<void>("weight", weight), at<void>(add), add_pitch, compact, at<void>(x),
                         at<float>(x_stats), relu, at<float>(workspace), to<void>("dx", dx),
                         at<float>(x_sums), device(multiprocessors, stream));
      },
      nogil());
}

}  // namespace fusedres
