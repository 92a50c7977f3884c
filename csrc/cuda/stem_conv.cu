#include "stem_conv.cuh"
#include "stem_launch.cuh"

namespace fusedres::cuda {
namespace {

template <class T>
constexpr int kBytes = StemMemory<StemConvTile<T>>::kBytes;

template <class T>
Grid grid_of(const StemShape& s, int64_t together) {
  using Tile = StemConvTile<T>;
  const typename Tile::Tiles tiles{s.n, s.out_height(), s.out_width()};
  return over_stem_tiles<Tile>(tiles.tiles(), s.filters, Tile::kN, together, kBytes<T>);
}

}  // namespace

int64_t stem_conv_workspace(DType dtype, Stem problem, int multiprocessors) {
  const StemShape s = stem_shape("stem_conv", problem, {});
  int64_t floats = 0;
  with_type(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const int64_t blocks = most_together<StemConvTile<T>>(multiprocessors);
    floats = grid_of<T>(s, blocks).grid.y * (2 * problem.filters + 1);
  });
  return floats;
}

void stem_conv(DType dtype, Stem problem, const StemImage& x, const Strided& weight,
               const float* norm_weight, const float* norm_bias, float eps, float* workspace,
               void* pixels, void* y, float* y_stats, Device device) {
  const StemShape s = stem_shape("stem_conv", problem, {pixels, y});
  check_image("stem_conv", problem, x);
  with_type(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const Grid g = grid_of<T>(s, together<StemConvTile<T>, kBytes<T>>(device.multiprocessors));
    float* const partial = y_stats == nullptr ? nullptr : workspace;
    float* const block_rows = partial + int64_t{g.grid.y} * 2 * s.filters;
    launch("stem_conv", stem(problem), g, device.stream, stem_conv_kernel<T>, x, weight,
           static_cast<const float*>(nullptr), -std::numeric_limits<float>::infinity(),
           static_cast<T*>(pixels), static_cast<T*>(y), partial, block_rows, s);
    if (y_stats == nullptr) return;
    launch("stem_conv (finalize)", stem(problem), over_partial_results(s.filters), device.stream,
           bn_stats_finalize_kernel<T>, static_cast<const T*>(nullptr), partial, block_rows,
           norm_weight, norm_bias, y_stats, int64_t{s.n} * s.out_height() * s.out_width(),
           static_cast<int>(g.grid.y), 1, problem.filters, eps);
  });
}

void stem_bias_act_unpooled(DType dtype, Stem problem, const StemImage& x, const Strided& weight,
                            const float* bias, void* z, Device device) {
  const StemShape s = stem_shape("stem_bias_act", problem, {z});
  check_image("stem_bias_act", problem, x);
  with_type(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    float* const none = nullptr;
    const Grid g = grid_of<T>(s, together<StemConvTile<T>, kBytes<T>>(device.multiprocessors));
    launch("stem_bias_act", stem(problem), g, device.stream, stem_conv_kernel<T>, x, weight, bias,
           0.0f, static_cast<T*>(nullptr), static_cast<T*>(z), none, none, s);
  });
}

}  // namespace fusedres::cuda
