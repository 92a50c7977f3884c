// The gradient of a convolution's input, of stride 1, between the backwards of two batch norms.
#pragma once

#include "bn_act_backward.cuh"
#include "conv_epilogue.cuh"
#include "conv_transposed.cuh"

namespace fusedres::cuda {

// sum(dx) and sum(dx * (x - mean)) of the columns of a tile, in a fixed order: a thread's rows of
// its 16 bytes, a warp's, the warps'.
template <class Tile>
struct ColumnSums {
  using T = typename Tile::T;
  static constexpr int kVector = Tile::kVector, kWarps = Tile::kThreads / kWarp;
  static constexpr int kChunks = Tile::kN / kVector;  // of a row
  static constexpr int kFloats = kWarps * 2 * Tile::kN;
  static_assert(kChunks <= kWarp);

  int column;
  Pack<float, kVector> mean, sum, product;

  __device__ __forceinline__ explicit ColumnSums(int thread)
      : column(thread % kChunks * kVector), mean{}, sum{}, product{} {}
  __device__ __forceinline__ void load_mean(const float* means) {
#pragma unroll
    for (int i = 0; i < kVector; i += 4) {
      const auto four = load_shared(reinterpret_cast<const float4*>(means + column + i));
      memcpy(mean.v + i, &four, sizeof four);
    }
  }
  __device__ __forceinline__ void take(const Pack<T, kVector>& dx, const Pack<T, kVector>& x) {
    const auto wide_dx = widen(dx), wide_x = widen(x);
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      sum.v[i] += wide_dx.v[i];
      product.v[i] = fmaf(wide_dx.v[i], wide_x.v[i] - mean.v[i], product.v[i]);
    }
  }
  // of_warps: kFloats floats
  __device__ __forceinline__ void put(float* of_warps, const Stand<Tile>& stand) {
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      auto& mine = k == 0 ? sum : product;
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
#pragma unroll
        for (int lanes = kChunks; lanes < kWarp; lanes *= 2) {
          mine.v[i] += __shfl_xor_sync(0xffffffffu, mine.v[i], lanes);
        }
      }
      float* const to = of_warps + (stand.thread / kWarp * 2 + k) * Tile::kN + column;
      if (stand.lane >= kChunks) continue;
#pragma unroll
      for (int i = 0; i < kVector; i += 4) {
        float4 four;
        memcpy(&four, mine.v + i, sizeof four);
        store_shared(reinterpret_cast<float4*>(to + i), four);
      }
    }
  }
  // to the tiles' before, 2 rows of kN
  static __device__ __forceinline__ void add_to(float* all, const float* of_warps, int column) {
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      float tile = 0.0f;
#pragma unroll
      for (int warp = 0; warp < kWarps; ++warp) {
        tile += load_shared(of_warps + (warp * 2 + k) * Tile::kN + column);
      }
      float* const to = all + k * Tile::kN + column;
      store_shared(to, load_shared(to) + tile);
    }
  }
};

// What a block has behind the ring: the tile of add, in which that of dx then comes about; that of
// x; its columns' scale, shift and mean. Later, in the same place, the sums over its warps' rows.
template <class Tile>
struct DgradEpilogue {
  static constexpr int kX = Staging<Tile>::kBytes;  // bytes in front of it
  static constexpr int kVectors = 2 * kX;
  static constexpr int kBytes = kVectors + 3 * Tile::kN * sizeof(float);
  static_assert(ColumnSums<Tile>::kFloats * sizeof(float) <= kX);
};
// Shared memory: the ring, then the epilogue in the same place; positions, and their rows in add;
// the columns' sums over all tiles, which would be registers too many.
template <class Tile, bool kPrologue>
struct ConvDgradMemory {
  static constexpr int kRing = Transposed<Tile, kPrologue>::kBytes;
  static constexpr int kEpilogue = DgradEpilogue<Tile>::kBytes;
  static constexpr int kPositions = kRing > kEpilogue ? kRing : kEpilogue;
  static constexpr int kAdded = kPositions + Tile::kM * sizeof(Position);
  static constexpr int kSums = kAdded + Tile::kM * sizeof(int);
  static constexpr int kBytes = kSums + 2 * Tile::kN * sizeof(float);
};

// The gradient that came by another way: of every pixel, or of those at even rows and columns.
template <class T>
struct Added {
  const T* gradient;  // nullptr if there is none
  int pitch;          // values from a pixel to the next
  bool compact;

  // Writes the rows that belong to the tile's positions, -1 where there is none.
  template <class Tile>
  __device__ __forceinline__ void put_rows(int* rows, int first, const ConvShape& s) const {
#pragma unroll 1
    for (int i = threadIdx.x; i < Tile::kM; i += Tile::kThreads) {
      int row = first + i;
      if (row >= s.rows) {
        row = -1;
      } else if (compact) {
        const int line = row / s.width, image = line / s.height;
        const int h = line - image * s.height, w = row - line * s.width;
        const int half_height = (s.height + 1) / 2, half_width = (s.width + 1) / 2;
        row = h % 2 + w % 2 > 0 ? -1 : (image * half_height + h / 2) * half_width + w / 2;
      }
      store_shared(rows + i, row);
    }
  }
};

