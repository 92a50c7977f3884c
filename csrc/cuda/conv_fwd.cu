#include "conv_fwd.cuh"
#include "conv_launch.cuh"

namespace fusedres::cuda {

int64_t conv_fwd_workspace(DType dtype, Conv c, int multiprocessors) {
  const ConvShape s = conv_shape("conv_fwd", c);
  int64_t floats = 0;
  with_conv_tile(dtype, s, multiprocessors, [&](auto* tile) {
    using Tile = std::remove_pointer_t<decltype(tile)>;
    const Grid g = over_tiles<Tile>(s, s.filters, most_together<Tile>(multiprocessors), 0);
    floats = int64_t{g.grid.y} * 2 * s.filters;
  });
  return floats;
}

void conv_fwd(DType dtype, Conv c, const void* x, const float* stats, bool relu, const void* weight,
              const float* norm_weight, const float* norm_bias, float eps, float* workspace,
              void* y, float* y_stats, Device device) {
  const ConvShape s = conv_shape("conv_fwd", c);
  check_alignment("conv_fwd", {x, stats, weight, y});
  with_conv_tile(dtype, s, device.multiprocessors, [&](auto* tile) {
    using Tile = std::remove_pointer_t<decltype(tile)>;
    using T = typename Tile::T;
    with_flag(stats != nullptr, [&](auto prologue) {
      constexpr int kBytes = ConvFwdMemory<Tile, prologue.value>::kBytes;
      const Grid g =
          over_tiles<Tile>(s, s.filters, together<Tile, kBytes>(device.multiprocessors), kBytes);
      float* const partial = y_stats == nullptr ? nullptr : workspace;
      launch("conv_fwd", conv(c), g, device.stream, conv_fwd_kernel<Tile, prologue.value>,
             static_cast<const T*>(x), stats, floor_of(relu), static_cast<const T*>(weight),
             static_cast<T*>(y), partial, s);
      if (y_stats == nullptr) return;
      launch("conv_fwd (finalize)", conv(c), over_partial_results(s.filters), device.stream,
             bn_stats_finalize_kernel<T>, static_cast<const T*>(nullptr), partial,
             static_cast<const float*>(nullptr), norm_weight, norm_bias, y_stats, int64_t{s.rows},
             static_cast<int>(g.grid.y), int{Tile::kM}, int64_t{s.filters}, eps);
    });
  });
}

}  // namespace fusedres::cuda
