// A tile of the transposed convolution of dy: of stride 1 it is a convolution of dy whose taps come
// in the opposite order, with the weight's rows as columns. Its ConvShape has dy's channels (the
// filters of the weight) as `channels` and those of dx as `filters`.
#pragma once

#include "conv_tile.cuh"

namespace fusedres::cuda {

// What makes dy of du and y, of a lane's channels in a half of a step.
template <class T>
struct GradientVectors {
  static constexpr int kNumber = Values<T>::kNumber;
  enum Row { scale, mean, slope, offset, kRows };
  float v[kRows][kNumber];

  // from: the lane's channels in the first row, each row `pitch` floats, in shared memory
  __device__ __forceinline__ GradientVectors(const float* from, int pitch) {
    using Vector = std::conditional_t<kNumber == 2, float2, float>;
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      const auto some = load_shared(reinterpret_cast<const Vector*>(from + row * pitch));
      memcpy(v[row], &some, sizeof some);
    }
  }

  // du becomes dy = scale * du + slope * (y - mean) + offset, in its dtype; 0 if it isn't there
  __device__ __forceinline__ void apply(uint32_t& du, uint32_t y, bool there) const {
    float gradient[kNumber], raw[kNumber];
    Values<T>::widen(gradient, du);
    Values<T>::widen(raw, y);
#pragma unroll
    for (int i = 0; i < kNumber; ++i) {
      const float rest = fmaf(v[slope][i], raw[i] - v[mean][i], v[offset][i]);
      gradient[i] = fmaf(v[scale][i], gradient[i], rest);
    }
    du = there ? Values<T>::narrow(gradient) : 0u;
  }
};

// A stage: positions of du; with kPrologue the same of y; rows of the weight, one for each of the
// stage's channels; with kPrologue GradientVectors' rows, 4 bytes a channel.
template <class Tile, bool kPrologue>
struct Transposed {
  using T = typename Tile::T;
  using Chunks = Swizzled<kRowBytes>;
  // float32 is read value by value, of four rows in two chunks at a time
  using Weight = Swizzled<Tile::kN * sizeof(T), sizeof(T) / 2>;
  static constexpr int kY = Tile::kM * kRowBytes;  // bytes in front of it
  static constexpr int kWeight = (kPrologue ? 2 : 1) * kY;
  static constexpr int kVectors = kWeight + Tile::kN * kRowBytes;
  static constexpr int kRows = GradientVectors<T>::kRows;
  static constexpr int kStage = kVectors + (kPrologue ? kRows * Tile::kDepth * sizeof(float) : 0);
  static constexpr int kBytes = Tile::kStages * kStage;
  static constexpr int kCopies = Tile::kDepth * Weight::kChunks / Tile::kThreads;  // of the weight
  static_assert(kCopies * Tile::kThreads == Tile::kDepth * Weight::kChunks);

  const ConvShape& s;
  unsigned char* ring;
  const Position* positions;
  const T* du;
  const T* y;  // or nullptr: dy = scale * du
  const float* stats;
  const float* y_sums;
  const T* weight;
  int first;  // position of the tile; its first channel of dx is that of the block's column

  Accumulators<Tile>& sums;
  Walk<Tile> copied{}, multiplied{};