// dx = transposed convolution of dy (+ add), 0 where relu(x * scale + shift) let nothing through,
// with
//     dy = scale * du + slope * (y - mean) + offset
// partial[row of blocks] = sum(dx), sum(dx * (x - mean)) of the positions that it had. Reads du and
// y (a 3x3 its neighbours again, out of the caches), the weight, add and x; writes dx, which may be
// add, and 2C floats a row of blocks. A block takes every gridDim.y-th tile of a column of
// channels. Without kPrologue du is dy; without y dy = scale * du. x is read for the ReLU and for
// the sums.
template <class Tile, bool kPrologue>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocks)
    conv_dgrad_kernel(const typename Tile::T* __restrict__ du,
                      const typename Tile::T* __restrict__ y, const float* __restrict__ y_stats,
                      const float* __restrict__ y_sums, const typename Tile::T* __restrict__ weight,
                      Added<typename Tile::T> add, const typename Tile::T* __restrict__ x,
                      const float* __restrict__ x_stats, bool relu, typename Tile::T* dx,
                      float* __restrict__ partial, ConvShape s) {
  using T = typename Tile::T;
  using Memory = ConvDgradMemory<Tile, kPrologue>;
  using Epilogue = DgradEpilogue<Tile>;
  unsigned char* const memory = dynamic_shared();
  int* const added = reinterpret_cast<int*>(memory + Memory::kAdded);
  float* const sums_of_columns = reinterpret_cast<float*>(memory + Memory::kSums);
  if (threadIdx.x < Tile::kN) {
    store_shared(sums_of_columns + threadIdx.x, 0.0f);
    store_shared(sums_of_columns + Tile::kN + threadIdx.x, 0.0f);
  }
#pragma unroll 1
  for (int first = blockIdx.y * Tile::kM; first < s.rows; first += gridDim.y * Tile::kM) {
    if (add.gradient != nullptr) add.template put_rows<Tile>(added, first, s);
    Accumulators<Tile> sums = {};
    convolve_transposed<Tile, kPrologue>(sums, memory,
                                         reinterpret_cast<Position*>(memory + Memory::kPositions),
                                         du, y, y_stats, y_sums, weight, first, s);

    const int channel = block_here() * Tile::kN;
    const int rows = s.rows - first, columns = s.filters - channel;
    const Stand<Tile> stand;
    const Staging<Tile> out{memory, stand.thread}, xs{memory + Epilogue::kX, stand.thread};
    float* const vectors = reinterpret_cast<float*>(memory + Epilogue::kVectors);
    const int64_t origin = static_cast<int64_t>(first) * s.filters + channel;
    if (add.gradient != nullptr) {
      out.for_each_chunk([&](int row, int column, unsigned char* at) {
        const int64_t of_add = load_shared(added + row);
        const bool there = of_add >= 0 && column < columns;
        copy_async(at, add.gradient + (there ? of_add * add.pitch + channel + column : 0), there);
      });
    }
    if (relu || partial != nullptr) {
      xs.for_each_chunk([&](int row, int column, unsigned char* at) {
        const bool there = row < rows && column < columns;
        copy_async(at, x + (there ? origin + static_cast<int64_t>(row) * s.filters + column : 0),
                   there);
      });
      constexpr int kParts = Tile::kN * sizeof(float) / kAccessBytes;
      if (stand.thread < 3 * kParts) {
        const int vector = stand.thread / kParts, column = stand.thread % kParts * 4;
        const int row = vector == 0 ? kScale : vector == 1 ? kShift : kMean;
        copy_async(vectors + stand.thread * 4,
                   x_stats + row * s.filters + (column < columns ? channel + column : 0),
                   column < columns);
      }
    }
    commit_copies();
    wait_copies<0>();
    sync_block();

    for_each_pair(Stand<Tile>(), sums, [&](int row, int column, float& a, float& b) {
      auto* const at = out.pair(row, column);
      if (add.gradient != nullptr) {
        const float2 more = pair_of_bits<T>(load_shared(at));
        a += more.x;
        b += more.y;
      }
      if (relu) {
        const auto scale = load_shared(reinterpret_cast<const float2*>(vectors + column));
        const auto shift =
            load_shared(reinterpret_cast<const float2*>(vectors + Tile::kN + column));
        const float2 raw = pair_of_bits<T>(load_shared(xs.pair(row, column)));
        // the activation as it was stored
        float z = affine(raw.x, scale.x, shift.x), z_of_b = affine(raw.y, scale.y, shift.y);
        round_pair<T>(z, z_of_b);
        a = behind_relu(z, a);
        b = behind_relu(z_of_b, b);
      }
      store_shared(at, bits_of_pair<T>(a, b));
    });
    sync_block();

    ColumnSums<Tile> column_sums(stand.thread);
    if (partial != nullptr) column_sums.load_mean(vectors + 2 * Tile::kN);
    out.for_each_chunk(rows, columns, [&](int row, int column, const unsigned char* at) {
      const auto some = load_chunk<T>(at);
      store(dx + origin + static_cast<int64_t>(row) * s.filters + column, some);
      if (partial != nullptr) column_sums.take(some, load_chunk<T>(at + Epilogue::kX));
    });
    if (partial == nullptr) continue;
    sync_block();
    auto* const of_warps = reinterpret_cast<float*>(memory);
    column_sums.put(of_warps, stand);
    sync_block();
    if (stand.thread < Tile::kN) ColumnSums<Tile>::add_to(sums_of_columns, of_warps, stand.thread);
  }
  const int column = threadIdx.x, channel = block_here() * Tile::kN + column;
  if (partial == nullptr || column >= Tile::kN || channel >= s.filters) return;
  float* const to = partial + static_cast<int64_t>(blockIdx.y) * 2 * s.filters + channel;
  store(to, Pack<float, 1>{load_shared(sums_of_columns + column)});
  store(to + s.filters, Pack<float, 1>{load_shared(sums_of_columns + Tile::kN + column)});
}

}  // namespace fusedres::cuda
