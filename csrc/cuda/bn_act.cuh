// z = relu(x * scale + shift (+ residual)), each tensor [rows, channels] and moved once; scale and
// shift are float32. The residual may have a scale and a shift of its own.
#pragma once

#include "rows.cuh"

namespace fusedres::cuda {

enum class Residual { none, plain, normalised };

// Rows in flight, and blocks of a multiprocessor that fit with what a thread then holds.
template <Residual kResidual>
constexpr int kActInFlight = kResidual == Residual::none ? 4 : 2;
constexpr int kActBlocks = 3;

template <class T, int W, Residual kResidual, bool kRelu>
__global__ void __launch_bounds__(kThreads, kActBlocks)
    bn_act_kernel(const T* __restrict__ x, const float* __restrict__ stats,
                  const T* __restrict__ residual, const float* __restrict__ residual_stats,
                  T* __restrict__ z, int64_t rows, int64_t channels) {
  constexpr int R = kActInFlight<kResidual>;
  const Place p = place<W>();
  if (p.channel >= channels) return;
  const auto scale = load_row<W>(stats, kScale, channels, p.channel);
  const auto shift = load_row<W>(stats, kShift, channels, p.channel);
  Pack<float, W> branch_scale, branch_shift;
  if constexpr (kResidual == Residual::normalised) {
    branch_scale = load_row<W>(residual_stats, kScale, channels, p.channel);
    branch_shift = load_row<W>(residual_stats, kShift, channels, p.channel);
  }
  for_each_group<R>(p, rows, [&](const Group& group) {
    Pack<T, W> xs[R], rs[R];
    load_rows<W>(xs, x, channels, p, group);
    if constexpr (kResidual != Residual::none) load_rows<W>(rs, residual, channels, p, group);
#pragma unroll
    for (int k = 0; k < R; ++k) {
      if (!group.has(k)) continue;
      const auto x_k = widen(xs[k]);
      Pack<float, W> r_k, out;
      if constexpr (kResidual != Residual::none) r_k = widen(rs[k]);
#pragma unroll
      for (int i = 0; i < W; ++i) {
        float u = affine(x_k.v[i], scale.v[i], shift.v[i]);
        if constexpr (kResidual == Residual::plain) u += r_k.v[i];
        if constexpr (kResidual == Residual::normalised) {
          u += affine(r_k.v[i], branch_scale.v[i], branch_shift.v[i]);
        }
        out.v[i] = kRelu && u <= 0.0f ? 0.0f : u;  // a NaN stays
      }
      store(z + group.at(k) * channels + p.channel, narrow<T>(out));
    }
  });
}

}  // namespace fusedres::cuda
