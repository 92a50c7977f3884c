// Tensor cores, as work of a warp whose lanes all have to come. Products of a step are added up in
// float, one after another; how hardware rounds in between is its own affair.
#include <cstring>

#include "gpu.h"

namespace fusedres::cuda::emulation {

const unsigned char (*bring(const void* site, Call call, const void* data)) [kMostBrought] {
  const std::uint64_t all =
      warp_call_at(site, call, 0xffffffffu, reinterpret_cast<std::uint64_t>(data), 0, kWarp);
  return reinterpret_cast<const unsigned char (*)[kMostBrought]>(all);
}

std::uint32_t tf32(std::uint32_t bits) {
  constexpr std::uint32_t kDropped = (1u << 13) - 1, kExponent = 0x7f800000u;
  if ((bits & kExponent) == kExponent) {  // infinity, or NaN, which stays one
    return (bits & ~kDropped) | ((bits & kDropped) != 0 ? 0x400000u : 0u);
  }
  return (bits + (kDropped + 1) / 2) & ~kDropped;  // ties away from zero
}

void mma(float (&c)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2], int bytes,
         Widen widen) {
  struct {
    std::uint32_t a[4], b[2], unused[2];
  } mine = {};
  static_assert(sizeof mine == kMostBrought);
  std::memcpy(mine.a, a, sizeof a);
  std::memcpy(mine.b, b, sizeof b);
  const auto* brought = bring(__builtin_return_address(0), Call::mma, &mine);
  const int group = gpu.running->lane() / 4, member = gpu.running->lane() % 4;
  const auto value = [&](int lane, int operand, int at) {
    const unsigned char* p = brought[lane] + operand + at;
    // a tensor core doesn't see the other bits of a float
    if (bytes < 4) return widen(p);
    std::uint32_t bits;
    std::memcpy(&bits, p, sizeof bits);
    bits &= ~((1u << 13) - 1);
    return widen(&bits);
  };
  // byte k of a step lies in the register for its half, of member k / 4 % 4
  for (int k = 0; k < 32; k += bytes) {
    const int half = k / 16, owner = k / 4 % 4, at = k % 4;
    float rows[2], columns[2];
    for (int i = 0; i < 2; ++i) {
      rows[i] = value(4 * group + owner, 0, 4 * (2 * half + i) + at);
      columns[i] = value(4 * (2 * member + i) + owner, 16, 4 * half + at);
    }
    for (int i = 0; i < 4; ++i) c[i] += rows[i / 2] * columns[i % 2];
  }
}

}  // namespace fusedres::cuda::emulation
