// What the CPU kernels offer, whatever the instruction set: one table of functions for each, and
// the choice of the best that this processor runs.
//
// Activations come as bare pointers to float32, bfloat16 or float16 in one of two layouts. stats is
// [5, C] (mean, biased variance, rstd, scale, shift) and sums [2, C] (dbias, dweight), float32.
#pragma once

#include <cstdint>

namespace fusedres::cpu {

enum class DType : int { float32, bfloat16, float16 };

struct Shape {
  int64_t n, c, hw;
  bool planes;  // [N, C, H*W] (NCHW); otherwise rows, [N*H*W, C] (channels_last)
  int64_t count() const { return n * hw; }
  int64_t numel() const { return n * c * hw; }
};

enum StatsRow : int { kMean, kVar, kRstd, kScale, kShift };
enum SumsRow : int { kDbias, kDweight };

struct Kernels {
  const char* isa;

  // stats of x: one pass over memory, x -> 5C floats
  void (*bn_stats)(DType, Shape, const void* x, const float* weight, const float* bias, double eps,
                   float* stats, int threads);

  // z = relu(x * scale + shift (+ residual)): x (, residual) -> z
  void (*bn_act)(DType, Shape, const void* x, const float* stats, const void* residual, bool relu,
                 void* z, int threads);

  // sums of du and du * (x - mean) * rstd, where du = grad behind the ReLU. Without z: grad, x ->
  // 2C floats, the ReLU's mask computed again from x. With z: grad, z, x -> du and 2C floats.
  void (*bn_act_backward_reduce)(DType, Shape, const void* grad, const void* x, const void* z,
                                 const float* stats, bool relu, void* du, float* sums, int threads);

  // dx = scale * (du - dbias / M - (x - mean) * rstd * dweight / M): grad, x -> dx; without sums
  // (fixed statistics) dx = scale * du
  void (*bn_act_backward_apply)(DType, Shape, const void* grad, const void* x, const float* stats,
                                const float* sums, bool relu, void* dx, int threads);
};

// The best table for this processor, unless use_isa asked for another.
const Kernels& kernels();
// "avx512bf16", "avx512", "avx2" or "generic"; throws std::invalid_argument where it can't run.
void use_isa(const char* isa);

// From sums over the batch to what is kept of them; small, so plain loops.
void bn_finalize(int64_t c, const float* mean, const float* var, const float* weight,
                 const float* bias, double eps, float* stats);
void bn_update_running(int64_t c, float* running_mean, float* running_var, const float* stats,
                       int64_t count, double momentum);

}  // namespace fusedres::cpu
