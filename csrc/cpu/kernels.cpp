#include "kernels.h"

#include <cmath>
#include <cstring>
#include <stdexcept>
#include <string>

namespace fusedres::cpu {

#define FUSEDRES_DECLARE(isa) \
  namespace isa {             \
  extern const Kernels table; \
  }
FUSEDRES_DECLARE(generic)
#if defined(FUSEDRES_X86)
FUSEDRES_DECLARE(avx2)
FUSEDRES_DECLARE(avx512)
FUSEDRES_DECLARE(avx512bf16)
#endif

namespace {

bool runs(const Kernels& table) {
#if defined(FUSEDRES_X86)
  __builtin_cpu_init();
  if (&table == &avx512bf16::table) {
    return runs(avx512::table) && __builtin_cpu_supports("avx512bf16");
  }
  if (&table == &avx512::table) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  }
  if (&table == &avx2::table) {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
           __builtin_cpu_supports("f16c");
  }
#endif
  return &table == &generic::table;
}

const Kernels* const tables[] = {
#if defined(FUSEDRES_X86)
    &avx512bf16::table,
    &avx512::table,
    &avx2::table,
#endif
    &generic::table,
};

const Kernels* best() {
  for (const Kernels* table : tables) {
    if (runs(*table)) return table;
  }
  return &generic::table;
}

const Kernels*& current() {
  static const Kernels* table = best();
  return table;
}

}  // namespace

const Kernels& kernels() { return *current(); }

void use_isa(const char* isa) {
  for (const Kernels* table : tables) {
    if (std::strcmp(table->isa, isa) == 0 && runs(*table)) {
      current() = table;
      return;
    }
  }
  throw std::invalid_argument(std::string("this processor or build has no instruction set ") + isa);
}

void bn_finalize(int64_t c, const float* mean, const float* var, const float* weight,
                 const float* bias, double eps, float* stats) {
  for (int64_t i = 0; i < c; ++i) {
    const double rstd = 1.0 / std::sqrt(static_cast<double>(var[i]) + eps);
    // shift belongs to the scale as rounded: where the mean is large their errors then cancel
    const float scale = static_cast<float>(weight ? weight[i] * rstd : rstd);
    stats[kMean * c + i] = mean[i];
    stats[kVar * c + i] = var[i];
    stats[kRstd * c + i] = static_cast<float>(rstd);
    stats[kScale * c + i] = scale;
    stats[kShift * c + i] =
        static_cast<float>((bias ? bias[i] : 0.0) - static_cast<double>(mean[i]) * scale);
  }
}

void bn_update_running(int64_t c, float* running_mean, float* running_var, const float* stats,
                       int64_t count, double momentum) {
  const double unbiased = static_cast<double>(count) / static_cast<double>(count - 1);
  for (int64_t i = 0; i < c; ++i) {
    running_mean[i] =
        static_cast<float>(momentum * stats[kMean * c + i] + (1 - momentum) * running_mean[i]);
    running_var[i] = static_cast<float>(momentum * unbiased * stats[kVar * c + i] +
                                        (1 - momentum) * running_var[i]);
  }
}

}  // namespace fusedres::cpu
