// z = max pool of relu(x * scale + shift), 3x3 of stride 2 and padding 1: x -> z, index.
//
// Maxima start at 0, which makes them the ReLU's and lets padding be 0 as well.
#include "batch_norm.h"
#include "ops.h"
#include "pool.h"

namespace fusedres::cpu::FUSEDRES_ISA {

void bn_relu_maxpool(DType dtype, Image s, const void* x, const float* stats, void* z,
                     uint8_t* index, int threads) {
  with_type(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const RowsOfWindows<T> rows(s, static_cast<const T*>(x));
    const auto norm = [=](const auto& place) {
      return affine(stats, s.c, place.channel, place.across());
    };
    const int64_t step = rows.step(), line = rows.line();
    rows.for_each(threads, norm, [=](int64_t first, const Lines<T>(&lines)[3]) {
      T* to = static_cast<T*>(z) + first;
      uint8_t* index_to = index + first;
      for_each_vector(line, [=](int64_t i, auto lanes) {
        Vec most = set(0.0f), place = set(static_cast<float>(kNowhere));
        for (int kh = 0; kh < 3; ++kh) {
          take_larger(load(lines[kh].odd + i - step, lanes), set(3.0f * kh), most, place);
          take_larger(load(lines[kh].even + i, lanes), set(3.0f * kh + 1), most, place);
          take_larger(load(lines[kh].odd + i, lanes), set(3.0f * kh + 2), most, place);
        }
        store(to + i, most, lanes);
        store(index_to + i, place, lanes);
      });
    });
  });
}

}  // namespace fusedres::cpu::FUSEDRES_ISA
