// A convolution with what follows it in a trained net.
#pragma once

#include "conv_epilogue.cuh"
#include "conv_forward.cuh"

namespace fusedres::cuda {

// Shared memory: the ring, then the tile of the output in the same place; positions.
template <class Tile>
struct ConvBiasActMemory {
  static constexpr int kRing = Forward<Tile, false>::kBytes;
  static constexpr int kPositions = kRing > Staging<Tile>::kBytes ? kRing : Staging<Tile>::kBytes;
  static constexpr int kBytes = kPositions + Tile::kM * sizeof(Position);
};

// z = max(conv(x) + bias + residual, floor): reads x (a 3x3 its neighbours again, out of the
// caches), the weight and the residual, writes z. Bias and residual may be null; floor is 0, or
// -inf without ReLU. The residual is read 16 bytes at a time into the place of the output, and
// rounded once, with the sum.
template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocks)
    conv_bias_act_kernel(const typename Tile::T* __restrict__ x,
                         const typename Tile::T* __restrict__ weight,
                         const float* __restrict__ bias,
                         const typename Tile::T* __restrict__ residual, float floor,
                         typename Tile::T* __restrict__ z, ConvShape s) {
  using T = typename Tile::T;
  unsigned char* const memory = dynamic_shared();
  auto* const positions = reinterpret_cast<Position*>(memory + ConvBiasActMemory<Tile>::kPositions);
#pragma unroll 1
  for (int first = blockIdx.y * Tile::kM; first < s.rows; first += gridDim.y * Tile::kM) {
    const int filter = right_here(blockIdx.x) * Tile::kN;
    Accumulators<Tile> sums = {};
    convolve<Tile, false>(sums, memory, positions, x, nullptr, floor, weight, first, filter, s);
    const Stand<Tile> stand;
    const Staging<Tile> staging{memory, stand.thread};
    const int rows = s.rows - first, filters = s.filters - filter;
    const int64_t at = static_cast<int64_t>(first) * s.filters + filter;
    if (residual != nullptr) {
      staging.copy_rows(residual + at, s.filters, rows, filters);
      commit_copies();
      wait_copies<0>();
      sync_block();
    }
    for_each_pair(stand, sums, [&](int row, int column, float& a, float& b) {
      if (bias != nullptr && column < filters) {
        const Pack<float, 2> two = load<2>(bias + filter + column);
        a += two.v[0];
        b += two.v[1];
      }
      auto* const pair = staging.pair(row, column);
      if (residual != nullptr) {
        const float2 two = pair_of_bits<T>(load_shared(pair));
        a += two.x;
        b += two.y;
      }
      store_shared(pair, bits_of_pair<T>(max_or_nan(a, floor), max_or_nan(b, floor)));
    });
    sync_block();
    staging.store_rows(z + at, s.filters, rows, filters);
    sync_block();
  }
}

}  // namespace fusedres::cuda
