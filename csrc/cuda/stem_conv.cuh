// The stem's convolution, in front of a batch norm or with a bias and a ReLU.
#pragma once

#include "stem.cuh"

namespace fusedres::cuda {

constexpr int kStemRows = 8;
template <class T>
using StemConvTile = StemTile<T, kStemRows>;

// y = max(conv(x) + bias, floor); partial[row of blocks] = (mean, sum of (y - mean)^2) of the
// positions that it had, block_rows[row of blocks] how many; packed = x as stem_wgrad reads it.
// Reads x (neighbouring tiles share a border, out of the caches) and the weight, writes y, packed,
// and 2K floats a row of blocks. A block takes every gridDim.y-th tile of a column of filters,
// which stay in shared memory. The bias, packed and partial may be null; floor is 0, or -inf
// without ReLU.
template <class T>
__global__ void __launch_bounds__(StemConvTile<T>::kThreads, StemConvTile<T>::kBlocks)
    stem_conv_kernel(StemImage x, Strided weight, const float* __restrict__ bias, float floor,
                     T* __restrict__ packed, T* __restrict__ y, float* __restrict__ partial,
                     float* __restrict__ block_rows, StemShape s) {
  using Tile = StemConvTile<T>;
  using Memory = StemMemory<Tile>;
  unsigned char* const memory = dynamic_shared();
  auto* const samples = reinterpret_cast<Sample*>(memory + Memory::kSamples);
  auto* const biases = reinterpret_cast<float*>(memory + Memory::kBias);
  StemFilters<Tile>::put(memory + Memory::kFilters, weight, blockIdx.x * Tile::kN, s);
  put_bias<Tile>(biases, bias, blockIdx.x * Tile::kN, s);
  const typename Tile::Tiles tiles{s.n, s.out_height(), s.out_width()};
  const int column = threadIdx.x;
  Sample mine = {0.0f, 0.0f};
  float n = 0.0f;
#pragma unroll 1
  for (int tile = blockIdx.y; tile < tiles.tiles(); tile += gridDim.y) {
    const auto at = tiles.place(tile);
    const int height = tiles.height - at.row, width = tiles.width - at.column;
    const int filter = right_here(blockIdx.x) * Tile::kN;
    // a pixel belongs to the tile of the output position at half its row and column, the last ones
    // to the last tile
    const auto keep = [&](int row, int column) {
      return (row < 2 * kStemRows || height <= kStemRows) &&
             (column < 2 * kStemColumns || width <= kStemColumns) &&
             row < s.packed_height() - 2 * at.row && column < s.packed_width() - 2 * at.column;
    };
    put_pixels<T, kStemRows, Tile::kThreads>(memory, x, at.image, 2 * at.row, 2 * at.column,
                                             filter == 0 ? packed : nullptr, s, keep);
    sync_block();
    Accumulators<Tile> sums;
    multiply_windows<Tile>(sums, memory, memory + Memory::kFilters, biases);
    sync_block();
    const Stand<Tile> stand;
    const Staging<Tile> staging{memory, stand.thread};
    for_each_pair(stand, sums, [&](int row, int column, float& a, float& b) {
      a = max_or_nan(a, floor);
      b = max_or_nan(b, floor);
      store_shared(staging.pair(row, column), bits_of_pair<T>(a, b));
      round_pair<T>(a, b);
    });
    if (partial != nullptr) {
      put_samples(samples, stand, sums, [&](int row) {
        return row / kStemColumns < height && row % kStemColumns < width;
      });
    }
    sync_block();
    const int64_t first = static_cast<int64_t>(at.image) * tiles.height + at.row;
    T* const to = y + (first * tiles.width + at.column) * s.filters + filter;
    staging.for_each_chunk(
        Tile::kM, s.filters - filter, [&](int row, int column, const unsigned char* from) {
          const int down = row / kStemColumns, right = row % kStemColumns;
          if (down >= height || right >= width) return;
          const uint4 bits = load_shared(reinterpret_cast<const uint4*>(from));
          Pack<T, Tile::kVector> pack;
          memcpy(&pack, &bits, sizeof pack);
          store(to + (static_cast<int64_t>(down) * tiles.width + right) * s.filters + column, pack);
        });
    if (partial != nullptr && column < Tile::kN) {
      take_samples<Tile>(mine, n, samples, column, [&](int row) {
        const int down = row / kStemColumns;
        return (down < height ? down : height) * (width < kStemColumns ? width : kStemColumns);
      });
    }
    sync_block();
  }
  const int filter = blockIdx.x * Tile::kN + column;
  if (partial == nullptr || column >= Tile::kN || filter >= s.filters) return;
  float* const out = partial + static_cast<int64_t>(blockIdx.y) * 2 * s.filters + filter;
  store(out, Pack<float, 1>{mine.mean});
  store(out + s.filters, Pack<float, 1>{mine.m2});
  if (filter == 0) store(block_rows + blockIdx.y, Pack<float, 1>{n});
}

}  // namespace fusedres::cuda
