// z = relu(x * scale + shift (+ residual)), one pass: x (, residual) -> z.
#include "ops.h"
#include "parallel.h"

namespace fusedres::cpu::FUSEDRES_ISA {
namespace {

template <bool kResidual, bool kRelu, class T, class Lanes>
inline void act(const T* x, const T* residual, T* z, int64_t i, Lanes lanes, Vec scale, Vec shift) {
  Vec u = fma(load(x + i, lanes), scale, shift);
  if constexpr (kResidual) u = u + load(residual + i, lanes);
  if constexpr (kRelu) u = relu(u);
  store(z + i, u, lanes);
}

template <bool kResidual, bool kRelu, class T>
void act_rows(Shape s, const T* x, const float* scale, const float* shift, const T* residual, T* z,
              int threads) {
  const Chunks chunks = Chunks::of_rows(s);
  parallel_for(chunks.number, threads, [=](int64_t chunk) {
    for_each_rows(s.c, chunks.begin(chunk), chunks.end(chunk), [=](int64_t row, auto rows) {
      for_each_vector(s.c, [&](int64_t c, auto lanes) {
        const Vec a = load(scale + c, lanes), b = load(shift + c, lanes);
        for (int r = 0; r < rows.value; ++r) {
          act<kResidual, kRelu>(x, residual, z, (row + r) * s.c + c, lanes, a, b);
        }
      });
    });
  });
}

template <bool kResidual, bool kRelu, class T>
void act_planes(Shape s, const T* x, const float* scale, const float* shift, const T* residual,
                T* z, int threads) {
  parallel_for(s.n * s.c, threads, [=](int64_t plane) {
    const Vec a = set(scale[plane % s.c]), b = set(shift[plane % s.c]);
    for_each_vector(s.hw, [&](int64_t i, auto lanes) {
      act<kResidual, kRelu>(x, residual, z, plane * s.hw + i, lanes, a, b);
    });
  });
}

}  // namespace

void bn_act(DType dtype, Shape s, const void* x, const float* stats, const void* residual,
            bool relu, void* z, int threads) {
  const float* scale = stats + kScale * s.c;
  const float* shift = stats + kShift * s.c;
  with_type(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    with_flag(residual != nullptr, [&](auto has_residual) {
      with_flag(relu, [&](auto has_relu) {
        auto* run = s.planes ? act_planes<has_residual.value, has_relu.value, T>
                             : act_rows<has_residual.value, has_relu.value, T>;
        run(s, static_cast<const T*>(x), scale, shift, static_cast<const T*>(residual),
            static_cast<T*>(z), threads);
      });
    });
  });
}

}  // namespace fusedres::cpu::FUSEDRES_ISA
