// z = max pool of relu(x + bias), 3x3 of stride 2 and padding 1: x -> z.
//
// Values that aren't negative have the order of their bits, and a NaN's lie above them: so, behind
// the ReLU, a maximum is one of integers, which needs no conversion and keeps a NaN as torch does.
#include <algorithm>

#include "ops.h"
#include "pool.h"

namespace fusedres::cpu::FUSEDRES_ISA {
namespace {

template <class T>
using Bits = std::conditional_t<sizeof(T) == 4, uint32_t, uint16_t>;

template <class T>
inline Bits<T> bits(const T* p) {
  Bits<T> b;
  std::memcpy(&b, p, sizeof b);
  return b;
}

// A line of maxima, in a loop that the compiler turns into vectors.
template <class T>
void take_largest(const Lines<T> (&rows)[3], int64_t step, int64_t line, T* __restrict to) {
  const T *even[3], *odd[3];
  for (int kh = 0; kh < 3; ++kh) even[kh] = rows[kh].even, odd[kh] = rows[kh].odd;
  for (int64_t i = 0; i < line; ++i) {
    Bits<T> most = 0;
    for (int kh = 0; kh < 3; ++kh) {
      most = std::max(most, bits(odd[kh] + i - step));
      most = std::max(most, bits(even[kh] + i));
      most = std::max(most, bits(odd[kh] + i));
    }
    std::memcpy(to + i, &most, sizeof most);
  }
}

}  // namespace

void bias_relu_maxpool(DType dtype, Image s, const void* x, const float* bias, void* z,
                       int threads) {
  with_type(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const RowsOfWindows<T> rows(s, static_cast<const T*>(x));
    const auto act = [=](const auto& place) {
      const Vec b = bias == nullptr ? set(0.0f) : load(bias + place.channel, place.across());
      return [=](Vec v) {
        const Vec u = v + b;
        return keep_above(u, set(0.0f), u);  // -0 too becomes 0, whose bits are the smallest
      };
    };
    rows.for_each(threads, act, [&](int64_t first, const Lines<T>(&lines)[3]) {
      take_largest(lines, rows.step(), rows.line(), static_cast<T*>(z) + first);
    });
  });
}

}  // namespace fusedres::cpu::FUSEDRES_ISA
