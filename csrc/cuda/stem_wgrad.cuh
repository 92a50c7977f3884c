// The gradient of the stem's weight, out of the packed images that stem_conv left: the sum over
// output positions of dy by their windows.
#pragma once

#include "stem.cuh"

namespace fusedres::cuda {

// kRows by kStemColumns positions in a stage of the ring. A warp has half of the filters and two
// pixels of every row of the window, for all positions.
template <class T_>
struct StemWgradTile {
  using T = T_;
  static constexpr int kRows = 8, kPositions = kRows * kStemColumns;
  static constexpr int kStages = 3, kBlocks = 2;
  static constexpr int kWarpsFilters = 2, kWarpsPixels = 4;
  static constexpr int kThreads = kWarp * kWarpsFilters * kWarpsPixels;
  static constexpr int kVector = kAccessBytes / sizeof(T);
  static constexpr int kRow = 128;  // bytes of filters
  static constexpr int kFilters = kRow / sizeof(T), kChunks = kRow / kAccessBytes;
  static constexpr int kFragments = kFilters / kWarpsFilters / 16;
  using Tiles = Tiling<kRows, kStemColumns>;
  using Pixels = StemPixels<T, kRows>;
  // in float32 fragments are read value by value: four positions by eight filters
  using Rows = Swizzled<kRow, sizeof(T) / 2>;
  static constexpr int kDy = 0, kPixels = kPositions * kRow;
  static constexpr int kStage = kPixels + Pixels::kBytes;
  static constexpr int kBytes = kStages * kStage;
  static_assert(kStage % kAccessBytes == 0);
};

template <class Tile>
struct StemWgradFeed {
  using T = typename Tile::T;
  using Pixels = typename Tile::Pixels;
  using Rows = typename Tile::Rows;

  const StemShape& s;
  unsigned char* ring;
  const T* dy;
  const T* packed;
  int filter;  // the block's first
  typename Tile::Tiles tiles;
  int tile;  // the next to copy

  int thread = right_here(threadIdx.x);
  int lane = thread % kWarp, group = lane / 4, member = lane % 4;
  int first_filter = thread / kWarp % Tile::kWarpsFilters * (Tile::kFilters / Tile::kWarpsFilters);
  int first_pixel = thread / kWarp / Tile::kWarpsFilters * 2;  // of a row of the window
  float sums[Tile::kFragments][kStemSide][4] = {};

  __device__ __forceinline__ void copy(int stage) {
    unsigned char* const to = ring + stage * Tile::kStage;
    const auto at = tiles.place(tile);
    {
      const int height = tiles.height - at.row, width = tiles.width - at.column;
      const int64_t first = static_cast<int64_t>(at.image) * tiles.height + at.row;
      const T* const from = dy + (first * tiles.width + at.column) * s.filters + filter;
      const int chunk = thread % Tile::kChunks;
#pragma unroll
      for (int i = 0; i < Tile::kPositions * Tile::kChunks / Tile::kThreads; ++i) {
        const int row = thread / Tile::kChunks + i * (Tile::kThreads / Tile::kChunks);
        const int down = row / kStemColumns, right = row % kStemColumns;
        const int column = chunk * Tile::kVector;
        const bool there = down < height && right < width && filter + column < s.filters;
        const int64_t offset =
            there ? (static_cast<int64_t>(down) * tiles.width + right) * s.filters + column : 0;
        copy_async(to + Rows::at(row, chunk), there ? from + offset : dy, there);
      }
    }
    constexpr int kChunks = Pixels::kHeight * Pixels::kChunks;
    const int height = s.packed_height() - 2 * at.row, width = s.packed_width() - 2 * at.column;
    const int64_t line = static_cast<int64_t>(at.image) * s.packed_height() + 2 * at.row;
    const T* const from = packed + (line * s.packed_width() + 2 * at.column) * kPixel;
#pragma unroll
    for (int i = 0; i < (kChunks + Tile::kThreads - 1) / Tile::kThreads; ++i) {
      const int chunk = thread + i * Tile::kThreads;
      if (chunk >= kChunks) break;
      const int down = chunk / Pixels::kChunks, right = chunk % Pixels::kChunks;
      const bool there = down < height && right * Pixels::kOfChunk < width;
      const int64_t offset =
          there
              ? (static_cast<int64_t>(down) * s.packed_width() + right * Pixels::kOfChunk) * kPixel
              : 0;
      copy_async(to + Tile::kPixels + Pixels::at(down, right), there ? from + offset : packed,
                 there);
    }
    tile += gridDim.y;
  }

  __device__ __forceinline__ void multiply(int stage) {
    const unsigned char* const from = ring + stage * Tile::kStage;
    constexpr int kStepsOfRow = kStemColumns / kStep<T>;
#pragma unroll 1
    for (int row = 0; row < Tile::kRows; ++row) {
#pragma unroll
      for (int step = 0; step < kStepsOfRow; ++step) {
        uint32_t a[Tile::kFragments][4], b[kStemSide][2];
        load_filters(a, from, row * kStemColumns + step * kStep<T>);
        load_windows(
            b, from + Tile::kPixels + 2 * row * Pixels::kPitch + step * kStep<T> * kAccessBytes);
#pragma unroll
        for (int i = 0; i < Tile::kFragments; ++i) {
#pragma unroll
          for (int r = 0; r < kStemSide; ++r) mma<T>(sums[i][r], a[i], b[r]);
        }
      }
    }
  }

