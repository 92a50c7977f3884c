// What the parts of the compiled module share: Python passes addresses, sizes and names.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>

namespace fusedres {

// An address as Python's integer; 0 for a tensor that isn't there.
template <class T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);  // NOLINT
}

inline uintptr_t needed(const char* name, uintptr_t address) {
  if (address == 0) throw std::invalid_argument(std::string(name) + " must not be null");
  return address;
}

template <class DType>
DType dtype_of(const std::string& name) {
  if (name == "float32") return DType::float32;
  if (name == "bfloat16") return DType::bfloat16;
  if (name == "float16") return DType::float16;
  throw std::invalid_argument("dtype must be float32, bfloat16 or float16, got " + name);
}

void bind_cuda(pybind11::module_& m);

}  // namespace fusedres
