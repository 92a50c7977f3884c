// The mean of an image over its pixels, per channel, and its backward. x [n, pixels, channels]
// (channels_last), the means [n, channels]; sums are float32.
#pragma once

#include "rows.cuh"

namespace fusedres::cuda {

constexpr int kMeanInFlight = 4;
constexpr int kMeanBlocks = 3;

// One block of rows for an image: reads x, writes the means.
template <class T, int W>
__global__ void __launch_bounds__(kThreads, kMeanBlocks)
    global_avg_pool_kernel(const T* __restrict__ x, T* __restrict__ out, int64_t pixels,
                           int64_t channels) {
  constexpr int R = kMeanInFlight;
  Place p = place<W>();
  p.row = threadIdx.y;
  p.step = blockDim.y;
  float sums[1][W] = {};
  if (p.channel < channels) {
    const T* image = x + static_cast<int64_t>(blockIdx.y) * pixels * channels;
    for_each_group<R>(p, pixels, [&](const Group& group) {
      Pack<T, W> xs[R];
      load_rows<W>(xs, image, channels, p, group);
#pragma unroll
      for (int k = 0; k < R; ++k) {
        if (!group.has(k)) continue;
        const auto wide = widen(xs[k]);
#pragma unroll
        for (int i = 0; i < W; ++i) sums[0][i] += wide.v[i];
      }
    });
  }
  T* means = out + blockIdx.y * channels;
  sum_over_rows<W, 1>(sums, channels, [&](int, int64_t c, float sum) {
    const Pack<float, 1> mean = {sum / static_cast<float>(pixels)};
    store(means + c, narrow<T>(mean));
  });
}

// One block of rows for an image: reads the gradients of the means once, writes dx.
template <class T, int W>
__global__ void __launch_bounds__(kThreads, kMeanBlocks)
    global_avg_pool_backward_kernel(const T* __restrict__ grad, T* __restrict__ dx, int64_t pixels,
                                    int64_t channels) {
  const Place p = place<W>();
  if (p.channel >= channels) return;
  auto wide = widen(load<W>(grad + blockIdx.y * channels + p.channel));
#pragma unroll
  for (int i = 0; i < W; ++i) wide.v[i] /= static_cast<float>(pixels);
  const auto each = narrow<T>(wide);
  T* image = dx + static_cast<int64_t>(blockIdx.y) * pixels * channels + p.channel;
#pragma unroll 4
  for (int64_t row = threadIdx.y; row < pixels; row += blockDim.y) {
    store(image + row * channels, each);
  }
}

}  // namespace fusedres::cuda
