// Mean and variance of every channel, and what follows from them. A thread keeps a running (count,
// mean, sum of squared deviations) for each of its channels; samples are merged by Chan's formula
// in a fixed order: rows of a thread, threads of a block, blocks. Never E[x^2] - E[x]^2. All of it
// is of x - pivot, the first row of x, so that a mean far from 0 costs no digits.
#pragma once

#include "samples.cuh"

namespace fusedres::cuda {

constexpr int kStatsInFlight = 4;
constexpr int kStatsBlocks = 2;

// Merges the first `some` of R rows into the samples of a thread's channels, of n rows so far.
template <int W, int R, class T>
__device__ __forceinline__ void take(Sample (&mine)[W], float& n, const Pack<T, W> (&xs)[R],
                                     const Pack<float, W>& pivot, int some) {
  const float each = 1.0f / static_cast<float>(some);
  const float share = divide(static_cast<float>(some), n + static_cast<float>(some));
  Pack<float, W> wide[R];
#pragma unroll
  for (int k = 0; k < R; ++k) {
    if (k < some) wide[k] = widen(xs[k]);
  }
#pragma unroll
  for (int i = 0; i < W; ++i) {
    float y[R], sum = 0.0f;
#pragma unroll
    for (int k = 0; k < R; ++k) {
      y[k] = k < some ? wide[k].v[i] - pivot.v[i] : 0.0f;
      sum += y[k];
    }
    Sample sample = {sum * each, 0.0f};
#pragma unroll
    for (int k = 0; k < R; ++k) {
      const float deviation = k < some ? y[k] - sample.mean : 0.0f;
      sample.m2 = fmaf(deviation, deviation, sample.m2);
    }
    mine[i] = merge(mine[i], sample, n, share);
  }
  n += static_cast<float>(some);
}

// partial[block of rows] = (mean, m2) of x - pivot over its rows: reads x once and the pivot,
// writes 2C floats a block
template <class T, int W>
__global__ void __launch_bounds__(kThreads, kStatsBlocks)
    bn_stats_partial_kernel(const T* __restrict__ x, float* __restrict__ partial, int64_t rows,
                            int64_t channels) {
  constexpr int R = kStatsInFlight;
  const Place p = place<W>();
  Sample mine[W];
#pragma unroll
  for (int i = 0; i < W; ++i) mine[i] = {0.0f, 0.0f};
  float n = 0.0f;
  if (p.channel < channels) {
    const auto pivot = widen(load<W>(x + p.channel));
    for_each_group<R>(p, rows, [&](const Group& group) {
      Pack<T, W> xs[R];
      load_rows<W>(xs, x, channels, p, group);
      if (group.has(R - 1)) {
        take<W, R>(mine, n, xs, pivot, R);
      } else {
        int some = 1;
#pragma unroll
        for (int k = 1; k < R; ++k) some += group.has(k);
        take<W, R>(mine, n, xs, pivot, some);
      }
    });
  }

  float* means = shared_array<float, kThreads * W, 0>();
  float* m2s = shared_array<float, kThreads * W, 1>();
  float* counts = shared_array<float, kThreads, 2>();
  const auto tell = [&] {
#pragma unroll
    for (int i = 0; i < W; ++i) {
      store_shared(means + i * kThreads + thread(), mine[i].mean);
      store_shared(m2s + i * kThreads + thread(), mine[i].m2);
    }
    store_shared(counts + thread(), n);
  };
  tell();
  merge_rows([&](int other) {
    const float more = load_shared(counts + other);
    if (more == 0.0f) return;
    const float share = divide(more, n + more);
#pragma unroll
    for (int i = 0; i < W; ++i) {
      const int at = i * kThreads + other;
      mine[i] = merge(mine[i], {load_shared(means + at), load_shared(m2s + at)}, n, share);
    }
    n += more;
    tell();
  });
  if (threadIdx.y > 0 || p.channel >= channels) return;
  float* out = partial + static_cast<int64_t>(blockIdx.y) * 2 * channels + p.channel;
#pragma unroll
  for (int i = 0; i < W; ++i) {
    store(out + i, Pack<float, 1>{mine[i].mean});
    store(out + channels + i, Pack<float, 1>{mine[i].m2});
  }
}

// stats from the running mean and variance: reads 4C floats, writes 5C
__global__ void __launch_bounds__(kThreads)
    bn_running_stats_kernel(const float* __restrict__ running_mean,
                            const float* __restrict__ running_var, const float* __restrict__ weight,
                            const float* __restrict__ bias, float* __restrict__ stats,
                            int64_t channels, float eps) {
  const int64_t c = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (c >= channels) return;
  const float mean = load(running_mean + c).v[0], var = load(running_var + c).v[0];
  put_stats(stats, weight, bias, mean, var, eps, c, channels);
}

// torch.lerp: exactly `end` at weight 1
__device__ __forceinline__ float lerp(float start, float end, float weight) {
  const float delta = end - start;
  return weight < 0.5f ? fmaf(weight, delta, start) : end - delta * (1.0f - weight);
}

// running = running + momentum * (batch - running), the variance made unbiased: reads 4C floats,
// writes 2C
__global__ void __launch_bounds__(kThreads)
    bn_update_running_kernel(float* __restrict__ running_mean, float* __restrict__ running_var,
                             const float* __restrict__ stats, float unbias, float momentum,
                             int64_t channels) {
  const int64_t c = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (c >= channels) return;
  const float mean = load(stats + kMean * channels + c).v[0];
  const float var = load(stats + kVar * channels + c).v[0] * unbias;
  store(running_mean + c, Pack<float, 1>{lerp(load(running_mean + c).v[0], mean, momentum)});
  store(running_var + c, Pack<float, 1>{lerp(load(running_var + c).v[0], var, momentum)});
}

}  // namespace fusedres::cuda
