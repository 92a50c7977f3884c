#include "ops.h"

#define FUSEDRES_STRING(x) FUSEDRES_STRING_(x)
#define FUSEDRES_STRING_(x) #x

namespace fusedres::cpu::FUSEDRES_ISA {

extern const Kernels table;
const Kernels table = {FUSEDRES_STRING(FUSEDRES_ISA),
                       bn_stats,
                       bn_act,
                       bn_act_backward_reduce,
                       bn_act_backward_apply,
                       bn_relu_maxpool,
                       bias_relu_maxpool,
                       bn_relu_maxpool_backward_reduce,
                       bn_relu_maxpool_backward_apply};

}  // namespace fusedres::cpu::FUSEDRES_ISA
