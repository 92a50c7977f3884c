// A convolution between two batch norms.
#pragma once

#include "conv_epilogue.cuh"
#include "conv_forward.cuh"

namespace fusedres::cuda {

// Shared memory: the ring, then the tile of the output in the same place; positions; samples.
template <class Tile, bool kPrologue>
struct ConvFwdMemory {
  static constexpr int kRing = Forward<Tile, kPrologue>::kBytes;
  static constexpr int kPositions = kRing > Staging<Tile>::kBytes ? kRing : Staging<Tile>::kBytes;
  static constexpr int kSamples = kPositions + Tile::kM * sizeof(Position);
  static constexpr int kBytes = kSamples + Tile::kWarpsM * Tile::kN * sizeof(Sample);
};

// y = conv(relu(x * scale + shift)), partial[row of blocks] = (mean, sum of (y - mean)^2) of the
// positions that it had: reads x (a 3x3 its neighbours again, out of the caches) and the weight,
// writes y, and 2K floats a row of blocks. A block takes every gridDim.y-th tile of a column of
// filters. Without stats conv(x); without partial no statistics.
template <class Tile, bool kPrologue>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocks)
    conv_fwd_kernel(const typename Tile::T* __restrict__ x, const float* __restrict__ stats,
                    float floor, const typename Tile::T* __restrict__ weight,
                    typename Tile::T* __restrict__ y, float* __restrict__ partial, ConvShape s) {
  using T = typename Tile::T;
  using Memory = ConvFwdMemory<Tile, kPrologue>;
  unsigned char* const memory = dynamic_shared();
  auto* const samples = reinterpret_cast<Sample*>(memory + Memory::kSamples);
  const int filter = blockIdx.x * Tile::kN, column = threadIdx.x;
  Sample mine = {0.0f, 0.0f};
  float n = 0.0f;
#pragma unroll 1
  for (int first = blockIdx.y * Tile::kM; first < s.rows; first += gridDim.y * Tile::kM) {
    Accumulators<Tile> sums = {};
    convolve<Tile, kPrologue>(sums, memory,
                              reinterpret_cast<Position*>(memory + Memory::kPositions), x, stats,
                              floor, weight, first, filter, s);
    const int rows = s.rows - first;
    const Stand<Tile> stand;
    const Staging<Tile> staging{memory, stand.thread};
    for_each_pair(stand, sums, [&](int row, int column, float& a, float& b) {
      store_shared(staging.pair(row, column), bits_of_pair<T>(a, b));
      round_pair<T>(a, b);
    });
    if (partial != nullptr) {
      put_samples(samples, stand, sums, [&](int row) { return row < rows; });
    }
    sync_block();
    staging.store_rows(y + static_cast<int64_t>(first) * s.filters + filter, s.filters, rows,
                       s.filters - filter);
    if (partial != nullptr && column < Tile::kN) {
      take_samples<Tile>(mine, n, samples, column,
                         [&](int row) { return row < rows ? row : rows; });
    }
    sync_block();
  }
  if (partial == nullptr || column >= Tile::kN || filter + column >= s.filters) return;
  float* const out = partial + static_cast<int64_t>(blockIdx.y) * 2 * s.filters + filter + column;
  store(out, Pack<float, 1>{mine.mean});
  store(out + s.filters, Pack<float, 1>{mine.m2});
}

}  // namespace fusedres::cuda
