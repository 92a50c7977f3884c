// Convolutions as matrix products: positions of the output by filters, the reduction over taps and
// channels (implicit GEMM). A block multiplies a tile at a time, 64 bytes of the reduction in each
// stage of a ring of asynchronous copies. Images are channels_last, a row-major matrix [N * height
// * width, channels]; weights are [filters, taps, channels]. Channels and filters are multiples of
// 8, so that a 16-byte chunk never lies across two positions or taps.
#pragma once

#include "rows.cuh"
#include "tensor_core.cuh"

namespace fusedres::cuda {

constexpr int kRowBytes = 64;  // of the reduction, in a stage

// kM positions by kN filters, by warps of kM / kWarpsM by kN / kWarpsN; kBlocks of them are meant
// to be on a multiprocessor together (see `together`).
template <class T_, int kM_, int kN_, int kWarpsM_, int kWarpsN_, int kStages_, int kBlocks_>
struct ConvTile {
  using T = T_;
  static constexpr int kM = kM_, kN = kN_, kWarpsM = kWarpsM_, kWarpsN = kWarpsN_;
  static constexpr int kStages = kStages_, kBlocks = kBlocks_;
  static constexpr int kThreads = kWarp * kWarpsM * kWarpsN;
  static constexpr int kDepth = kRowBytes / sizeof(T);  // values of the reduction in a stage
  static constexpr int kVector = kAccessBytes / sizeof(T);
  static constexpr int kSteps = kRowBytes / kStepBytes;
  // fragments of 16 positions and of 8 filters in a warp's part
  static constexpr int kFragmentsM = kM / kWarpsM / 16, kFragmentsN = kN / kWarpsN / 8;
  static constexpr int kChunks = kRowBytes / kAccessBytes;
  static constexpr int kRowsAtOnce = kThreads / kChunks;  // copied by all threads together
  static_assert(kM % (16 * kWarpsM) == 0 && kN % (16 * kWarpsN) == 0);
  static_assert(kM % kRowsAtOnce == 0 && kN % kRowsAtOnce == 0);
  static_assert(kM <= kThreads * 2 && kN <= kThreads);
};

// A convolution: side 1, or 3 with a padding of 1. Positions and pixels can be counted by an int.
struct ConvShape {
  int rows;  // positions of the output, N * out_height * out_width
  int channels, filters, height, width, out_height, out_width, side, stride;
  __host__ __device__ int taps() const { return side * side; }
};

// Where a thread stands in its block's tile.
template <class Tile>
struct Stand {
  int thread = right_here(threadIdx.x);
  int lane = thread % kWarp, group = lane / 4, member = lane % 4;
  int warp_m = thread / kWarp / Tile::kWarpsN, warp_n = thread / kWarp % Tile::kWarpsN;
  // of the warp's part of the tile
  int first_row = warp_m * (Tile::kM / Tile::kWarpsM);
  int first_column = warp_n * (Tile::kN / Tile::kWarpsN);
  // the row (of 16) and the chunk (of a step's two) that the lane names for a fragment of A, and
  // the same (a column) for two fragments of B
  __device__ __forceinline__ int a_row() const { return lane % 16; }
  __device__ __forceinline__ int a_chunk() const { return lane / 16; }
  __device__ __forceinline__ int b_column() const { return lane % 8 + lane / 16 * 8; }
  __device__ __forceinline__ int b_chunk() const { return lane / 8 % 2; }
};

// A position of the tile: its pixel, counted from the tile's first one's, and a bit for every tap
// that lies in the image (tap 3 * row + column); none for a position past the end.
struct Position {
  int pixel, taps;
};

// Writes the tile's positions where its threads find them after a barrier; returns the pixel of the
// first.
template <class Tile>
__device__ __forceinline__ int put_positions(Position* positions, int first, const ConvShape& s) {
  const auto pixel = [&](int row, int& h, int& w) {
    const int line = row / s.out_width, image = line / s.out_height;
    h = (line - image * s.out_height) * s.stride;
    w = (row - line * s.out_width) * s.stride;
    return (image * s.height + h) * s.width + w;
  };
  const bool same = s.side == 1 && s.stride == 1;  // a position is its pixel
  int h = 0, w = 0;
  const int origin = same ? first : pixel(first, h, w);
#pragma unroll 1
  for (int i = threadIdx.x; i < Tile::kM; i += Tile::kThreads) {
    Position p = {0, 0};
    if (first + i < s.rows) {
      p = {same ? i : pixel(first + i, h, w) - origin, 1};
      if (s.side == 3) {
        const int rows = 070 | (h > 0 ? 07 : 0) | (h < s.height - 1 ? 0700 : 0);
        const int columns = 0222 | (w > 0 ? 0111 : 0) | (w < s.width - 1 ? 0444 : 0);
        p.taps = rows & columns;
      }
    }
    store_shared(positions + i, p);
  }
  return origin;
}

// Where the reduction is: the channel that a stage begins with, and the tap, in one register.
template <class Tile>
struct Walk {
  int at = 0;
  __device__ __forceinline__ int channel() const { return at >> 4; }
  __device__ __forceinline__ int tap() const { return at & 15; }
  // pixels from a position's own to the tap's
  __device__ __forceinline__ int pixels(const ConvShape& s) const {
    return s.side == 1 ? 0 : (tap() / 3 - 1) * s.width + tap() % 3 - 1;
  }
  __device__ __forceinline__ void next(int channels) {
    at += Tile::kDepth << 4;
    if (channel() >= channels) at = tap() + 1;
  }
};

// Calls f(row, offset, there) for each position whose 16 bytes of a stage, from `channel` on, this
// thread copies: values from the tile's first pixel to those of the walk's tap, 0 if that isn't in
// the image. Positions are read anew for every stage: kept, they would be registers too many.
template <class Tile, class F>
__device__ __forceinline__ void for_each_copy(const Position* positions, int thread, int channel,
                                              const Walk<Tile>& walk, const ConvShape& s, F f) {
  const int pixels = walk.pixels(s);
#pragma unroll
  for (int i = 0; i < Tile::kM / Tile::kRowsAtOnce; ++i) {
    const int row = thread / Tile::kChunks + i * Tile::kRowsAtOnce;
    const Position p = load_shared(positions + row);
    const bool there = channel < s.channels && (p.taps >> walk.tap() & 1) != 0;
    f(row, there ? (p.pixel + pixels) * s.channels + channel : 0, there);
  }
}

// Whether the two rows of a thread's fragment have the walk's tap in the image.
template <class Tile>
struct There {
  bool above, below;
  __device__ __forceinline__ There(const Position* positions, const Stand<Tile>& stand, int i,
                                   const Walk<Tile>& walk) {
    const Position* const p = positions + stand.first_row + 16 * i + stand.group;
    above = (load_shared(p).taps >> walk.tap() & 1) != 0;
    below = (load_shared(p + 8).taps >> walk.tap() & 1) != 0;
  }
};

// Accumulators of a warp's part.
template <class Tile>
using Accumulators = float[Tile::kFragmentsM][Tile::kFragmentsN][4];

// Runs the ring: feed.copy(stage) starts the copies of the next stage of the reduction,
// feed.multiply(stage) takes a stage that has arrived. Ends with all threads past their last read.
template <int kStages, class Feed>
__device__ __forceinline__ void run_ring(int iterations, Feed& feed) {
#pragma unroll
  for (int stage = 0; stage < kStages - 1; ++stage) {
    if (stage < iterations) feed.copy(stage);
    commit_copies();
  }
  int from = 0;
#pragma unroll 1
  for (int left = iterations; left > 0; --left) {
    wait_copies<kStages - 2>();
    sync_block();  // others' copies have arrived too, and all are done with the stage before
    if (left >= kStages) feed.copy(from == 0 ? kStages - 1 : from - 1);
    commit_copies();
    feed.multiply(from);
    from = from + 1 == kStages ? 0 : from + 1;
  }
  wait_copies<0>();
  sync_block();
}

// A register of a fragment: two values of 16 bits, or one of 32.
template <class T>
struct Values {
  static constexpr int kNumber = 4 / sizeof(T);
  static __device__ __forceinline__ void widen(float (&v)[kNumber], uint32_t bits) {
    if constexpr (sizeof(T) == 4) {
      v[0] = float_of_bits(bits);
    } else {
      const float2 two = Convert<T>::widen(bits);
      v[0] = two.x;
      v[1] = two.y;
    }
  }
  static __device__ __forceinline__ uint32_t narrow(const float (&v)[kNumber]) {
    uint32_t bits;
    if constexpr (sizeof(T) == 4) {
      memcpy(&bits, v, sizeof bits);
    } else {
      const auto pair = Convert<T>::narrow(v[0], v[1]);
      memcpy(&bits, &pair, sizeof bits);
    }
    return bits;
  }
};

// As operands have to be: floats rounded to what tensor cores see.
template <class T, int N>
__device__ __forceinline__ void as_operand(uint32_t (&r)[N]) {
  if constexpr (sizeof(T) == 4) {
#pragma unroll
    for (uint32_t& bits : r) bits = tf32(bits);
  }
}

// relu(x * scale + shift) of a fragment of A, in x's dtype, 0 in rows that aren't there. `scale`
// and `shift` are those of the step's channels, in shared memory; floor is 0, or -inf without ReLU.
template <class T>
__device__ __forceinline__ void activate(uint32_t (&a)[4], const float* scale, const float* shift,
                                         int member, float floor, bool there, bool there_below) {
  constexpr int kNumber = Values<T>::kNumber;
  using Vector = std::conditional_t<kNumber == 2, float2, float>;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int channel = half * (kStep<T> / 2) + member * kNumber;
    float scales[kNumber], shifts[kNumber];
    const Vector some_scales = load_shared(reinterpret_cast<const Vector*>(scale + channel));
    const Vector some_shifts = load_shared(reinterpret_cast<const Vector*>(shift + channel));
    memcpy(scales, &some_scales, sizeof scales);
    memcpy(shifts, &some_shifts, sizeof shifts);
#pragma unroll
    for (int below = 0; below < 2; ++below) {
      uint32_t& bits = a[2 * half + below];
      float v[kNumber];
      Values<T>::widen(v, bits);
#pragma unroll
      for (int i = 0; i < kNumber; ++i)
        v[i] = max_or_nan(affine(v[i], scales[i], shifts[i]), floor);
      bits = (below ? there_below : there) ? Values<T>::narrow(v) : 0u;
    }
  }
}

}  // namespace fusedres::cuda
