// A whole residual block of a trained net in one launch: 1x1, 3x3, 1x1, with what lies between them
// in shared memory only.
#pragma once

#include "conv_epilogue.cuh"
#include "conv_forward.cuh"

namespace fusedres::cuda {

// [n, height, width, channels], `inner` channels between the convolutions; a block has tiles of
// tile_height rows by BottleneckTile::kWidth columns.
struct BottleneckShape {
  int height, width, channels, tile_height, tiles_down, tiles_across;
};

// What a block of threads computes: kRows positions of the output, in rows of kWidth, so that eight
// neighbours are a row of the 3x3's operand; before, kHalo with one more pixel on every side.
template <class T_, int kInner_, int kBlocks_>
struct BottleneckTile {
  using T = T_;
  static constexpr int kInner = kInner_, kBlocks = kBlocks_;
  static constexpr int kWidth = 8, kHaloWidth = kWidth + 2, kMostHeight = 16;
  static constexpr int kStages = 3;
  using First = ConvTile<T, 192, kInner, 4, 2, kStages, kBlocks>;
  using Second = ConvTile<T, 128, kInner, 4, 2, kStages, kBlocks>;
  using Third = ConvTile<T, 128, 128, 4, 2, kStages, kBlocks>;
  static constexpr int kThreads = First::kThreads;
  static_assert(First::kM >= (kMostHeight + 2) * kHaloWidth && Second::kM == kMostHeight * kWidth);
  static_assert(Staging<First>::kRow == Staging<Second>::kRow);

  // shared memory: the activation between two convolutions; the ring, in the third the tile of the
  // output behind it; positions
  static constexpr int kRing = Staging<First>::kBytes;
  static constexpr int kRingBytes = Forward<First, false>::kBytes;
  static constexpr int kOut = kRing + kStages * Third::kN * kRowBytes;
  static constexpr int kPositions = kOut + Staging<Third>::kBytes > kRing + kRingBytes
                                        ? kOut + Staging<Third>::kBytes
                                        : kRing + kRingBytes;
  static constexpr int kBytes = kPositions + First::kM * sizeof(Position);
};

// The second and third convolution: the operand A lies in shared memory whole, rows of `Rows`; only
// filters are copied. Of a window, position (h, w) of the output meets rows (h + r, w + s) of A.
template <class Tile, class Rows, bool kWindow, int kHaloWidth>
struct Inner {
  using T = typename Tile::T;
  using Filters = Swizzled<kRowBytes>;
  static constexpr int kStage = Tile::kN * kRowBytes;
  static constexpr int kTaps = kWindow ? 9 : 1;

  const unsigned char* a;
  unsigned char* ring;
  const T* weight;  // the tile's first filter
  int channels;

  Accumulators<Tile>& sums;
  const Stand<Tile> stand{};
  Walk<Tile> copied{}, multiplied{};

  __device__ __forceinline__ void copy(int stage) {
    unsigned char* const to = ring + stage * kStage;
    const int chunk = threadIdx.x % Tile::kChunks, first = threadIdx.x / Tile::kChunks;
#pragma unroll
    for (int i = 0; i < Tile::kN / Tile::kRowsAtOnce; ++i) {
      const int row = first + i * Tile::kRowsAtOnce;
      const int at =
          (row * kTaps + copied.tap()) * channels + copied.channel() + chunk * Tile::kVector;
      copy_async(to + Filters::at(row, chunk), weight + at, true);
    }
    copied.next(channels);
  }

