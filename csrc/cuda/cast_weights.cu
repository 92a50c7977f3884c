#include "cast_weights.cuh"
#include "launch.cuh"

namespace fusedres::cuda {
namespace {

// The table is a parameter of the kernel, of which there may be so much.
#if CUDART_VERSION >= 12010
constexpr int kWeightsPerLaunch = 512, kParameterBytes = 32764;
#else
constexpr int kWeightsPerLaunch = 72, kParameterBytes = 4096;
#endif
static_assert(sizeof(CastTable<kWeightsPerLaunch>) <= kParameterBytes);

bool aligned(const Weight& w) {
  return (reinterpret_cast<uintptr_t>(w.weight) | reinterpret_cast<uintptr_t>(w.cast)) %
             kAccessBytes ==
         0;
}

}  // namespace

void cast_weights(DType dtype, const Weight* weights, int64_t number, Device device) {
  if (dtype == DType::float32) throw std::invalid_argument("cast_weights casts to 16 bits");
  for (int64_t first = 0; first < number; first += kWeightsPerLaunch) {
    CastTable<kWeightsPerLaunch> table;
    table.number = static_cast<int>(std::min<int64_t>(number - first, kWeightsPerLaunch));
    int64_t blocks = 0;
    for (int i = 0; i < table.number; ++i) {
      const Weight& w = weights[first + i];
      const int64_t values = w.outer * w.inner * w.taps;
      table.entries[i] = {
          w.weight, w.cast, values, w.inner, w.taps, blocks, w.taps == 1 && aligned(w)};
      blocks += divide_up(values, kCastOfBlock);
    }
    const auto run = [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      launch("cast_weights", std::to_string(table.number) + " weights",
             {dim3(static_cast<unsigned>(blocks)), dim3(kThreads)}, device.stream,
             cast_weights_kernel<T, kWeightsPerLaunch>, table);
    };
    dtype == DType::bfloat16 ? run(static_cast<__nv_bfloat16*>(nullptr))
                             : run(static_cast<__half*>(nullptr));
  }
}

}  // namespace fusedres::cuda
