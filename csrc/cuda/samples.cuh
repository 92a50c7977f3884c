// Mean and squared deviations of a part of a channel's values, merged by Chan's formula in a fixed
// order, and the stats that all parts together give.
#pragma once

#include "rows.cuh"

namespace fusedres::cuda {

struct Sample {
  float mean, m2;  // the mean, the sum of squared deviations from it
};

// Takes in `other`, whose size is `share` of both together; n is this sample's (Chan et al. 1979).
__device__ __forceinline__ Sample merge(Sample a, Sample other, float n, float share) {
  const float delta = other.mean - a.mean;
  return {fmaf(delta, share, a.mean), a.m2 + other.m2 + delta * delta * (n * share)};
}
// stats of a channel; rstd as rounded, shift of the scale as rounded
__device__ __forceinline__ void put_stats(float* stats, const float* weight, const float* bias,
                                          float mean, float var, float eps, int64_t c,
                                          int64_t channels) {
  const float rstd = 1.0f / sqrtf(var + eps);
  const float scale = weight == nullptr ? rstd : load(weight + c).v[0] * rstd;
  const float shift = fmaf(-mean, scale, bias == nullptr ? 0.0f : load(bias + c).v[0]);
  const float values[] = {mean, var, rstd, scale, shift};
#pragma unroll
  for (int row = 0; row < 5; ++row) {
    store(stats + row * channels + c, Pack<float, 1>{values[row]});
  }
}

// stats from the samples of all blocks of rows, of which a row of threads takes every
// kFinalizeRows-th: reads 2C floats a block and the pivot, writes 5C. `height` rows of threads made
// them, or tiles of so many rows; or `block_rows` says how many rows each block's are of. Without x
// there is no pivot.
template <class T>
__global__ void __launch_bounds__(kFinalizeColumns* kFinalizeRows)
    bn_stats_finalize_kernel(const T* __restrict__ x, const float* __restrict__ partial,
                             const float* __restrict__ block_rows, const float* __restrict__ weight,
                             const float* __restrict__ bias, float* __restrict__ stats,
                             int64_t rows, int blocks, int height, int64_t channels, float eps) {
  const int64_t c = static_cast<int64_t>(blockIdx.x) * kFinalizeColumns + threadIdx.x;
  const int64_t step = static_cast<int64_t>(blocks) * height;
  const int64_t even = rows / step * height, rest = rows % step;
  const auto count_of_block = [&](int block) {
    if (block_rows != nullptr) return load(block_rows + block).v[0];
    const int64_t left = rest - static_cast<int64_t>(block) * height;
    return static_cast<float>(even + (left < 0 ? 0 : left < height ? left : height));
  };
  Sample mine = {0.0f, 0.0f};
  float count = 0.0f;
  constexpr int R = 4;  // in flight
  if (c < channels) {
#pragma unroll 1
    for (int block = threadIdx.y; block < blocks; block += R * kFinalizeRows) {
      Sample samples[R];
#pragma unroll
      for (int k = 0; k < R; ++k) {
        const int at = block + k * kFinalizeRows;
        if (at >= blocks) continue;
        const float* from = partial + static_cast<int64_t>(at) * 2 * channels + c;
        samples[k] = {load(from).v[0], load(from + channels).v[0]};
      }
#pragma unroll
      for (int k = 0; k < R; ++k) {
        const int at = block + k * kFinalizeRows;
        if (at >= blocks) continue;
        const float other = count_of_block(at);
        if (other > 0.0f) mine = merge(mine, samples[k], count, divide(other, count + other));
        count += other;
      }
    }
  }
  float* means = shared_array<float, kFinalizeColumns * kFinalizeRows, 0>();
  float* m2s = shared_array<float, kFinalizeColumns * kFinalizeRows, 1>();
  float* counts = shared_array<float, kFinalizeColumns * kFinalizeRows, 2>();
  const auto tell = [&] {
    store_shared(means + thread(), mine.mean);
    store_shared(m2s + thread(), mine.m2);
    store_shared(counts + thread(), count);
  };
  tell();
  merge_rows([&](int other) {
    const float more = load_shared(counts + other);
    if (more == 0.0f) return;
    const Sample sample = {load_shared(means + other), load_shared(m2s + other)};
    mine = merge(mine, sample, count, divide(more, count + more));
    count += more;
    tell();
  });
  if (threadIdx.y > 0 || c >= channels) return;
  const float mean = mine.mean + (x == nullptr ? 0.0f : widen(load(x + c)).v[0]);
  put_stats(stats, weight, bias, mean, mine.m2 / rows, eps, c, channels);
}

}  // namespace fusedres::cuda
