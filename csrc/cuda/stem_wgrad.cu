#include "stem_launch.cuh"
#include "stem_wgrad.cuh"

namespace fusedres::cuda {
namespace {

template <class T>
Grid grid_of(const StemShape& s, int64_t together) {
  using Tile = StemWgradTile<T>;
  const typename Tile::Tiles tiles{s.n, s.out_height(), s.out_width()};
  return over_stem_tiles<Tile>(tiles.tiles(), s.filters, Tile::kFilters, together, Tile::kBytes);
}

}  // namespace

int64_t stem_wgrad_workspace(DType dtype, Stem problem, int multiprocessors) {
  const StemShape s = stem_shape("stem_wgrad", problem, {});
  int64_t floats = 0;
  with_type(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const int64_t blocks = most_together<StemWgradTile<T>>(multiprocessors);
    floats = grid_of<T>(s, blocks).grid.y * problem.filters * kWindow;
  });
  return floats;
}

void stem_wgrad(DType dtype, Stem problem, const void* dy, const void* pixels, float* workspace,
                const Strided& dweight, Device device) {
  const StemShape s = stem_shape("stem_wgrad", problem, {dy, pixels, workspace});
  with_type(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using Tile = StemWgradTile<T>;
    const Grid g = grid_of<T>(s, together<Tile, Tile::kBytes>(device.multiprocessors));
    launch("stem_wgrad", stem(problem), g, device.stream, stem_wgrad_partial_kernel<T>,
           static_cast<const T*>(dy), static_cast<const T*>(pixels), workspace, s);
    launch("stem_wgrad (finalize)", stem(problem), over_partial_results(problem.filters * kWindow),
           device.stream, stem_wgrad_finalize_kernel, static_cast<const float*>(workspace), dweight,
           static_cast<int>(g.grid.y), s.filters);
  });
}

}  // namespace fusedres::cuda
