#include "bn_act_backward.cuh"
#include "launch.cuh"

namespace fusedres::cuda {
namespace {

static_assert(kReduceBlocks <= kMostBlocks);

template <Mask kMask>
using With = std::integral_constant<Mask, kMask>;

}  // namespace

void bn_act_backward_reduce(DType dtype, int64_t rows, int64_t channels, const void* grad,
                            const void* x, const void* z, const float* stats, const void* residual,
                            const float* residual_stats, bool relu, float* workspace, void* du,
                            float* sums, float* residual_sums, Device device) {
  const std::string problem = matrix(rows, channels);
  const auto run = [&](auto* type, auto width, auto mask, auto branch) {
    using T = std::remove_pointer_t<decltype(type)>;
    const Grid g =
        over_rows(rows, channels / width, kBackwardInFlight, kReduceBlocks, device.multiprocessors);
    launch("bn_act_backward_reduce", problem, g, device.stream,
           bn_act_backward_partial_kernel<T, width.value, mask.value, branch.value>,
           static_cast<const T*>(grad), static_cast<const T*>(x), static_cast<const T*>(z), stats,
           static_cast<const T*>(residual), residual_stats, static_cast<T*>(du), workspace, rows,
           channels);
    launch("bn_act_backward_reduce (finalize)", problem, over_partial_results(channels),
           device.stream, bn_act_backward_finalize_kernel < branch.value ? 3 : 2 >, workspace,
           stats, residual_stats, sums, residual_sums, rows, static_cast<int>(g.grid.y), channels);
  };
  with_type_and_width(
      dtype, channels, {grad, x, z, stats, residual, residual_stats, du},
      [&](auto* type, auto width) {
        with_flag(residual != nullptr, [&](auto branch) {
          if (z != nullptr) {
            run(type, width, With<Mask::from_z>{}, branch);
          } else if (!relu) {
            run(type, width, With<Mask::none>{}, branch);
          } else if constexpr (!branch.value) {
            run(type, width, With<Mask::from_x>{}, branch);
          } else {
            throw std::invalid_argument("bn_act_backward_reduce of a residual needs z");
          }
        });
      });
}

void bn_act_backward_apply(DType dtype, int64_t rows, int64_t channels, const void* grad,
                           const void* x, const float* stats, const float* sums,
                           const void* residual, const float* residual_stats,
                           const float* residual_sums, bool relu, void* dx, void* dresidual,
                           Device device) {
  const std::string problem = matrix(rows, channels);
  const bool together = residual != nullptr && sums != nullptr && residual_sums != nullptr;
  if (residual != nullptr && !together) {
    // first the one that isn't written over the gradient
    bn_act_backward_apply(dtype, rows, channels, grad, residual, residual_stats, residual_sums,
                          nullptr, nullptr, nullptr, false, dresidual, nullptr, device);
    residual = nullptr;
  }
  const auto grid = [&](auto width, int blocks) {
    return over_rows(rows, channels / width, kBackwardInFlight, blocks, device.multiprocessors);
  };
  with_type_and_width(
      dtype, channels,
      {grad, x, stats, sums, residual, residual_stats, residual_sums, dx, dresidual},
      [&](auto* type, auto width) {
        using T = std::remove_pointer_t<decltype(type)>;
        const auto run = [&](auto with_relu, auto branch) {
          launch("bn_act_backward_apply", problem, grid(width, kApplyBlocks), device.stream,
                 bn_act_backward_apply_kernel<T, width.value, with_relu.value, branch.value>,
                 static_cast<const T*>(grad), static_cast<const T*>(x), stats, sums,
                 static_cast<const T*>(residual), residual_stats, residual_sums,
                 static_cast<T*>(dx), static_cast<T*>(dresidual), rows, channels);
        };
        if (together) {
          run(std::false_type{}, std::true_type{});
        } else if (sums != nullptr) {
          with_flag(relu, [&](auto with_relu) { run(with_relu, std::false_type{}); });
        } else {
          with_flag(relu, [&](auto with_relu) {
            launch("bn_act_backward_apply (fixed statistics)", problem, grid(width, kFixedBlocks),
                   device.stream, bn_act_backward_fixed_kernel<T, width.value, with_relu.value>,
                   static_cast<const T*>(grad), static_cast<const T*>(x), stats,
                   static_cast<T*>(dx), rows, channels);
          });
        }
      });
}

}  // namespace fusedres::cuda
