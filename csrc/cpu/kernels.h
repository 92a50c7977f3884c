// What the CPU kernels offer, whatever the instruction set: one table of functions for each, and
// the choice of the best that this processor runs.
//
// Activations come as bare pointers to float32, bfloat16 or float16 in one of two layouts. stats is
// [5, C] (mean, biased variance, rstd, scale, shift) and sums [4, C] (dbias, dweight, slope,
// offset), float32; see fusedres/kernels/rows.py.
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

// What a max pool of 3x3, stride 2 and padding 1 goes over.
struct Image {
  int64_t n, c, h, w;
  bool planes;
  Shape shape() const { return {n, c, h * w, planes}; }
  int64_t oh() const { return (h + 1) / 2; }
  int64_t ow() const { return (w + 1) / 2; }
};

enum StatsRow : int { kMean, kVar, kRstd, kScale, kShift };
enum SumsRow : int { kDbias, kDweight, kSlope, kOffset };
// The index of a window without a value above 0; elsewhere 3 * row + column of its maximum.
constexpr int kNowhere = 9;

struct Kernels {
  const char* isa;

  // stats of x: one pass over memory, x -> 5C floats
  void (*bn_stats)(DType, Shape, const void* x, const float* weight, const float* bias, double eps,
                   float* stats, int threads);

  // z = relu(x * scale + shift (+ residual)): x (, residual) -> z; with residual_stats the residual
  // is normalised too
  void (*bn_act)(DType, Shape, const void* x, const float* stats, const void* residual,
                 const float* residual_stats, bool relu, void* z, int threads);

  // sums of du and du * (x - mean) * rstd, where du = grad behind the ReLU, and the slope and
  // offset of dx. Without z: grad, x -> 4C floats, the ReLU's mask computed again from x. With z:
  // grad, z, x -> du and 4C floats. With a residual (that was normalised) that is read too, for 4C
  // floats of its own.
  void (*bn_act_backward_reduce)(DType, Shape, const void* grad, const void* x, const void* z,
                                 const float* stats, const void* residual,
                                 const float* residual_stats, bool relu, void* du, float* sums,
                                 float* residual_sums, int threads);

  // dx = scale * du + slope * (x - mean) + offset: grad, x -> dx; without sums (fixed statistics)
  // dx = scale * du. With a residual likewise dresidual: du, x, residual -> dx, dresidual. dx may
  // be grad.
  void (*bn_act_backward_apply)(DType, Shape, const void* grad, const void* x, const float* stats,
                                const float* sums, const void* residual,
                                const float* residual_stats, const float* residual_sums, bool relu,
                                void* dx, void* dresidual, int threads);

  // z = max pool of relu(x * scale + shift), and the place of every maximum: x -> z, index
  void (*bn_relu_maxpool)(DType, Image, const void* x, const float* stats, void* z, uint8_t* index,
                          int threads);

  // z = max pool of relu(x + bias), the bias may be null: x -> z
  void (*bias_relu_maxpool)(DType, Image, const void* x, const float* bias, void* z, int threads);

  // bn_act_backward_reduce and _apply where du is, in every pixel, the sum of the gradients of the
  // windows that it is the maximum of: grad, index, x -> 4C floats; grad, index, x -> dx
  void (*bn_relu_maxpool_backward_reduce)(DType, Image, const void* grad, const uint8_t* index,
                                          const void* x, const float* stats, float* sums,
                                          int threads);
  void (*bn_relu_maxpool_backward_apply)(DType, Image, const void* grad, const uint8_t* index,
                                         const void* x, const float* stats, const float* sums,
                                         void* dx, int threads);
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
