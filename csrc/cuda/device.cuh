// Every intrinsic the kernels use, in one place: vector loads and stores, and conversions.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace fusedres::cuda {

__device__ __forceinline__ float widen(float v) { return v; }
__device__ __forceinline__ float widen(__nv_bfloat16 v) { return __bfloat162float(v); }
__device__ __forceinline__ float widen(__half v) { return __half2float(v); }

template <class T>
__device__ __forceinline__ T narrow(float v);
template <>
__device__ __forceinline__ float narrow<float>(float v) {
  return v;
}
template <>
__device__ __forceinline__ __nv_bfloat16 narrow<__nv_bfloat16>(float v) {
  return __float2bfloat16_rn(v);
}
template <>
__device__ __forceinline__ __half narrow<__half>(float v) {
  return __float2half_rn(v);
}

// As many values as one 16-byte access moves.
template <class T>
struct alignas(16) Pack {
  static constexpr int width = 16 / sizeof(T);
  T v[width];
};

template <class T>
__device__ __forceinline__ Pack<T> load_pack(const T* p) {
  const int4 bits = *reinterpret_cast<const int4*>(p);
  return *reinterpret_cast<const Pack<T>*>(&bits);
}
template <class T>
__device__ __forceinline__ void store_pack(T* p, const Pack<T>& pack) {
  *reinterpret_cast<int4*>(p) = *reinterpret_cast<const int4*>(&pack);
}

}  // namespace fusedres::cuda
