// From an image to the launch of a kernel that walks it as pool.cuh says.
#pragma once

#include "launch.cuh"
#include "pool.cuh"

namespace fusedres::cuda {

static_assert(kPoolBlocks <= kMostBlocks);

inline PoolShape pool_shape(const char* name, const Image& i) {
  if (i.n * i.height * i.width >= int64_t{1} << 31) {
    throw std::invalid_argument(std::string(name) + " of " + image(i) + ": 2^31 pixels or more");
  }
  return {static_cast<int>(i.n), static_cast<int>(i.height), static_cast<int>(i.width), i.channels};
}

inline Grid over_strips(const PoolShape& s, int width, int multiprocessors) {
  return over_rows(s.places(), s.channels / width, 1, kPoolBlocks, multiprocessors);
}

}  // namespace fusedres::cuda
