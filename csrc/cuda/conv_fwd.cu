#include "conv_fwd.cuh"
#include "conv_launch.cuh"

namespace fusedres::cuda {
namespace {

template <class Tile, bool kPrologue>
Grid grid_of(const ConvShape& s, int multiprocessors) {
  return over_tiles<Tile>(s, s.filters, multiprocessors, ConvFwdMemory<Tile, kPrologue>::kBytes);
}

}  // namespace

int64_t conv_fwd_workspace(DType dtype, Conv c, int multiprocessors) {
  const ConvShape s = conv_shape("conv_fwd", c);
  int64_t floats = 0;
  with_conv_tile(dtype, s, multiprocessors, [&](auto* tile) {
    using Tile = std::remove_pointer_t<decltype(tile)>;
    floats = int64_t{grid_of<Tile, false>(s, multiprocessors).grid.y} * 2 * s.filters;
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
      const Grid g = grid_of<Tile, prologue.value>(s, device.multiprocessors);
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
