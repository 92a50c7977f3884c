#include <cuda_runtime.h>

#include <algorithm>
#include <stdexcept>
#include <string>

#include "bn_act.cuh"
#include "bn_act.h"

namespace fusedres::cuda {
namespace {

// Enough blocks to keep every multiprocessor busy; a block walks over the rows that are left.
constexpr int kBlocksPerMultiprocessor = 8;

template <class T, bool kResidual, bool kRelu>
void launch(int64_t rows, int64_t channels, int multiprocessors, const T* x, const float* scale,
            const float* shift, const T* residual, T* z, cudaStream_t stream) {
  const int64_t most = static_cast<int64_t>(multiprocessors) * kBlocksPerMultiprocessor;
  if (channels % Pack<T>::width == 0) {
    const int64_t columns = channels / Pack<T>::width;
    const dim3 block(static_cast<unsigned>(std::min<int64_t>(columns, kActThreads)),
                     static_cast<unsigned>(std::max<int64_t>(kActThreads / columns, 1)));
    const int64_t across = (columns + block.x - 1) / block.x;
    const int64_t down = (rows + block.y * kActInFlight - 1) / (block.y * kActInFlight);
    const dim3 grid(static_cast<unsigned>(std::min(down, std::max<int64_t>(most / across, 1))),
                    static_cast<unsigned>(across));
    bn_act_pack_kernel<T, kResidual, kRelu>
        <<<grid, block, 0, stream>>>(x, scale, shift, residual, z, rows, channels);
  } else {
    const int64_t blocks = (rows * channels + kActThreads - 1) / kActThreads;
    bn_act_value_kernel<T, kResidual, kRelu>
        <<<static_cast<unsigned>(std::min(blocks, most)), kActThreads, 0, stream>>>(
            x, scale, shift, residual, z, rows, channels);
  }
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) {
    throw std::runtime_error("bn_act of [" + std::to_string(rows) + ", " +
                             std::to_string(channels) +
                             "] was not launched: " + cudaGetErrorString(error));
  }
}

template <class T>
void launch(int64_t rows, int64_t channels, int multiprocessors, const void* x, const float* stats,
            const void* residual, bool relu, void* z, cudaStream_t stream) {
  auto* run = residual ? (relu ? launch<T, true, true> : launch<T, true, false>)
                       : (relu ? launch<T, false, true> : launch<T, false, false>);
  run(rows, channels, multiprocessors, static_cast<const T*>(x), stats + 3 * channels,
      stats + 4 * channels, static_cast<const T*>(residual), static_cast<T*>(z), stream);
}

}  // namespace

void bn_act(DType dtype, int64_t rows, int64_t channels, int multiprocessors, const void* x,
            const float* stats, const void* residual, bool relu, void* z, void* stream) {
  auto* run = dtype == DType::float32    ? launch<float>
              : dtype == DType::bfloat16 ? launch<__nv_bfloat16>
                                         : launch<__half>;
  run(rows, channels, multiprocessors, x, stats, residual, relu, z,
      static_cast<cudaStream_t>(stream));
}

}  // namespace fusedres::cuda
