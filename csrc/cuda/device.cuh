// Every intrinsic the kernels use, in one place: conversions, 16-byte global accesses, shared
// memory, barriers and shuffles. Kernels touch memory through these functions alone, so that
// tests/emulation, which compiles the same kernels for a CPU, sees every access.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cstring>

#if !defined(__CUDACC__)
#include "emulation.h"
#endif

namespace fusedres::cuda {

// The widest access of a thread.
constexpr int kAccessBytes = 16;

// W values next to each other in memory, moved in as few accesses as there can be.
template <class T, int W>
struct alignas(sizeof(T) * W < kAccessBytes ? sizeof(T) * W : kAccessBytes) Pack {
  T v[W];
};

__device__ __forceinline__ float float_of_bits(uint32_t bits) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(bits);
#else
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
#endif
}

__device__ __forceinline__ uint32_t bits_of_float(float value) {
#if defined(__CUDA_ARCH__)
  return __float_as_uint(value);
#else
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
#endif
}

// The same value, but what is computed from it is computed where it stands: a compiler would
// otherwise keep a loop's addresses in registers from before the loop on.
__device__ __forceinline__ int right_here(int value) {
#if defined(__CUDA_ARCH__)
  asm volatile("" : "+r"(value));
#endif
  return value;
}

// blockIdx.x, read where it stands.
__device__ __forceinline__ int block_here() {
#if defined(__CUDA_ARCH__)
  int x;
  asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(x));
  return x;
#else
  return blockIdx.x;
#endif
}

// a / b to 2 ulps, without the slow path of a rounded division.
__device__ __forceinline__ float divide(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fdividef(a, b);
#else
  return a / b;
#endif
}

// The larger of both; NaN if one is, as relu(NaN) is NaN.
__device__ __forceinline__ float max_or_nan(float a, float b) {
#if defined(__CUDA_ARCH__)
  float larger;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(larger) : "f"(a), "f"(b));
  return larger;
#else
  return a > b || a != a ? a : b;
#endif
}

// From and to float, two 16-bit values at a time where there are two. bfloat16 is widened by
// integer operations on both together: as two 16-bit registers they would take twice the space.
template <class T>
struct Convert {  // float
  static __device__ __forceinline__ float widen(float v) { return v; }
  static __device__ __forceinline__ float narrow(float v) { return v; }
};
template <>
struct Convert<__nv_bfloat16> {
  using Pair = __nv_bfloat162;
  static __device__ __forceinline__ float widen(__nv_bfloat16 v) { return __bfloat162float(v); }
  static __device__ __forceinline__ float2 widen(uint32_t two) {
    return {float_of_bits(two << 16), float_of_bits(two & 0xffff0000u)};
  }
  static __device__ __forceinline__ __nv_bfloat16 narrow(float v) { return __float2bfloat16_rn(v); }
  static __device__ __forceinline__ Pair narrow(float a, float b) {
    return __floats2bfloat162_rn(a, b);
  }
};
template <>
struct Convert<__half> {
  using Pair = __half2;
  static __device__ __forceinline__ float widen(__half v) { return __half2float(v); }
  static __device__ __forceinline__ float2 widen(uint32_t two) {
    return __half22float2(*reinterpret_cast<const Pair*>(&two));
  }
  static __device__ __forceinline__ __half narrow(float v) { return __float2half_rn(v); }
  static __device__ __forceinline__ Pair narrow(float a, float b) {
    return __floats2half2_rn(a, b);
  }
};

template <class T, int W>
__device__ __forceinline__ Pack<float, W> widen(const Pack<T, W>& pack) {
  Pack<float, W> out;
  if constexpr (sizeof(T) == 4 || W == 1) {
#pragma unroll
    for (int i = 0; i < W; ++i) out.v[i] = Convert<T>::widen(pack.v[i]);
  } else {
#pragma unroll
    for (int i = 0; i < W / 2; ++i) {
      const float2 two = Convert<T>::widen(reinterpret_cast<const uint32_t*>(&pack)[i]);
      out.v[2 * i] = two.x;
      out.v[2 * i + 1] = two.y;
    }
  }
  return out;
}
template <class T, int W>
__device__ __forceinline__ Pack<T, W> narrow(const Pack<float, W>& pack) {
  Pack<T, W> out;
  if constexpr (sizeof(T) == 4 || W == 1) {
#pragma unroll
    for (int i = 0; i < W; ++i) out.v[i] = Convert<T>::narrow(pack.v[i]);
  } else {
    using Pair = typename Convert<T>::Pair;
#pragma unroll
    for (int i = 0; i < W / 2; ++i) {
      reinterpret_cast<Pair*>(&out)[i] = Convert<T>::narrow(pack.v[2 * i], pack.v[2 * i + 1]);
    }
  }
  return out;
}

// What moves `bytes` of an aligned address at once.
template <int bytes>
struct Word;
template <>
struct Word<16> {
  using type = uint4;
};
template <>
struct Word<8> {
  using type = uint2;
};
template <>
struct Word<4> {
  using type = uint32_t;
};
template <>
struct Word<2> {
  using type = uint16_t;
};
template <>
struct Word<1> {
  using type = uint8_t;
};

// An assignment of 16 bytes the compiler may take apart.
template <class Bits>
__device__ __forceinline__ void store_word(Bits* p, const Bits& bits) {
#if defined(__CUDA_ARCH__)
  if constexpr (sizeof(Bits) == 16) {
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(bits.x), "r"(bits.y),
                 "r"(bits.z), "r"(bits.w));
    return;
  }
#endif
  *p = bits;
}

// Global memory: W values at p, which is aligned as Pack<T, W> is.
template <int W = 1, class T>
__device__ __forceinline__ Pack<T, W> load(const T* p) {
#if !defined(__CUDACC__)
  emulation::read(p, sizeof(T) * W);
#endif
  using Bits = typename Word<alignof(Pack<T, W>)>::type;
  Pack<T, W> pack;
#pragma unroll
  for (int i = 0; i < int(sizeof(pack) / sizeof(Bits)); ++i) {
    reinterpret_cast<Bits*>(&pack)[i] = reinterpret_cast<const Bits*>(p)[i];
  }
  return pack;
}
template <int W, class T>
__device__ __forceinline__ void store(T* p, const Pack<T, W>& pack) {
#if !defined(__CUDACC__)
  emulation::write(p, sizeof(T) * W);
#endif
  using Bits = typename Word<alignof(Pack<T, W>)>::type;
#pragma unroll
  for (int i = 0; i < int(sizeof(pack) / sizeof(Bits)); ++i) {
    const Bits bits = reinterpret_cast<const Bits*>(&pack)[i];
    Bits* const to = reinterpret_cast<Bits*>(p) + i;
    store_word(to, bits);
  }
}

// Shared memory of a block: N values; another kSlot is other memory.
template <class T, int N, int kSlot = 0>
__device__ __forceinline__ T* shared_array() {
#if defined(__CUDACC__)
  __shared__ alignas(kAccessBytes) unsigned char memory[N * sizeof(T)];
  return reinterpret_cast<T*>(memory);
#else
  return emulation::shared_array<T, N, kSlot>();
#endif
}
template <class T>
__device__ __forceinline__ T load_shared(const T* p) {
#if !defined(__CUDACC__)
  emulation::read_shared(p, sizeof(T));
#endif
  return *p;
}
template <class T>
__device__ __forceinline__ void store_shared(T* p, T v) {
#if !defined(__CUDACC__)
  emulation::write_shared(p, sizeof(T));
#endif
  *p = v;
}
__device__ __forceinline__ void sync_block() { __syncthreads(); }

}  // namespace fusedres::cuda
