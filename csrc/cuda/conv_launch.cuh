// From a convolution to its tile and grid.
#pragma once

#include <limits>

#include "conv_tile.cuh"
#include "launch.cuh"

namespace fusedres::cuda {

// The tiles there are, the largest first: a narrower one for few filters, a smaller one for few
// positions. Shared memory stays below 99 KB, which every chip has.
template <class T>
struct ConvTiles {
  using Large = ConvTile<T, 128, 128, 4, 2, 4, 2>;
  using Narrow = ConvTile<T, 128, 64, 4, 1, 4, 3>;
  using Small = ConvTile<T, 64, 64, 2, 2, 4, 4>;
};

inline std::string conv(const Conv& c) {
  return "[" + std::to_string(c.n) + ", " + std::to_string(c.channels) + ", " +
         std::to_string(c.height) + ", " + std::to_string(c.width) + "] by " +
         std::to_string(c.filters) + " filters " + std::to_string(c.side) + "x" +
         std::to_string(c.side) + "/" + std::to_string(c.stride);
}

inline ConvShape conv_shape(const char* name, const Conv& c) {
  const int64_t out_height = (c.height - 1) / c.stride + 1,
                out_width = (c.width - 1) / c.stride + 1;
  // a tile's offsets from its first pixel; a tap is a row away
  const int64_t pixels = std::max(c.n * c.height * c.width, c.n * out_height * out_width);
  const int64_t of_a_tile = 4 * 128 + 6 * (c.width + 1);
  const int64_t weight = c.filters * c.side * c.side * c.channels;
  if (std::max({pixels + 128, weight, of_a_tile * c.channels}) > std::numeric_limits<int>::max()) {
    throw std::invalid_argument(std::string(name) + " of " + conv(c) + ": too large for int32");
  }
  const auto small = [](int64_t v) { return static_cast<int>(v); };
  return {small(c.n * out_height * out_width),
          small(c.channels),
          small(c.filters),
          small(c.height),
          small(c.width),
          small(out_height),
          small(out_width),
          c.side,
          c.stride};
}

inline void check_alignment(const char* name, std::initializer_list<const void*> tensors) {
  for (const void* tensor : tensors) {
    if (reinterpret_cast<uintptr_t>(tensor) % kAccessBytes != 0) {
      throw std::invalid_argument(std::string(name) +
                                  ": tensors must begin at a multiple of 16 bytes");
    }
  }
}

// Calls f(tile) with a null pointer of the tile that a convolution's output is divided into: the
// largest that gives every multiprocessor something to do.
template <class F>
void with_conv_tile(DType dtype, const ConvShape& s, int multiprocessors, F f) {
  const auto blocks = [&](int m, int n) { return divide_up(s.rows, m) * divide_up(s.filters, n); };
  with_type(dtype, [&](auto* type) {
    using Tiles = ConvTiles<std::remove_pointer_t<decltype(type)>>;
    using Narrow = typename Tiles::Narrow;
    using Large = typename Tiles::Large;
    if constexpr (sizeof(*type) == 2) {
      if (s.filters > Narrow::kN && blocks(Large::kM, Large::kN) >= multiprocessors) {
        return f(static_cast<Large*>(nullptr));
      }
    }
    if (blocks(Narrow::kM, Narrow::kN) >= multiprocessors) {
      return f(static_cast<Narrow*>(nullptr));
    }
    return f(static_cast<typename Tiles::Small*>(nullptr));
  });
}

// Rows of blocks: one for every tile where there are few; else as many as run together, each with
// (nearly) as many tiles as the others, so that few partial results are left to merge.
template <class Tile>
Grid over_tiles(const ConvShape& s, int columns, int64_t together, int shared_bytes) {
  constexpr int64_t kFew = 512;
  const int64_t tiles = divide_up(s.rows, Tile::kM), across = divide_up(columns, Tile::kN);
  int64_t down = tiles;
  if (tiles > kFew) {
    const int64_t busy = std::max<int64_t>(together / across, 1);
    down = divide_up(tiles, divide_up(tiles, std::min(busy, kMostRowBlocks)));
  }
  return {dim3(static_cast<unsigned>(across), static_cast<unsigned>(down)), dim3(Tile::kThreads),
          shared_bytes};
}

// What the ReLU cuts off at.
inline float floor_of(bool relu) { return relu ? 0.0f : -std::numeric_limits<float>::infinity(); }

}  // namespace fusedres::cuda
