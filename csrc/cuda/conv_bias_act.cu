#include "conv_bias_act.cuh"
#include "conv_launch.cuh"

namespace fusedres::cuda {

void conv_bias_act(DType dtype, Conv c, const void* x, const void* weight, const float* bias,
                   const void* residual, bool relu, void* z, Device device) {
  const ConvShape s = conv_shape("conv_bias_act", c);
  check_alignment("conv_bias_act", {x, weight, bias, residual, z});
  with_conv_tile(dtype, s, device.multiprocessors, [&](auto* tile) {
    using Tile = std::remove_pointer_t<decltype(tile)>;
    using T = typename Tile::T;
    constexpr int kBytes = ConvBiasActMemory<Tile>::kBytes;
    const Grid g =
        over_tiles<Tile>(s, s.filters, together<Tile, kBytes>(device.multiprocessors), kBytes);
    launch("conv_bias_act", conv(c), g, device.stream, conv_bias_act_kernel<Tile>,
           static_cast<const T*>(x), static_cast<const T*>(weight), bias,
           static_cast<const T*>(residual), floor_of(relu), static_cast<T*>(z), s);
  });
}

}  // namespace fusedres::cuda
