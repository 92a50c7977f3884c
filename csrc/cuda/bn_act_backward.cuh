// The backward of bn_act: sums over all rows, then the gradients.
//
// With du the gradient behind the ReLU (0 where the stored output is <= 0):
//   dbias = sum(du),  dweight = sum(du * (x - mean)) * rstd
//   dx = scale * (du - (dbias + (x - mean) * rstd * dweight) / rows)
//      = scale * du + slope * (x - mean) + offset
// and the same for a residual that has a batch norm of its own, with its statistics.
#pragma once

#include "rows.cuh"

namespace fusedres::cuda {

// Where du comes from: the gradient as it is, or behind a ReLU whose output is computed again from
// x, or was stored.
enum class Mask { none, from_x, from_z };

constexpr int kBackwardInFlight = 2;
constexpr int kReduceBlocks = 2;
constexpr int kApplyBlocks = 2;
constexpr int kFixedBlocks = 3;

// 0 where the output was <= 0: a NaN lets the gradient through
__device__ __forceinline__ float behind_relu(float z, float grad) {
  return z <= 0.0f ? 0.0f : grad;
}
// The output without a residual, as it was stored.
template <class T, int W>
__device__ __forceinline__ Pack<float, W> stored(const Pack<float, W>& x,
                                                 const Pack<float, W>& scale,
                                                 const Pack<float, W>& shift) {
  Pack<float, W> u;
#pragma unroll
  for (int i = 0; i < W; ++i) u.v[i] = affine(x.v[i], scale.v[i], shift.v[i]);
  return widen(narrow<T>(u));
}

// partial[block of rows] = sum(du), sum(du * (x - mean)), and of the branch sum(du * (r - mean)).
// Reads grad and x, z if the mask comes from it and r if there is a branch; with z also writes du,
// which may be grad.
template <class T, int W, Mask kMask, bool kBranch>
__global__ void __launch_bounds__(kThreads, kReduceBlocks)
    bn_act_backward_partial_kernel(const T* grad, const T* __restrict__ x, const T* __restrict__ z,
                                   const float* __restrict__ stats, const T* __restrict__ branch,
                                   const float* __restrict__ branch_stats, T* du,
                                   float* __restrict__ partial, int64_t rows, int64_t channels) {
  constexpr int R = kBackwardInFlight;
  constexpr int K = kBranch ? 3 : 2;
  const Place p = place<W>();
  float sums[K][W] = {};
  if (p.channel < channels) {
    const auto mean = load_row<W>(stats, kMean, channels, p.channel);
    Pack<float, W> scale, shift, branch_mean;
    if constexpr (kMask == Mask::from_x) {
      scale = load_row<W>(stats, kScale, channels, p.channel);
      shift = load_row<W>(stats, kShift, channels, p.channel);
    }
    if constexpr (kBranch) branch_mean = load_row<W>(branch_stats, kMean, channels, p.channel);
    for_each_group<R>(p, rows, [&](const Group& group) {
      Pack<T, W> gs[R], xs[R], zs[R], bs[R];
      load_rows<W>(gs, grad, channels, p, group);
      load_rows<W>(xs, x, channels, p, group);
      if constexpr (kMask == Mask::from_z) load_rows<W>(zs, z, channels, p, group);
      if constexpr (kBranch) load_rows<W>(bs, branch, channels, p, group);
#pragma unroll
      for (int k = 0; k < R; ++k) {
        if (!group.has(k)) continue;
        auto g = widen(gs[k]);
        const auto x_k = widen(xs[k]);
        Pack<float, W> z_k, b_k;
        if constexpr (kMask == Mask::from_x) z_k = stored<T>(x_k, scale, shift);
        if constexpr (kMask == Mask::from_z) z_k = widen(zs[k]);
        if constexpr (kBranch) b_k = widen(bs[k]);
#pragma unroll
        for (int i = 0; i < W; ++i) {
          if constexpr (kMask != Mask::none) g.v[i] = behind_relu(z_k.v[i], g.v[i]);
          sums[0][i] += g.v[i];
          sums[1][i] = fmaf(g.v[i], x_k.v[i] - mean.v[i], sums[1][i]);
          if constexpr (kBranch) {
            sums[2][i] = fmaf(g.v[i], b_k.v[i] - branch_mean.v[i], sums[2][i]);
          }
        }
        if constexpr (kMask == Mask::from_z) {
          store(du + group.at(k) * channels + p.channel, narrow<T>(g));
        }
      }
    });
  }
  float* out = partial + static_cast<int64_t>(blockIdx.y) * K * channels;
  sum_over_rows<W, K>(sums, channels, [&](int k, int64_t c, float sum) {
    store(out + k * channels + c, Pack<float, 1>{sum});
  });
}

// What follows from a channel's sum(du) and from its sum(du * (x - mean)); per_row is -1 / rows.
__device__ __forceinline__ void put_sum(float* sums, const float* stats, int64_t channels,
                                        int64_t channel, float per_row, float sum) {
  const float scale = load_row<1>(stats, kScale, channels, channel).v[0];
  store(sums + kDbias * channels + channel, Pack<float, 1>{sum});
  store(sums + kOffset * channels + channel, Pack<float, 1>{per_row * scale * sum});
}
__device__ __forceinline__ void put_product(float* sums, const float* stats, int64_t channels,
                                            int64_t channel, float per_row, float sum) {
  const float scale = load_row<1>(stats, kScale, channels, channel).v[0];
  const float rstd = load_row<1>(stats, kRstd, channels, channel).v[0];
  const float dweight = rstd * sum;
  store(sums + kDweight * channels + channel, Pack<float, 1>{dweight});
  store(sums + kSlope * channels + channel, Pack<float, 1>{per_row * scale * rstd * dweight});
}

// sums (and those of the branch) from the partial ones, added in a fixed order: reads K * C floats
// a block, writes 4C for each batch norm.
template <int K>
__global__ void __launch_bounds__(kFinalizeColumns* kFinalizeRows)
    bn_act_backward_finalize_kernel(const float* __restrict__ partial,
                                    const float* __restrict__ stats,
                                    const float* __restrict__ branch_stats,
                                    float* __restrict__ sums, float* __restrict__ branch_sums,
                                    int64_t rows, int blocks, int64_t channels) {
  const int64_t c = static_cast<int64_t>(blockIdx.x) * kFinalizeColumns + threadIdx.x;
  float mine[K][1] = {};
  if (c < channels) {
    for (int block = threadIdx.y; block < blocks; block += kFinalizeRows) {
#pragma unroll
      for (int k = 0; k < K; ++k) {
        mine[k][0] += load(partial + (static_cast<int64_t>(block) * K + k) * channels + c).v[0];
      }
    }
  }
  const float per_row = -1.0f / static_cast<float>(rows);
  sum_over_rows<1, K>(mine, channels, [&](int k, int64_t channel, float sum) {
    if (k == 0) put_sum(sums, stats, channels, channel, per_row, sum);
    if (k == 1) put_product(sums, stats, channels, channel, per_row, sum);
    if constexpr (K == 3) {
      if (k == 0) put_sum(branch_sums, branch_stats, channels, channel, per_row, sum);
      if (k == 2) put_product(branch_sums, branch_stats, channels, channel, per_row, sum);
    }
  });
}

// dx = scale * du + slope * (x - mean) + offset, for the channels of a thread. Never divides by the
// weight, which may be 0.
template <int W>
struct Gradient {
  Pack<float, W> scale, mean, slope, offset;

