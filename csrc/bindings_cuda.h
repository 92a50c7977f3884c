// What the CUDA ops' bindings share.
#pragma once

#include "bindings.h"
#include "cuda/ops.h"

namespace fusedres {

// What every op ends with: the device's multiprocessors and the stream.
inline cuda::Device device(int multiprocessors, uintptr_t stream) {
  if (multiprocessors < 1) throw std::invalid_argument("a device has at least 1 multiprocessor");
  return {at<void>(stream), multiprocessors};
}

// An address that an op can't do without.
template <class T>
T* to(const char* name, uintptr_t address) {
  return at<T>(needed(name, address));
}

inline cuda::Image image(int64_t n, int64_t height, int64_t width, int64_t channels) {
  if (n < 1 || height < 1 || width < 1 || channels < 1) {
    throw std::invalid_argument("an image must not be empty");
  }
  return {n, height, width, channels};
}

void bind_cuda_conv(pybind11::module_& m);
void bind_cuda_stem(pybind11::module_& m);

}  // namespace fusedres
