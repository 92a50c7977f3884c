// z = relu(x * scale + shift (+ residual)); x, z, residual [rows, C] row-major (channels_last),
// scale and shift [C] float32. Reads x (and residual) once, writes z once.
//
// A thread keeps one column of 16 bytes, so its scale and shift stay in registers, and walks down
// the rows with several loads in flight. A row is covered by as many threads as it has such
// columns.
#pragma once

#include "device.cuh"

namespace fusedres::cuda {

constexpr int kActThreads = 256;
constexpr int kActInFlight = 4;

__device__ __forceinline__ float act(float x, float scale, float shift, float residual, bool relu) {
  const float u = fmaf(x, scale, shift) + residual;
  return relu && u <= 0.0f ? 0.0f : u;  // a NaN stays
}

// C a multiple of Pack<T>::width; columns = min(C / width, kActThreads), blockDim.x = columns,
// blockDim.y = rows of a block; gridDim.x strides over rows, gridDim.y covers the columns.
template <class T, bool kResidual, bool kRelu>
__global__ void __launch_bounds__(kActThreads)
    bn_act_pack_kernel(const T* __restrict__ x, const float* __restrict__ scale,
                       const float* __restrict__ shift, const T* __restrict__ residual,
                       T* __restrict__ z, int64_t rows, int64_t channels) {
  constexpr int width = Pack<T>::width;
  const int64_t column = (static_cast<int64_t>(blockIdx.y) * blockDim.x + threadIdx.x) * width;
  if (column >= channels) return;
  float a[width], b[width];
#pragma unroll
  for (int i = 0; i < width; ++i) {
    a[i] = scale[column + i];
    b[i] = shift[column + i];
  }
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.y;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  for (int64_t row = first; row < rows; row += step * kActInFlight) {
    Pack<T> xs[kActInFlight], rs[kActInFlight];
#pragma unroll
    for (int k = 0; k < kActInFlight; ++k) {
      const int64_t at = row + k * step;
      if (at < rows) {
        xs[k] = load_pack(x + at * channels + column);
        if constexpr (kResidual) rs[k] = load_pack(residual + at * channels + column);
      }
    }
#pragma unroll
    for (int k = 0; k < kActInFlight; ++k) {
      const int64_t at = row + k * step;
      if (at < rows) {
        Pack<T> out;
#pragma unroll
        for (int i = 0; i < width; ++i) {
          const float r = kResidual ? widen(rs[k].v[i]) : 0.0f;
          out.v[i] = narrow<T>(act(widen(xs[k].v[i]), a[i], b[i], r, kRelu));
        }
        store_pack(z + at * channels + column, out);
      }
    }
  }
}

// Any C, one value a thread at a time.
template <class T, bool kResidual, bool kRelu>
__global__ void __launch_bounds__(kActThreads)
    bn_act_value_kernel(const T* __restrict__ x, const float* __restrict__ scale,
                        const float* __restrict__ shift, const T* __restrict__ residual,
                        T* __restrict__ z, int64_t rows, int64_t channels) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < rows * channels;
       i += step) {
    const int64_t c = i % channels;
    const float r = kResidual ? widen(residual[i]) : 0.0f;
    z[i] = narrow<T>(act(widen(x[i]), scale[c], shift[c], r, kRelu));
  }
}

}  // namespace fusedres::cuda
