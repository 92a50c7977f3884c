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

// The slopes and offsets of all channels, out of sums; nothing where there are none.
class Gradients {
 public:
  Gradients(const Shape& s, const float* stats, const float* sums)
      : channels_(s.c), stats_(stats), memory_(buffer<float>(sums == nullptr ? 0 : 2 * s.c)) {
    if (sums == nullptr) return;
    const double per_value = -1.0 / static_cast<double>(s.count());
    for (int64_t c = 0; c < s.c; ++c) {
      const double scale = stats[kScale * s.c + c] * per_value;
      memory_[c] = static_cast<float>(scale * stats[kRstd * s.c + c] * sums[kDweight * s.c + c]);
      memory_[s.c + c] = static_cast<float>(scale * sums[kDbias * s.c + c]);
    }
  }

  struct View {
    int64_t channels;
    const float *stats, *slope;
    template <bool kBatch, class At>
    Gradient<kBatch> at(int64_t c, At at) const {
      const Vec scale = load(stats + kScale * channels + c, at);
      if constexpr (kBatch) {
        return {scale, mean(stats, channels, c, at), load(slope + c, at),
                load(slope + channels + c, at)};
      }
      return {scale, scale, scale, scale};
    }
  };
  View view() const { return {channels_, stats_, memory_.get()}; }

 private:
  int64_t channels_;
  const float* stats_;
  Buffer<float> memory_;
};

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
inline void write_sums(int64_t channels, const double* dbias, const double* dweight,
                       const float* stats, float* sums) {
  for (int64_t c = 0; c < channels; ++c) {
    sums[kDbias * channels + c] = static_cast<float>(dbias[c]);
    sums[kDweight * channels + c] = static_cast<float>(dweight[c] * stats[kRstd * channels + c]);
  }
}

}  // namespace fusedres::cpu::FUSEDRES_ISA
