// Launches bn_act; callable from any C++.
#pragma once

#include <cstdint>

namespace fusedres::cuda {

enum class DType : int { float32, bfloat16, float16 };

// z = relu(x * scale + shift (+ residual)) on `stream` (a cudaStream_t) of the current device.
// x, residual (may be null), z: [rows, channels]; stats: [5, channels] float32, rows 3 and 4 are
// scale and shift. Throws std::runtime_error where the launch fails.
void bn_act(DType dtype, int64_t rows, int64_t channels, int multiprocessors, const void* x,
            const float* stats, const void* residual, bool relu, void* z, void* stream);

}  // namespace fusedres::cuda
