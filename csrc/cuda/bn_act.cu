#include "bn_act.cuh"
#include "launch.cuh"

namespace fusedres::cuda {

void bn_act(DType dtype, int64_t rows, int64_t channels, const void* x, const float* stats,
            const void* residual, const float* residual_stats, bool relu, void* z, Device device) {
  const auto run = [&](auto* type, auto width, auto kind, auto with_relu) {
    using T = std::remove_pointer_t<decltype(type)>;
    launch("bn_act", matrix(rows, channels),
           over_rows(rows, channels / width, kActInFlight<kind.value>, kActBlocks,
                     device.multiprocessors),
           device.stream, bn_act_kernel<T, width.value, kind.value, with_relu.value>,
           static_cast<const T*>(x), stats, static_cast<const T*>(residual), residual_stats,
           static_cast<T*>(z), rows, channels);
  };
  with_type_and_width(
      dtype, channels, {x, stats, residual, residual_stats, z}, [&](auto* type, auto width) {
        with_flag(relu, [&](auto with_relu) {
          if (residual == nullptr) {
            run(type, width, std::integral_constant<Residual, Residual::none>{}, with_relu);
          } else if (residual_stats == nullptr) {
            run(type, width, std::integral_constant<Residual, Residual::plain>{}, with_relu);
          } else {
            run(type, width, std::integral_constant<Residual, Residual::normalised>{}, with_relu);
          }
        });
      });
}

}  // namespace fusedres::cuda
