// The CUDA ops, callable from any C++. Everything is enqueued on a stream of the current device:
// nothing is allocated and nothing waits, so calls can be captured in a graph. A failed launch
// throws std::runtime_error with the kernel's name and problem size.
//
// Activations are row-major [rows, channels] matrices (channels_last, rows = N*H*W) of one dtype;
// stats is [5, channels] (mean, biased variance, rstd, scale, shift) and sums [4, channels] (dbias,
// dweight, slope, offset), float32. A null pointer stands for what isn't there. Any number of
// channels, any alignment; multiples of 16 bytes are fast.
#pragma once

#include <cstdint>

namespace fusedres::cuda {

enum class DType : int { float32, bfloat16, float16 };

// Where an op runs: cudaStream_t, and what the device of the stream has.
struct Device {
  void* stream;
  int multiprocessors;
};

// Floats of scratch memory that bn_stats (2 quantities) and the backward's sums (2, or 3 with a
// branch) need, whatever the alignment.
int64_t bn_workspace(DType, int64_t rows, int64_t channels, int quantities, int multiprocessors);

// x -> stats
void bn_stats(DType, int64_t rows, int64_t channels, const void* x, const float* weight,
              const float* bias, float eps, float* workspace, float* stats, Device);
// stats from the running mean and variance
void bn_running_stats(int64_t channels, const float* running_mean, const float* running_var,
                      const float* weight, const float* bias, float eps, float* stats, Device);
// the running mean and variance moved toward the batch's, the latter made unbiased
void bn_update_running(int64_t channels, float* running_mean, float* running_var,
                       const float* stats, int64_t count, float momentum, Device);

// z = relu(x * scale + shift + residual): x (, residual) -> z. With residual_stats the residual
// goes through its own scale and shift first.
void bn_act(DType, int64_t rows, int64_t channels, const void* x, const float* stats,
            const void* residual, const float* residual_stats, bool relu, void* z, Device);

// Sums over du, the gradient behind the ReLU. Without z: grad, x -> sums, the ReLU's mask computed
// again from x. With z: grad, z, x -> du and sums; du may be grad. With a residual (and its stats),
// it is read too, and residual_sums are written.
void bn_act_backward_reduce(DType, int64_t rows, int64_t channels, const void* grad, const void* x,
                            const void* z, const float* stats, const void* residual,
                            const float* residual_stats, bool relu, float* workspace, void* du,
                            float* sums, float* residual_sums, Device);
// dx = scale * du + slope * (x - mean) + offset: grad, x -> dx, which may be grad; without sums
// (fixed statistics) dx = scale * du. With a residual both gradients in one pass (relu is false
// then): du, x, residual -> dx, dresidual.
void bn_act_backward_apply(DType, int64_t rows, int64_t channels, const void* grad, const void* x,
                           const float* stats, const float* sums, const void* residual,
                           const float* residual_stats, const float* residual_sums, bool relu,
                           void* dx, void* dresidual, Device);

// An image in channels_last: [n, height, width, channels].
struct Image {
  int64_t n, height, width, channels;
};
// relu(x * scale + shift) and the maximum over 3x3, stride 2, padding 1: x -> z, index (uint8). The
// index is 3 * row + column of the maximum in its window, or 9 where it is <= 0.
void bn_relu_maxpool(DType, Image, const void* x, const float* stats, void* z, uint8_t* index,
                     Device);
// The same of relu(x + bias), without an index: x -> z. The bias may be null.
void bias_relu_maxpool(DType, Image, const void* x, const float* bias, void* z, Device);
// grad, index, x -> sums; needs bn_relu_maxpool_workspace floats of scratch memory
int64_t bn_relu_maxpool_workspace(DType, Image, int multiprocessors);
void bn_relu_maxpool_backward_reduce(DType, Image, const void* grad, const uint8_t* index,
                                     const void* x, const float* stats, float* workspace,
                                     float* sums, Device);
// grad, index, x -> dx; without sums grad, index -> dx
void bn_relu_maxpool_backward_apply(DType, Image, const void* grad, const uint8_t* index,
                                    const void* x, const float* stats, const float* sums, void* dx,
                                    Device);

// the mean over height and width: x -> out [n, channels]
void global_avg_pool(DType, Image, const void* x, void* out, Device);
// grad [n, channels] -> dx
void global_avg_pool_backward(DType, Image, const void* grad, void* dx, Device);

// A convolution of images [n, height, width, channels] by filters [filters, side, side, channels]:
// side 1, or 3 padded by 1; stride 1 or 2; channels and filters multiples of 8, everything at a
// multiple of 16 bytes. float32 is rounded to TF32.
struct Conv {
  int64_t n, height, width, channels, filters;
  int side, stride;
};
// y = conv(relu(x * scale + shift)) and y's stats: x -> y; without stats conv(x), without y_stats
// none of y's. Needs conv_fwd_workspace floats of scratch memory for y_stats.
int64_t conv_fwd_workspace(DType, Conv, int multiprocessors);
void conv_fwd(DType, Conv, const void* x, const float* stats, bool relu, const void* weight,
              const float* norm_weight, const float* norm_bias, float eps, float* workspace,
              void* y, float* y_stats, Device);
// The gradient of the input of a convolution of `side` 1, or 3 with a padding of 1, and stride 1:
// du (, y, add, x) -> dx, and sums over dx. y_stats and y_sums (which needs y) make du the gradient
// of y; add is a gradient of the same image, its first value of channel 0, `add_pitch` values from
// a pixel to the next, or of its pixels at even rows and columns (compact); it may be dx. weight is
// [filters, side, side, channels]. Channels, filters and add_pitch are multiples of 8, tensors and
// vectors begin at multiples of 16 bytes, and positions, a tile and the weight are counted by
// int32; throws std::invalid_argument otherwise. float32 is multiplied as TF32. workspace: for
// x_sums alone.
int64_t conv_dgrad_workspace(DType, Image dx, int multiprocessors);
void conv_dgrad(DType, Image dx, int64_t filters, int side, const void* du, const void* y,
                const float* y_stats, const float* y_sums, const void* weight, const void* add,
                int64_t add_pitch, bool compact, const void* x, const float* x_stats, bool relu,
                float* workspace, void* dx_out, float* x_sums, Device);
// z = relu(conv(x) + bias + residual): x (, residual) -> z
void conv_bias_act(DType, Conv, const void* x, const void* weight, const float* bias,
                   const void* residual, bool relu, void* z, Device);

// A residual block of a trained net, of images [n, height, width, channels]: 1x1, 3x3 and 1x1 of
// stride 1 with `inner` channels in between, 64 or 128; channels a multiple of 128; 16-bit
// activations; everything at a multiple of 16 bytes.
struct Bottleneck {
  int64_t n, height, width, channels, inner;
};
// z = relu(conv3(relu(conv2(relu(conv1(x) + bias1)) + bias2)) + bias3 + x): x -> z
void bottleneck_infer(DType, Bottleneck, const void* x, const void* weight1, const float* bias1,
                      const void* weight2, const float* bias2, const void* weight3,
                      const float* bias3, void* z, Device);

// Values of any type in any layout: [n, channels, height, width] of an image, [filters, channels,
// rows, columns] of a weight.
enum class Value : int { float32, bfloat16, float16, uint8 };
struct Strided {
  const void* data;
  Value type;
  int64_t stride[4];  // in values
};
// The stem's convolution, 7x7 with stride 2 and padding 3, of images [n, 3, height, width]; filters
// a multiple of 8. Image and weight are rounded to the op's dtype on the way (float32 to TF32); y,
// z, pixels and dy begin at a multiple of 16 bytes.
struct Stem {
  int64_t n, height, width, filters;
};
// Of three channels; what is convolved is (values - mean) * rstd.
struct StemImage {
  Strided values;
  float mean[3], rstd[3];
};
// y = conv(x), its stats, and x as stem_wgrad reads it: x -> y, pixels (see kernels/rows.py).
// Without y_stats none; needs stem_conv_workspace floats of scratch memory for them.
int64_t stem_conv_workspace(DType, Stem, int multiprocessors);
void stem_conv(DType, Stem, const StemImage& x, const Strided& weight, const float* norm_weight,
               const float* norm_bias, float eps, float* workspace, void* pixels, void* y,
               float* y_stats, Device);
// z = relu(conv(x) + bias), with pool the maximum of it over 3x3, stride 2, padding 1: x -> z. The
// bias may be null.
void stem_bias_act(DType, Stem, const StemImage& x, const Strided& weight, const float* bias,
                   bool pool, void* z, Device);
// dy, pixels -> dweight (whose data are written; no uint8); needs stem_wgrad_workspace floats of
// scratch memory
int64_t stem_wgrad_workspace(DType, Stem, int multiprocessors);
void stem_wgrad(DType, Stem, const void* dy, const void* pixels, float* workspace,
                const Strided& dweight, Device);

// A float32 weight [outer, inner, taps] (taps = 1: already in the order it shall have) and where
// its cast goes, [outer, taps, inner] (channels_last).
struct Weight {
  const float* weight;
  void* cast;
  int64_t outer, inner, taps;
};
// All weights in 16 bits, in one launch (for 512 of them; 72 if compiled with CUDA 12.0 or older).
void cast_weights(DType, const Weight* weights, int64_t number, Device);

}  // namespace fusedres::cuda
