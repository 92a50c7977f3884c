// From a stem to its shape and grid.
#pragma once

#include <cstdlib>
#include <limits>

#include "launch.cuh"
#include "stem.cuh"

namespace fusedres::cuda {

inline std::string stem(const Stem& s) {
  return "[" + std::to_string(s.n) + ", 3, " + std::to_string(s.height) + ", " +
         std::to_string(s.width) + "] by " + std::to_string(s.filters) + " filters";
}

inline StemShape stem_shape(const char* name, const Stem& s,
                            std::initializer_list<const void*> tensors) {
  for (const void* tensor : tensors) {
    if (reinterpret_cast<uintptr_t>(tensor) % kAccessBytes != 0) {
      throw std::invalid_argument(std::string(name) +
                                  ": tensors must begin at a multiple of 16 bytes");
    }
  }
  constexpr int64_t kBorder = kStemSide + 1;
  if (s.n * (s.height + kBorder) * (s.width + kBorder) >= int64_t{1} << 31) {
    throw std::invalid_argument(std::string(name) + " of " + stem(s) + ": 2^31 pixels or more");
  }
  return {static_cast<int>(s.n), static_cast<int>(s.height), static_cast<int>(s.width),
          static_cast<int>(s.filters)};
}

// Pixels of an image are found by an int.
inline void check_image(const char* name, const Stem& s, const StemImage& x) {
  const int64_t extent[] = {kStemChannels, s.height, s.width};
  int64_t span = 0;
  for (int i = 0; i < 3; ++i) span += (extent[i] - 1) * std::abs(x.values.stride[i + 1]);
  if (span >= int64_t{1} << 31) {
    throw std::invalid_argument(std::string(name) + " of " + stem(s) +
                                ": an image's values lie 2^31 or more apart");
  }
}

// Blocks for `tiles` tiles of a column of filters: as many as run together, each with (nearly) as
// many tiles as the others.
template <class Tile>
Grid over_stem_tiles(int64_t tiles, int64_t filters, int filters_of_tile, int64_t together,
                     int shared_bytes) {
  const int64_t across = divide_up(filters, filters_of_tile);
  const int64_t busy = std::max<int64_t>(together / across, 1);
  const int64_t down = divide_up(tiles, divide_up(tiles, std::min(busy, kMostRowBlocks)));
  return {dim3(static_cast<unsigned>(across), static_cast<unsigned>(down)), dim3(Tile::kThreads),
          shared_bytes};
}

// stem_bias_act without the pool, which is stem_conv's kernel.
void stem_bias_act_unpooled(DType, Stem, const StemImage& x, const Strided& weight,
                            const float* bias, void* z, Device);

}  // namespace fusedres::cuda
