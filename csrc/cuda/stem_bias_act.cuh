// The stem of a trained net in one launch: convolution, bias, ReLU and max pool.
#pragma once

#include "stem.cuh"

namespace fusedres::cuda {

// 15 by 15 outputs of the convolution are what 7 by 7 windows of the pool see.
constexpr int kStemPoolRows = 16, kPooled = 7;
template <class T>
using StemPoolTile = StemTile<T, kStemPoolRows>;
using PooledTiles = Tiling<kPooled, kPooled>;
static_assert(2 * kPooled + 1 <= kStemPoolRows && 2 * kPooled + 1 <= kStemColumns);

// z = the maximum of relu(conv(x) + bias) over 3x3 windows, stride 2, padding 1: reads x (with a
// border, as in stem_conv) and the weight, writes z. What windows of two tiles share is computed in
// both. A block takes every gridDim.y-th tile of a column of filters. The bias may be null.
template <class T>
__global__ void __launch_bounds__(StemPoolTile<T>::kThreads, StemPoolTile<T>::kBlocks)
    stem_pool_kernel(StemImage x, Strided weight, const float* __restrict__ bias, T* __restrict__ z,
                     StemShape s) {
  using Tile = StemPoolTile<T>;
  using Memory = StemMemory<Tile>;
  unsigned char* const memory = dynamic_shared();
  auto* const biases = reinterpret_cast<float*>(memory + Memory::kBias);
  StemFilters<Tile>::put(memory + Memory::kFilters, weight, blockIdx.x * Tile::kN, s);
  put_bias<Tile>(biases, bias, blockIdx.x * Tile::kN, s);
  const int height = s.out_height(), width = s.out_width();
  const PooledTiles tiles{s.n, (height - 1) / 2 + 1, (width - 1) / 2 + 1};
#pragma unroll 1
  for (int tile = blockIdx.y; tile < tiles.tiles(); tile += gridDim.y) {
    const auto at = tiles.place(tile);
    // of the convolution's output
    const int first_row = 2 * at.row - 1, first_column = 2 * at.column - 1;
    const int filter = right_here(blockIdx.x) * Tile::kN;
    put_pixels<T, kStemPoolRows, Tile::kThreads>(memory, x, at.image, 2 * first_row,
                                                 2 * first_column, static_cast<T*>(nullptr), s,
                                                 [](int, int) { return false; });
    sync_block();
    Accumulators<Tile> sums;
    multiply_windows<Tile>(sums, memory, memory + Memory::kFilters, biases);
    sync_block();
    const Stand<Tile> stand;
    const Staging<Tile> staging{memory, stand.thread};
    for_each_pair(stand, sums, [&](int row, int column, float& a, float& b) {
      // the pool's padding is below every maximum of a ReLU's outputs
      const int h = first_row + row / kStemColumns, w = first_column + row % kStemColumns;
      const bool there = h >= 0 && h < height && w >= 0 && w < width;
      a = there ? max_or_nan(a, 0.0f) : 0.0f;
      b = there ? max_or_nan(b, 0.0f) : 0.0f;
      store_shared(staging.pair(row, column), bits_of_pair<T>(a, b));
    });
    sync_block();
    constexpr int kChunks = Staging<Tile>::kRow / kAccessBytes, kVector = Tile::kVector;
#pragma unroll 1
    for (int i = stand.thread; i < kPooled * kPooled * kChunks; i += Tile::kThreads) {
      const int chunk = i % kChunks, down = i / kChunks / kPooled, right = i / kChunks % kPooled;
      const int row = at.row + down, column = at.column + right;
      if (row >= tiles.height || column >= tiles.width) continue;
      if (filter + chunk * kVector >= s.filters) continue;
      Pack<float, kVector> best = {};
#pragma unroll
      for (int k = 0; k < 9; ++k) {
        const int of = (2 * down + k / 3) * kStemColumns + 2 * right + k % 3;
        const uint4 bits = load_shared(
            reinterpret_cast<const uint4*>(memory + Staging<Tile>::Rows::at(of, chunk)));
        Pack<T, kVector> pack;
        memcpy(&pack, &bits, sizeof pack);
        const auto wide = widen(pack);
#pragma unroll
        for (int v = 0; v < kVector; ++v) best.v[v] = max_or_nan(best.v[v], wide.v[v]);
      }
      const int64_t line = static_cast<int64_t>(at.image) * tiles.height + row;
      store(z + (line * tiles.width + column) * s.filters + filter + chunk * kVector,
            narrow<T>(best));
    }
    sync_block();
  }
}

}  // namespace fusedres::cuda