  __device__ __forceinline__ void multiply(int stage) {
    const unsigned char* const from = ring + stage * kStage;
    const int first_chunk = multiplied.channel() / Tile::kVector;
#pragma unroll
    for (int step = 0; step < Tile::kSteps; ++step) {
      uint32_t b[Tile::kFragmentsN][2];
      load_filters<Tile>(b, from, stand, step);
#pragma unroll
      for (int i = 0; i < Tile::kFragmentsM; ++i) {
        int row = stand.first_row + 16 * i + stand.a_row();
        if (kWindow) {
          row = (row / 8 + multiplied.tap() / 3) * kHaloWidth + row % 8 + multiplied.tap() % 3;
        }
        uint32_t fragment[4];
        load_matrices(fragment, a + Rows::at(row, first_chunk + 2 * step + stand.a_chunk()));
#pragma unroll
        for (int j = 0; j < Tile::kFragmentsN; ++j) mma<T>(sums[i][j], fragment, b[j]);
      }
    }
    multiplied.next(channels);
  }
};

// sums + bias, relu'd and rounded, where the next convolution reads them; 0 in rows that aren't
// there
template <class Tile, class There>
__device__ __forceinline__ void put_activation(unsigned char* memory, const Stand<Tile>& stand,
                                               Accumulators<Tile>& sums, const float* bias,
                                               There there) {
  using T = typename Tile::T;
  const Staging<Tile> staging{memory, stand.thread};
  for_each_pair(stand, sums, [&](int row, int column, float& a, float& b) {
    const Pack<float, 2> two = load<2>(bias + column);
    const bool is_there = there(row);
    store_shared(staging.pair(row, column),
                 bits_of_pair<T>(is_there ? max_or_nan(a + two.v[0], 0.0f) : 0.0f,
                                 is_there ? max_or_nan(b + two.v[1], 0.0f) : 0.0f));
  });
}

// z = relu(conv3(relu(conv2(relu(conv1(x) + bias1)) + bias2)) + bias3 + x), the convolutions 1x1,
// 3x3 and 1x1 of stride 1: reads x (the tile's border again, out of the caches; once more for the
// sum) and the weights, writes z. The 3x3's padding is 0, not relu(bias1).
template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocks) bottleneck_infer_kernel(
    const typename Tile::T* __restrict__ x, const typename Tile::T* __restrict__ weight1,
    const float* __restrict__ bias1, const typename Tile::T* __restrict__ weight2,
    const float* __restrict__ bias2, const typename Tile::T* __restrict__ weight3,
    const float* __restrict__ bias3, typename Tile::T* __restrict__ z, BottleneckShape s) {
  using T = typename Tile::T;
  using First = typename Tile::First;
  using Second = typename Tile::Second;
  using Third = typename Tile::Third;
  using Rows = typename Staging<First>::Rows;
  constexpr int kInner = Tile::kInner;
  unsigned char* const inner = dynamic_shared();
  unsigned char* const ring = inner + Tile::kRing;
  auto* const positions = reinterpret_cast<Position*>(inner + Tile::kPositions);

  const int tile = blockIdx.x, across = tile % s.tiles_across;
  const int down = tile / s.tiles_across % s.tiles_down;
  const int image = tile / (s.tiles_across * s.tiles_down);
  const int top = down * s.tile_height, left = across * Tile::kWidth;
  const int64_t start = static_cast<int64_t>(image) * s.height * s.width * s.channels;
  x += start;
  z += start;

  for (int i = threadIdx.x; i < First::kM; i += Tile::kThreads) {
    const int h = top - 1 + i / Tile::kHaloWidth, w = left - 1 + i % Tile::kHaloWidth;
    const bool there = i < (s.tile_height + 2) * Tile::kHaloWidth && h >= 0 && h < s.height &&
                       w >= 0 && w < s.width;
    store_shared(positions + i, Position{there ? h * s.width + w : 0, there});
  }
  sync_block();
  {
    Accumulators<First> sums = {};
    const ConvShape shape = {0, s.channels, kInner, 0, 0, 0, 0, 1, 1};
    Forward<First, false> feed{shape, ring, positions, x, weight1, nullptr, 0.0f, kInner, sums};
    run_ring<Tile::kStages>(s.channels / First::kDepth, feed);
    put_activation<First>(inner, feed.stand, sums, bias1,
                          [&](int row) { return load_shared(positions + row).taps != 0; });
  }
  sync_block();
  {
    Accumulators<Second> sums = {};
    Inner<Second, Rows, true, Tile::kHaloWidth> feed{inner, ring, weight2, kInner, sums};
    run_ring<Tile::kStages>(9 * kInner / Second::kDepth, feed);
    put_activation<Second>(inner, feed.stand, sums, bias2, [](int) { return true; });
  }
  sync_block();

  const auto pixel = [&](int row) {
    return (top + row / Tile::kWidth) * s.width + left + row % Tile::kWidth;
  };
  const auto there = [&](int row) {
    return row < s.tile_height * Tile::kWidth && top + row / Tile::kWidth < s.height &&
           left + row % Tile::kWidth < s.width;
  };
#pragma unroll 1
  for (int filter = 0; filter < s.channels; filter += Third::kN) {
    const Staging<Third> out{inner + Tile::kOut, right_here(threadIdx.x)};
    out.for_each_chunk(Third::kM, Third::kN, [&](int row, int column, unsigned char* at) {
      const int from = there(row) ? pixel(row) * s.channels + filter + column : 0;
      copy_async(at, x + from, there(row));
    });
    commit_copies();
    Accumulators<Third> sums = {};
    Inner<Third, Rows, false, 0> feed{inner, ring, weight3 + filter * kInner, kInner, sums};
    run_ring<Tile::kStages>(kInner / Third::kDepth, feed);
    for_each_pair(feed.stand, sums, [&](int row, int column, float& a, float& b) {
      const Pack<float, 2> two = load<2>(bias3 + filter + column);
      auto* const pair = out.pair(row, column);
      a += two.v[0];
      b += two.v[1];
      const float2 residual = pair_of_bits<T>(load_shared(pair));
      a += residual.x;
      b += residual.y;
      store_shared(pair, bits_of_pair<T>(max_or_nan(a, 0.0f), max_or_nan(b, 0.0f)));
    });
    sync_block();
    out.for_each_chunk(Third::kM, Third::kN, [&](int row, int column, const unsigned char* at) {
      if (!there(row)) return;
      store(z + pixel(row) * s.channels + filter + column, load_chunk<T>(at));
    });
    sync_block();
  }
}

}  // namespace fusedres::cuda
