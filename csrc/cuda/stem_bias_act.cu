#include "stem_bias_act.cuh"
#include "stem_launch.cuh"

namespace fusedres::cuda {

void stem_bias_act(DType dtype, Stem problem, const StemImage& x, const Strided& weight,
                   const float* bias, bool pool, void* z, Device device) {
  if (!pool) return stem_bias_act_unpooled(dtype, problem, x, weight, bias, z, device);
  const StemShape s = stem_shape("stem_bias_act", problem, {z});
  check_image("stem_bias_act", problem, x);
  const PooledTiles tiles{s.n, (s.out_height() - 1) / 2 + 1, (s.out_width() - 1) / 2 + 1};
  with_type(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using Tile = StemPoolTile<T>;
    constexpr int kBytes = StemMemory<Tile>::kBytes;
    const Grid g = over_stem_tiles<Tile>(tiles.tiles(), s.filters, Tile::kN,
                                         together<Tile, kBytes>(device.multiprocessors), kBytes);
    launch("stem_bias_act", stem(problem), g, device.stream, stem_pool_kernel<T>, x, weight, bias,
           static_cast<T*>(z), s);
  });
}

}  // namespace fusedres::cuda