  __device__ __forceinline__ Gradient(const float* stats, const float* sums, int64_t channels,
                                      int64_t channel)
      : scale(load_row<W>(stats, kScale, channels, channel)),
        mean(load_row<W>(stats, kMean, channels, channel)),
        slope(load_row<W>(sums, kSlope, channels, channel)),
        offset(load_row<W>(sums, kOffset, channels, channel)) {}
  __device__ __forceinline__ Pack<float, W> operator()(const Pack<float, W>& du,
                                                       const Pack<float, W>& x) const {
    Pack<float, W> dx;
#pragma unroll
    for (int i = 0; i < W; ++i) {
      const float rest = fmaf(slope.v[i], x.v[i] - mean.v[i], offset.v[i]);
      dx.v[i] = fmaf(scale.v[i], du.v[i], rest);
    }
    return dx;
  }
};

// With the batch's statistics: reads grad and x, writes dx, which may be grad; with a branch also
// reads r and writes dr.
template <class T, int W, bool kRelu, bool kBranch>
__global__ void __launch_bounds__(kThreads, kApplyBlocks)
    bn_act_backward_apply_kernel(const T* grad, const T* __restrict__ x,
                                 const float* __restrict__ stats, const float* __restrict__ sums,
                                 const T* __restrict__ branch,
                                 const float* __restrict__ branch_stats,
                                 const float* __restrict__ branch_sums, T* dx,
                                 T* __restrict__ dbranch, int64_t rows, int64_t channels) {
  constexpr int R = kBranch ? 1 : kBackwardInFlight;  // what the registers hold
  const Place p = place<W>();
  if (p.channel >= channels) return;
  const Gradient<W> of_x(stats, sums, channels, p.channel);
  const Gradient<W> of_branch(kBranch ? branch_stats : stats, kBranch ? branch_sums : sums,
                              channels, p.channel);
  Pack<float, W> shift;
  if constexpr (kRelu) shift = load_row<W>(stats, kShift, channels, p.channel);
  for_each_group<R>(p, rows, [&](const Group& group) {
    Pack<T, W> gs[R], xs[R], bs[R];
    load_rows<W>(gs, grad, channels, p, group);
    load_rows<W>(xs, x, channels, p, group);
    if constexpr (kBranch) load_rows<W>(bs, branch, channels, p, group);
#pragma unroll
    for (int k = 0; k < R; ++k) {
      if (!group.has(k)) continue;
      auto du = widen(gs[k]);
      const auto x_k = widen(xs[k]);
      if constexpr (kRelu) {
        const auto z = stored<T>(x_k, of_x.scale, shift);
#pragma unroll
        for (int i = 0; i < W; ++i) du.v[i] = behind_relu(z.v[i], du.v[i]);
      }
      const int64_t at = group.at(k) * channels + p.channel;
      if constexpr (kBranch) store(dbranch + at, narrow<T>(of_branch(du, widen(bs[k]))));
      store(dx + at, narrow<T>(of_x(du, x_k)));
    }
  });
}

// With fixed statistics dx = scale * du: reads grad, and x if the ReLU's mask comes from it.
template <class T, int W, bool kRelu>
__global__ void __launch_bounds__(kThreads, kFixedBlocks)
    bn_act_backward_fixed_kernel(const T* grad, const T* __restrict__ x,
                                 const float* __restrict__ stats, T* dx, int64_t rows,
                                 int64_t channels) {
  constexpr int R = kBackwardInFlight;
  const Place p = place<W>();
  if (p.channel >= channels) return;
  const auto scale = load_row<W>(stats, kScale, channels, p.channel);
  Pack<float, W> shift;
  if constexpr (kRelu) shift = load_row<W>(stats, kShift, channels, p.channel);
  for_each_group<R>(p, rows, [&](const Group& group) {
    Pack<T, W> gs[R], xs[R];
    load_rows<W>(gs, grad, channels, p, group);
    if constexpr (kRelu) load_rows<W>(xs, x, channels, p, group);
#pragma unroll
    for (int k = 0; k < R; ++k) {
      if (!group.has(k)) continue;
      auto du = widen(gs[k]);
      if constexpr (kRelu) {
        const auto z = stored<T>(widen(xs[k]), scale, shift);
#pragma unroll
        for (int i = 0; i < W; ++i) du.v[i] = behind_relu(z.v[i], du.v[i]);
      }
#pragma unroll
      for (int i = 0; i < W; ++i) du.v[i] *= scale.v[i];
      store(dx + group.at(k) * channels + p.channel, narrow<T>(du));
    }
  });
}

}  // namespace fusedres::cuda
