// The stem's part of the CUDA ops.
#include <pybind11/stl.h>

#include <tuple>

#include "bindings_cuda.h"

namespace py = pybind11;

namespace fusedres {
namespace {

using cuda::DType;
using cuda::Stem;
using cuda::StemImage;
using cuda::Strided;
using cuda::Value;
using std::string;

using Strides = std::tuple<int64_t, int64_t, int64_t, int64_t>;
using Channels = std::tuple<float, float, float>;

Stem stem(int64_t n, int64_t height, int64_t width, int64_t filters) {
  if (n < 1 || height < 1 || width < 1 || filters < 1) {
    throw std::invalid_argument("a convolution must not be empty");
  }
  if (filters % 8 != 0) {
    throw std::invalid_argument("filters must be a multiple of 8, got " + std::to_string(filters));
  }
  return {n, height, width, filters};
}

Strided strided(const char* name, const string& type, uintptr_t address, const Strides& s) {
  const Value value = type == "uint8" ? Value::uint8 : dtype_of<Value>(type);
  const auto [n, channels, rows, columns] = s;
  return {to<void>(name, address), value, {n, channels, rows, columns}};
}

}  // namespace

void bind_cuda_stem(py::module_& m) {
  using nogil = py::call_guard<py::gil_scoped_release>;

  m.def("cuda_stem_conv_workspace", [](const string& dtype, int64_t n, int64_t height,
                                       int64_t width, int64_t filters, int multiprocessors) {
    return cuda::stem_conv_workspace(dtype_of<DType>(dtype), stem(n, height, width, filters),
                                     multiprocessors);
  });
  m.def(
      "cuda_stem_conv",
      [](const string& dtype, int64_t n, int64_t height, int64_t width, int64_t filters,
         const string& x_type, uintptr_t x, const Strides& x_strides, const string& weight_type,
         uintptr_t weight, const Strides& weight_strides, uintptr_t norm_weight,
         uintptr_t norm_bias, float eps, uintptr_t workspace, uintptr_t pixels, uintptr_t y,
         uintptr_t y_stats, int multiprocessors, uintptr_t stream) {
        if (y_stats != 0) needed("workspace", workspace);
        const StemImage image = {
            strided("x", x_type, x, x_strides), {0.0f, 0.0f, 0.0f}, {1.0f, 1.0f, 1.0f}};
        cuda::stem_conv(dtype_of<DType>(dtype), stem(n, height, width, filters), image,
                        strided("weight", weight_type, weight, weight_strides),
                        at<float>(norm_weight), at<float>(norm_bias), eps, at<float>(workspace),
                        to<void>("pixels", pixels), to<void>("y", y), at<float>(y_stats),
                        device(multiprocessors, stream));
      },
      nogil());
  m.def(
      "cuda_stem_bias_act",
      [](const string& dtype, int64_t n, int64_t height, int64_t width, int64_t filters,
         const string& x_type, uintptr_t x, const Strides& x_strides, const Channels& mean,
         const Channels& rstd, const string& weight_type, uintptr_t weight,
         const Strides& weight_strides, uintptr_t bias, bool pool, uintptr_t z, int multiprocessors,
         uintptr_t stream) {
        const StemImage image = {strided("x", x_type, x, x_strides),
                                 {std::get<0>(mean), std::get<1>(mean), std::get<2>(mean)},
                                 {std::get<0>(rstd), std::get<1>(rstd), std::get<2>(rstd)}};
        cuda::stem_bias_act(dtype_of<DType>(dtype), stem(n, height, width, filters), image,
                            strided("weight", weight_type, weight, weight_strides), at<float>(bias),
                            pool, to<void>("z", z), device(multiprocessors, stream));
      },
      nogil());
  m.def("cuda_stem_wgrad_workspace", [](const string& dtype, int64_t n, int64_t height,
                                        int64_t width, int64_t filters, int multiprocessors) {
    return cuda::stem_wgrad_workspace(dtype_of<DType>(dtype), stem(n, height, width, filters),
                                      multiprocessors);
  });
  m.def(
      "cuda_stem_wgrad",
      [](const string& dtype, int64_t n, int64_t height, int64_t width, int64_t filters,
         uintptr_t dy, uintptr_t pixels, uintptr_t workspace, const string& dweight_type,
         uintptr_t dweight, const Strides& dweight_strides, int multiprocessors, uintptr_t stream) {
        if (dweight_type == "uint8") throw std::invalid_argument("dweight must not be uint8");
        cuda::stem_wgrad(dtype_of<DType>(dtype), stem(n, height, width, filters),
                         to<void>("dy", dy), to<void>("pixels", pixels),
                         to<float>("workspace", workspace),
                         strided("dweight", dweight_type, dweight, dweight_strides),
                         device(multiprocessors, stream));
      },
      nogil());
}

}  // namespace fusedres
