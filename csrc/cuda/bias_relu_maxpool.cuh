// relu(x + bias) and the maximum over 3x3 windows, stride 2, padding 1, of an image in
// channels_last.
#pragma once

#include "pool.cuh"

namespace fusedres::cuda {

// The ReLU's maximum of a window so far, by torch's rule: a NaN or something larger takes its
// place.
template <int W>
struct Positive {
  Pack<float, W> value = {};
  __device__ __forceinline__ void take(int i, float other, int) {
    if (other > value.v[i] || other != other) value.v[i] = other;
  }
  __device__ __forceinline__ void merge(int i, const Positive& other, int) {
    take(i, other.value.v[i], 0);
  }
};

// x -> z; rounding keeps the order of values, so the maximum alone is rounded
template <class T, int W>
__global__ void __launch_bounds__(kThreads, kPoolBlocks)
    bias_relu_maxpool_kernel(const T* __restrict__ x, const float* __restrict__ bias,
                             T* __restrict__ z, PoolShape s) {
  const Place p = place<W>();
  if (p.channel >= s.channels) return;
  Pack<float, W> b = {};
  if (bias != nullptr) b = load<W>(bias + p.channel);
  const auto biased = [&](Pack<float, W> pixels) {
#pragma unroll
    for (int i = 0; i < W; ++i) pixels.v[i] += b.v[i];
    return pixels;
  };
  for_each_window<Positive<W>, T, W>(x, s, p, biased, [&](int64_t out, const Positive<W>& best) {
    store(z + out, narrow<T>(best.value));
  });
}

}  // namespace fusedres::cuda
