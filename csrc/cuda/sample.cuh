// Mean and squared deviations of a part of a channel, and how two parts become one.
#pragma once

#include "rows.cuh"

namespace fusedres::cuda {

struct Sample {
  float mean, m2;  // the mean, the sum of squared deviations from it
};

// Takes in `other`, whose size is `share` of both together; n is this sample's (Chan et al. 1979).
__device__ __forceinline__ Sample merge(Sample a, Sample other, float n, float share) {
  const float delta = other.mean - a.mean;
  return {fmaf(delta, share, a.mean), a.m2 + other.m2 + delta * delta * (n * share)};
}

}  // namespace fusedres::cuda