  __device__ __forceinline__ void copy(int stage) {
    unsigned char* const to = ring + stage * kStage;
    const int thread = right_here(threadIdx.x), chunk = thread % Tile::kChunks;
    const int channel = copied.channel() + chunk * Tile::kVector;
    const int64_t origin = static_cast<int64_t>(right_here(first)) * s.channels;
    for_each_copy(positions, thread, channel, copied, s, [&](int row, int offset, bool there) {
      const int64_t at = origin + offset;
      copy_async(to + Chunks::at(row, chunk), du + at, there);
      if constexpr (kPrologue) {
        there = there && y != nullptr;
        copy_async(to + kY + Chunks::at(row, chunk), there ? y + at : du, there);
      }
    });
    const int column = block_here() * Tile::kN;
    const int side = right_here(s.side), taps = side * side, tap = taps - 1 - copied.tap();
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      const int at = thread + i * Tile::kThreads, row = at / Weight::kChunks;
      const int c = at % Weight::kChunks, k = copied.channel() + row,
                n = column + c * Tile::kVector;
      const bool there = k < s.channels && n < s.filters;
      const int from = there ? (k * taps + tap) * s.filters + n : 0;
      copy_async(to + kWeight + Weight::at(row, c), weight + from, there);
    }
    if constexpr (kPrologue) {
      using Vectors = GradientVectors<T>;
      constexpr int kParts = Tile::kDepth * sizeof(float) / kAccessBytes;
      if (thread < kRows * kParts) {
        const int row = thread / kParts, k = copied.channel() + thread % kParts * 4;
        const int of_stats = row == Vectors::scale ? kScale : kMean;
        const int of_sums = row == Vectors::slope ? kSlope : kOffset;
        const float* from =
            row <= Vectors::mean ? stats + of_stats * s.channels : y_sums + of_sums * s.channels;
        const bool there = k < s.channels && (row == Vectors::scale || y != nullptr);
        copy_async(to + kVectors + thread * kAccessBytes, there ? from + k : stats, there);
      }
    }
    copied.next(s.channels);
  }

  // fragments j and j + 1 of the weight
  __device__ __forceinline__ void load_weight(uint32_t (&b)[2][2], const unsigned char* from,
                                              const Stand<Tile>& stand, int step, int j) const {
    if constexpr (sizeof(T) == 2) {
      const int row = step * kStep<T> + stand.lane % 16;
      const int chunk = stand.first_column / 8 + j + stand.lane / 16;
      uint32_t two[4];
      load_matrices_transposed(two, from + Weight::at(row, chunk));
      memcpy(b, two, sizeof two);
    } else {
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const int column = stand.first_column + 8 * (j + k / 2) + stand.group;
        const int row = step * kStep<T> + k % 2 * 4 + stand.member;
        const unsigned char* at = from + Weight::at(row, column / 4) + column % 4 * sizeof(T);
        b[k / 2][k % 2] = tf32(load_shared(reinterpret_cast<const uint32_t*>(at)));
      }
    }
  }

  // The step's fragments of dy.
  __device__ __forceinline__ void load_gradient(uint32_t (&a)[Tile::kFragmentsM][4],
                                                const unsigned char* from, const Stand<Tile>& stand,
                                                int step) const {
    uint32_t y_of[Tile::kFragmentsM][4];
#pragma unroll
    for (int i = 0; i < Tile::kFragmentsM; ++i) {
      const int row = stand.first_row + 16 * i + stand.a_row();
      const int at = Chunks::at(row, 2 * step + stand.a_chunk());
      load_matrices(a[i], from + at);
      if constexpr (kPrologue) load_matrices(y_of[i], from + kY + at);
    }
    if constexpr (kPrologue) {
      constexpr int kNumber = Values<T>::kNumber;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int channel = step * kStep<T> + half * (kStep<T> / 2) + stand.member * kNumber;
        const GradientVectors<T> vectors(reinterpret_cast<const float*>(from + kVectors) + channel,
                                         Tile::kDepth);
#pragma unroll
        for (int i = 0; i < Tile::kFragmentsM; ++i) {
          const There<Tile> there(positions, stand, i, multiplied);
          vectors.apply(a[i][2 * half], y_of[i][2 * half], there.above);
          vectors.apply(a[i][2 * half + 1], y_of[i][2 * half + 1], there.below);
        }
      }
    }
#pragma unroll
    for (int i = 0; i < Tile::kFragmentsM; ++i) as_operand<T>(a[i]);
  }

  __device__ __forceinline__ void multiply(int stage) {
    const unsigned char* const from = ring + stage * kStage;
    const Stand<Tile> stand;  // computed here, not kept in registers
#pragma unroll
    for (int step = 0; step < Tile::kSteps; ++step) {
      uint32_t a[Tile::kFragmentsM][4];
      load_gradient(a, from, stand, step);
#pragma unroll
      for (int j = 0; j < Tile::kFragmentsN; j += 2) {
        uint32_t b[2][2];
        load_weight(b, from + kWeight, stand, step, j);
#pragma unroll
        for (int i = 0; i < Tile::kFragmentsM; ++i) {
          mma<T>(sums[i][j], a[i], b[0]);
          mma<T>(sums[i][j + 1], a[i], b[1]);
        }
      }
    }
    multiplied.next(s.channels);
  }
};

// Adds the tile of the block's column of channels that begins at position `first` into sums.
template <class Tile, bool kPrologue>
__device__ __forceinline__ void convolve_transposed(Accumulators<Tile>& sums, unsigned char* ring,
                                                    Position* positions, const typename Tile::T* du,
                                                    const typename Tile::T* y, const float* stats,
                                                    const float* y_sums,
                                                    const typename Tile::T* weight, int first,
                                                    const ConvShape& s) {
  put_positions<Tile>(positions, first, s);
  sync_block();
  Transposed<Tile, kPrologue> feed{s, ring, positions, du, y, stats, y_sums, weight, first, sums};
  const int depth_of_a_tap = (right_here(s.channels) + Tile::kDepth - 1) / Tile::kDepth;
  run_ring<Tile::kStages>(depth_of_a_tap * s.taps(), feed);
}

}  // namespace fusedres::cuda
