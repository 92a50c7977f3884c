// The per-channel vectors of a batch norm, and the sums over its channels.
#pragma once

#include "parallel.h"

namespace fusedres::cpu::FUSEDRES_ISA {

struct Affine {
  Vec scale, shift;
  Vec operator()(Vec x) const { return fma(x, scale, shift); }
};

// Of the channels from c on in a vector's lanes, or of c in all of them (At = One).
template <class At>
inline Affine affine(const float* stats, int64_t channels, int64_t c, At at) {
  return {load(stats + kScale * channels + c, at), load(stats + kShift * channels + c, at)};
}
template <class At>
inline Vec mean(const float* stats, int64_t channels, int64_t c, At at) {
  return load(stats + kMean * channels + c, at);
}

// dx = scale * du + slope * (x - mean) + offset; without the last two for fixed statistics.
template <bool kBatch>
struct Gradient {
  Vec scale, mean, slope, offset;
  Vec operator()(Vec du, Vec x) const {
    const Vec dx = du * scale;
    if constexpr (kBatch) return dx + fma(x - mean, slope, offset);
    return dx;
  }
};

template <bool kBatch, class At>
inline Gradient<kBatch> gradient(const float* stats, const float* sums, int64_t channels, int64_t c,
                                 At at) {
  const Vec scale = load(stats + kScale * channels + c, at);
  if constexpr (kBatch) {
    return {scale, mean(stats, channels, c, at), load(sums + kSlope * channels + c, at),
            load(sums + kOffset * channels + c, at)};
  }
  return {scale, scale, scale, scale};
}

// The columns' sums of [chunks, n] partial sums, chunk by chunk in double.
inline Buffer<double> add_chunks(const float* partial, int64_t chunks, int64_t n) {
  Buffer<double> totals = buffer<double>(n);
  for (int64_t i = 0; i < n; ++i) totals[i] = 0;
  for (int64_t k = 0; k < chunks; ++k, partial += n) {
    for (int64_t i = 0; i < n; ++i) totals[i] += partial[i];
  }
  return totals;
}

// sums out of the totals of du and of du * (x - mean).
inline void write_sums(const Shape& s, const double* dbias, const double* product,
                       const float* stats, float* sums) {
  const double per_value = -1.0 / static_cast<double>(s.count());
  for (int64_t c = 0; c < s.c; ++c) {
    const double scale = stats[kScale * s.c + c] * per_value, rstd = stats[kRstd * s.c + c];
    const double dweight = product[c] * rstd;
    sums[kDbias * s.c + c] = static_cast<float>(dbias[c]);
    sums[kDweight * s.c + c] = static_cast<float>(dweight);
    sums[kSlope * s.c + c] = static_cast<float>(scale * rstd * dweight);
    sums[kOffset * s.c + c] = static_cast<float>(scale * dbias[c]);
  }
}

}  // namespace fusedres::cpu::FUSEDRES_ISA
