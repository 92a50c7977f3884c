// The kernels of one instruction set: a .cpp file per op, compiled once for each.
#pragma once

#include "kernels.h"

namespace fusedres::cpu::FUSEDRES_ISA {

void bn_stats(DType, Shape, const void* x, const float* weight, const float* bias, double eps,
              float* stats, int threads);
void bn_act(DType, Shape, const void* x, const float* stats, const void* residual, bool relu,
            void* z, int threads);
void bn_act_backward_reduce(DType, Shape, const void* grad, const void* x, const void* z,
                            const float* stats, bool relu, void* du, float* sums, int threads);
void bn_act_backward_apply(DType, Shape, const void* grad, const void* x, const float* stats,
                           const float* sums, bool relu, void* dx, int threads);

}  // namespace fusedres::cpu::FUSEDRES_ISA
