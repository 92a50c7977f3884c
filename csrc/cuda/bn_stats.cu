#include "bn_stats.cuh"
#include "launch.cuh"

namespace fusedres::cuda {

static_assert(kStatsBlocks <= kMostBlocks);
int64_t bn_workspace(DType dtype, int64_t rows, int64_t channels, int quantities,
                     int multiprocessors) {
  return most_row_blocks(dtype, rows, channels, multiprocessors) * quantities * channels;
}

void bn_stats(DType dtype, int64_t rows, int64_t channels, const void* x, const float* weight,
              const float* bias, float eps, float* workspace, float* stats, Device device) {
  const std::string problem = matrix(rows, channels);
  with_type_and_width(dtype, channels, {x}, [&](auto* type, auto width) {
    using T = std::remove_pointer_t<decltype(type)>;
    const Grid g =
        over_rows(rows, channels / width, kStatsInFlight, kStatsBlocks, device.multiprocessors);
    launch("bn_stats", problem, g, device.stream, bn_stats_partial_kernel<T, width.value>,
           static_cast<const T*>(x), workspace, rows, channels);
    launch("bn_stats (finalize)", problem, over_partial_results(channels), device.stream,
           bn_stats_finalize_kernel<T>, static_cast<const T*>(x), workspace,
           static_cast<const float*>(nullptr), weight, bias, stats, rows,
           static_cast<int>(g.grid.y), static_cast<int>(g.block.y), channels, eps);
  });
}

void bn_running_stats(int64_t channels, const float* running_mean, const float* running_var,
                      const float* weight, const float* bias, float eps, float* stats,
                      Device device) {
  launch("bn_running_stats", matrix(1, channels), over_channels(channels), device.stream,
         bn_running_stats_kernel, running_mean, running_var, weight, bias, stats, channels, eps);
}

void bn_update_running(int64_t channels, float* running_mean, float* running_var,
                       const float* stats, int64_t count, float momentum, Device device) {
  const float unbias = static_cast<double>(count) / static_cast<double>(count - 1);
  launch("bn_update_running", matrix(1, channels), over_channels(channels), device.stream,
         bn_update_running_kernel, running_mean, running_var, stats, unbias, momentum, channels);
}

}  // namespace fusedres::cuda
