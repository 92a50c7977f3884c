// z = relu(x * scale + shift (+ residual)), one pass: x (, residual) -> z. The residual may be
// normalised too, as residual * rscale + rshift.
#include "batch_norm.h"
#include "ops.h"

namespace fusedres::cpu::FUSEDRES_ISA {
namespace {

enum class Residual { none, plain, normalised };

template <class F>
inline void with_residual(const void* residual, const float* stats, F f) {
  if (residual == nullptr) {
    f(std::integral_constant<Residual, Residual::none>{});
  } else if (stats == nullptr) {
    f(std::integral_constant<Residual, Residual::plain>{});
  } else {
    f(std::integral_constant<Residual, Residual::normalised>{});
  }
}

template <Residual kResidual, bool kRelu, class T>
void act(Shape s, const T* x, const float* stats, const T* residual, const float* residual_stats,
         T* z, int threads) {
  for_each_value(s, threads, [=](int64_t c, auto at, auto each) {
    const Affine norm = affine(stats, s.c, c, at);
    constexpr bool normalised = kResidual == Residual::normalised;
    const Affine residual_norm = affine(normalised ? residual_stats : stats, s.c, c, at);
    each([&](int64_t i, auto lanes) {
      Vec u = norm(load(x + i, lanes));
      if constexpr (kResidual != Residual::none) {
        const Vec r = load(residual + i, lanes);
        u = u + (normalised ? residual_norm(r) : r);
      }
      if constexpr (kRelu) u = relu(u);
      store(z + i, u, lanes);
    });
  });
}

}  // namespace

void bn_act(DType dtype, Shape s, const void* x, const float* stats, const void* residual,
            const float* residual_stats, bool relu, void* z, int threads) {
  with_type(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    with_residual(residual, residual_stats, [&](auto kind) {
      with_flag(relu, [&](auto has_relu) {
        act<kind.value, has_relu.value>(s, static_cast<const T*>(x), stats,
                                        static_cast<const T*>(residual), residual_stats,
                                        static_cast<T*>(z), threads);
      });
    });
  });
}

}  // namespace fusedres::cpu::FUSEDRES_ISA
