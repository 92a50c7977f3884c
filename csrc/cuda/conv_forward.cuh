// A tile of conv(x) or conv(relu(x * scale + shift)), the padding behind the activation: 0, not
// relu(shift).
#pragma once

#include "conv_tile.cuh"

namespace fusedres::cuda {

// A step's fragments of B out of a stage's filters, rows of 64 bytes.
template <class Tile>
__device__ __forceinline__ void load_filters(uint32_t (&b)[Tile::kFragmentsN][2],
                                             const unsigned char* filters, const Stand<Tile>& stand,
                                             int step) {
#pragma unroll
  for (int j = 0; j < Tile::kFragmentsN; j += 2) {
    const int column = stand.first_column + 8 * j + stand.b_column();
    uint32_t two[4];
    load_matrices(two, filters + Swizzled<kRowBytes>::at(column, 2 * step + stand.b_chunk()));
    as_operand<typename Tile::T>(two);
    b[j][0] = two[0];
    b[j][1] = two[1];
    b[j + 1][0] = two[2];
    b[j + 1][1] = two[3];
  }
}

// A stage: positions of x, filters of the weight, and with kPrologue the channels' scale and shift,
// each a row of 64 bytes (the vectors: 4 bytes a channel).
template <class Tile, bool kPrologue>
struct Forward {
  using T = typename Tile::T;
  using Chunks = Swizzled<kRowBytes>;
  static constexpr int kWeight = Tile::kM * kRowBytes;  // bytes in front of it
  static constexpr int kVectors = kWeight + Tile::kN * kRowBytes;
  static constexpr int kStage = kVectors + (kPrologue ? 2 * Tile::kDepth * sizeof(float) : 0);
  static constexpr int kBytes = Tile::kStages * kStage;
  static constexpr int kCopiesN = Tile::kN / Tile::kRowsAtOnce;

  const ConvShape& s;
  unsigned char* ring;
  const Position* positions;
  const T* x;       // the tile's first pixel
  const T* weight;  // the tile's first filter
  const float* stats;
  float floor;
  int filters;  // of the tile

  Accumulators<Tile>& sums;
  const Stand<Tile> stand{};
  Walk<Tile> copied{}, multiplied{};

  __device__ __forceinline__ void copy(int stage) {
    unsigned char* const to = ring + stage * kStage;
    const int chunk = threadIdx.x % Tile::kChunks, first = threadIdx.x / Tile::kChunks;
    const int channel = copied.channel() + chunk * Tile::kVector;
    for_each_copy(positions, threadIdx.x, channel, copied, s, [&](int row, int at, bool there) {
      copy_async(to + Chunks::at(row, chunk), x + at, there);
    });
#pragma unroll
    for (int i = 0; i < kCopiesN; ++i) {
      const int row = first + i * Tile::kRowsAtOnce;
      const bool there = channel < s.channels && row < filters;
      const int at = there ? (row * s.taps() + copied.tap()) * s.channels + channel : 0;
      copy_async(to + kWeight + Chunks::at(row, chunk), weight + at, there);
    }
    if constexpr (kPrologue) {
      constexpr int kCopies = Tile::kDepth * sizeof(float) / kAccessBytes;
      if (threadIdx.x < 2 * kCopies) {
        const int row = threadIdx.x / kCopies, part = threadIdx.x % kCopies * 4;
        const bool there = copied.channel() + part < s.channels;
        const int at = (kScale + row) * s.channels + (there ? copied.channel() + part : 0);
        copy_async(to + kVectors + threadIdx.x * kAccessBytes, stats + at, there);
      }
    }
    copied.next(s.channels);
  }

  __device__ __forceinline__ void multiply(int stage) {
    const unsigned char* const from = ring + stage * kStage;
#pragma unroll
    for (int step = 0; step < Tile::kSteps; ++step) {
      uint32_t b[Tile::kFragmentsN][2];
      load_filters<Tile>(b, from + kWeight, stand, step);
#pragma unroll
      for (int i = 0; i < Tile::kFragmentsM; ++i) {
        const int row = stand.first_row + 16 * i + stand.a_row();
        uint32_t a[4];
        load_matrices(a, from + Chunks::at(row, 2 * step + stand.a_chunk()));
        if constexpr (kPrologue) {
          const auto* scale = reinterpret_cast<const float*>(from + kVectors) + step * kStep<T>;
          const There<Tile> there(positions, stand, i, multiplied);
          activate<T>(a, scale, scale + Tile::kDepth, stand.member, floor, there.above,
                      there.below);
        }
        as_operand<T>(a);
#pragma unroll
        for (int j = 0; j < Tile::kFragmentsN; ++j) mma<T>(sums[i][j], a, b[j]);
      }
    }
    multiplied.next(s.channels);
  }
};

// Adds the tile that begins at position `first` and filter `filter` into sums.
template <class Tile, bool kPrologue>
__device__ __forceinline__ void convolve(Accumulators<Tile>& sums, unsigned char* ring,
                                         Position* positions, const typename Tile::T* x,
                                         const float* stats, float floor,
                                         const typename Tile::T* weight, int first, int filter,
                                         const ConvShape& s) {
  const int64_t origin = put_positions<Tile>(positions, first, s);
  sync_block();
  Forward<Tile, kPrologue> feed{s,
                                ring,
                                positions,
                                x + origin * s.channels,
                                weight + static_cast<int64_t>(filter) * s.taps() * s.channels,
                                stats,
                                floor,
                                s.filters - filter,
                                sums};
  const int depth_of_a_tap = (s.channels + Tile::kDepth - 1) / Tile::kDepth;
  run_ring<Tile::kStages>(depth_of_a_tap * s.taps(), feed);
}

}  // namespace fusedres::cuda
