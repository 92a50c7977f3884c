// The kernels of one instruction set: a .cpp file per op, compiled once for each.
#pragma once

#include "kernels.h"

namespace fusedres::cpu::FUSEDRES_ISA {

void bn_stats(DType, Shape, const void* x, const float* weight, const float* bias, double eps,
              float* stats, int threads);
void bn_act(DType, Shape, const void* x, const float* stats, const void* residual,
            const float* residual_stats, bool relu, void* z, int threads);
void bn_act_backward_reduce(DType, Shape, const void* grad, const void* x, const void* z,
                            const float* stats, const void* residual, const float* residual_stats,
                            bool relu, void* du, float* sums, float* residual_sums, int threads);
void bn_act_backward_apply(DType, Shape, const void* grad, const void* x, const float* stats,
                           const float* sums, const void* residual, const float* residual_stats,
                           const float* residual_sums, bool relu, void* dx, void* dresidual,
                           int threads);
void bias_relu_maxpool(DType, Image, const void* x, const float* bias, void* z, int threads);
void bn_relu_maxpool(DType, Image, const void* x, const float* stats, void* z, uint8_t* index,
                     int threads);
void bn_relu_maxpool_backward_reduce(DType, Image, const void* grad, const uint8_t* index,
                                     const void* x, const float* stats, float* sums, int threads);
void bn_relu_maxpool_backward_apply(DType, Image, const void* grad, const uint8_t* index,
                                    const void* x, const float* stats, const float* sums, void* dx,
                                    int threads);

}  // namespace fusedres::cpu::FUSEDRES_ISA