  // Filters by positions from `position` on.
  __device__ __forceinline__ void load_filters(uint32_t (&a)[Tile::kFragments][4],
                                               const unsigned char* from, int position) const {
#pragma unroll
    for (int i = 0; i < Tile::kFragments; ++i) {
      const int filter = first_filter + 16 * i;
      if constexpr (sizeof(T) == 2) {
        const int row = position + lane % 8 + lane / 16 * 8;
        load_matrices_transposed(a[i], from + Rows::at(row, filter / 8 + lane / 8 % 2));
      } else {
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          const int value = filter + group + k % 2 * 8;
          const unsigned char* const at =
              from + Rows::at(position + member + k / 2 * 4, value / 4) + value % 4 * 4;
          a[i][k] = load_shared(reinterpret_cast<const uint32_t*>(at));
        }
        as_operand<T>(a[i]);
      }
    }
  }

  // Positions by the warp's two pixels, of every row of the window; from: that of the first.
  __device__ __forceinline__ void load_windows(uint32_t (&b)[kStemSide][2],
                                               const unsigned char* from) const {
    if constexpr (sizeof(T) == 2) {
      const int position = lane % 16, below = lane / 16;
#pragma unroll
      for (int r = 0; r < kStemSide; r += 2) {
        uint32_t two[4];
        const int row = r + 1 < kStemSide ? r + below : r;  // the last row is alone
        load_matrices_transposed(
            two, from + Pixels::at(row, first_pixel / Pixels::kOfChunk) + position * kAccessBytes);
        b[r][0] = two[0];
        b[r][1] = two[1];
        if (r + 1 < kStemSide) {
          b[r + 1][0] = two[2];
          b[r + 1][1] = two[3];
        }
      }
    } else {
#pragma unroll
      for (int r = 0; r < kStemSide; ++r) {
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          const unsigned char* const at = from + Pixels::at(r, first_pixel + group / 4) +
                                          (member + k * 4) * kAccessBytes + group % 4 * 4;
          b[r][k] = load_shared(reinterpret_cast<const uint32_t*>(at));
        }
        as_operand<T>(b[r]);
      }
    }
  }
};

// partial[row of blocks, k, v] = sum of dy[m, k] by value v of m's window over the positions m that
// it had: reads dy and the packed images (neighbouring tiles share a border, out of the caches),
// writes a float32 weight of packed windows a row of blocks. A block takes every gridDim.y-th tile
// of a column of filters, in order.
template <class T>
__global__ void __launch_bounds__(StemWgradTile<T>::kThreads, StemWgradTile<T>::kBlocks)
    stem_wgrad_partial_kernel(const T* __restrict__ dy, const T* __restrict__ packed,
                              float* __restrict__ partial, StemShape s) {
  using Tile = StemWgradTile<T>;
  const int filter = blockIdx.x * Tile::kFilters;
  const typename Tile::Tiles tiles{s.n, s.out_height(), s.out_width()};
  StemWgradFeed<Tile> feed{s, dynamic_shared(), dy, packed, filter, tiles, int(blockIdx.y)};
  const int left = tiles.tiles() - int(blockIdx.y);
  run_ring<Tile::kStages>((left + gridDim.y - 1) / gridDim.y, feed);
#pragma unroll
  for (int i = 0; i < Tile::kFragments; ++i) {
#pragma unroll
    for (int below = 0; below < 2; ++below) {
      const int k = filter + feed.first_filter + 16 * i + feed.group + 8 * below;
      if (k >= s.filters) continue;
      float* const to = partial + (static_cast<int64_t>(blockIdx.y) * s.filters + k) * kWindow +
                        feed.first_pixel * kPixel + 2 * feed.member;
#pragma unroll
      for (int r = 0; r < kStemSide; ++r) {
        store(to + r * kWindowRow,
              Pack<float, 2>{feed.sums[i][r][2 * below], feed.sums[i][r][2 * below + 1]});
      }
    }
  }
}

// dweight[k, c, r, s] = the sum of partial[block, k, (r, 1 + s, c)] over blocks, in a fixed order:
// reads a float32 weight a block, writes dweight, of any layout
__global__ void __launch_bounds__(kFinalizeColumns* kFinalizeRows)
    stem_wgrad_finalize_kernel(const float* __restrict__ partial, Strided dweight, int blocks,
                               int filters) {
  const int values = filters * kWindow;
  const int v = place<1>().channel;
  float sum[1][1] = {};
  if (v < values) {
#pragma unroll 4
    for (int block = threadIdx.y; block < blocks; block += kFinalizeRows) {
      sum[0][0] += load(partial + static_cast<int64_t>(block) * values + v).v[0];
    }
  }
  sum_over_rows<1, 1>(sum, values, [&](int, int64_t, float total) {
    const int k = v / kWindow, r = v % kWindow / kWindowRow;
    const int column = v % kWindowRow / kPixel - 1, c = v % kPixel;
    if (column < 0 || c >= kStemChannels) return;
    const auto& stride = dweight.stride;
    const int64_t at = k * stride[0] + c * stride[1] + r * stride[2] + column * stride[3];
    with_value_type(dweight.type, [&](auto* null) {
      using X = std::remove_const_t<std::remove_pointer_t<decltype(null)>>;
      if constexpr (!std::is_same_v<X, uint8_t>) {
        store(static_cast<X*>(const_cast<void*>(dweight.data)) + at,
              Pack<X, 1>{Convert<X>::narrow(total)});
      }
    });
  });
}

}  // namespace fusedres::cuda
