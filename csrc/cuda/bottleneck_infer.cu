#include "bottleneck_infer.cuh"
#include "conv_launch.cuh"

namespace fusedres::cuda {

void bottleneck_infer(DType dtype, Bottleneck b, const void* x, const void* weight1,
                      const float* bias1, const void* weight2, const float* bias2,
                      const void* weight3, const float* bias3, void* z, Device device) {
  const Conv whole = {b.n, b.height, b.width, b.channels, b.inner, 3, 1};
  conv_shape("bottleneck_infer", whole);
  check_alignment("bottleneck_infer", {x, weight1, bias1, weight2, bias2, weight3, bias3, z});
  const auto run = [&](auto* tile) {
    using Tile = std::remove_pointer_t<decltype(tile)>;
    using T = typename Tile::T;
    static_assert(fits<Tile, Tile::kBytes>);
    const int64_t down = divide_up(b.height, Tile::kMostHeight);
    const int64_t across = divide_up(b.width, Tile::kWidth);
    const BottleneckShape s = {
        static_cast<int>(b.height),   static_cast<int>(b.width),
        static_cast<int>(b.channels), static_cast<int>(divide_up(b.height, down)),
        static_cast<int>(down),       static_cast<int>(across)};
    const Grid g = {dim3(static_cast<unsigned>(b.n * down * across)), dim3(Tile::kThreads),
                    Tile::kBytes};
    launch("bottleneck_infer", conv(whole), g, device.stream, bottleneck_infer_kernel<Tile>,
           static_cast<const T*>(x), static_cast<const T*>(weight1), bias1,
           static_cast<const T*>(weight2), bias2, static_cast<const T*>(weight3), bias3,
           static_cast<T*>(z), s);
  };
  with_type(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    if constexpr (sizeof(T) == 2) {
      if (b.inner == 64) return run(static_cast<BottleneckTile<T, 64, 2>*>(nullptr));
      if (b.inner == 128) return run(static_cast<BottleneckTile<T, 128, 1>*>(nullptr));
    }
    throw std::invalid_argument("bottleneck_infer has 16 bits and 64 or 128 inner channels, got " +
                                std::to_string(8 * sizeof(T)) + " and " + std::to_string(b.inner));
  });
}

}  // namespace fusedres::cuda
