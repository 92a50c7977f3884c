// How a block lies on an activation, a row-major matrix [rows, channels] (channels_last): a thread
// keeps a column of W channels, so what belongs to a channel stays in its registers, and walks down
// the rows with several of them in flight.
#pragma once

#include "device.cuh"

namespace fusedres::cuda {

// Threads of a block. 32 columns of 16 bytes make a warp read 512 bytes of a row, and leave a wide
// matrix to several blocks, so that sums over its rows need few partial results.
constexpr int kThreads = 256;
constexpr int kColumns = 32;

// Of a kernel that puts the results of all blocks together.
constexpr int kFinalizeColumns = 32;
constexpr int kFinalizeRows = 8;
static_assert(kFinalizeColumns * kFinalizeRows <= kThreads);

// blockDim = (columns, rows), gridDim = (blocks of columns, blocks of rows).
struct Place {
  int64_t channel;  // the first of the thread's
  int64_t row, step;
};
template <int W>
__device__ __forceinline__ Place place() {
  return {(static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) * W,
          static_cast<int64_t>(blockIdx.y) * blockDim.y + threadIdx.y,
          static_cast<int64_t>(gridDim.y) * blockDim.y};
}

// Rows that a thread has in flight together; those past the end are left out.
struct Group {
  int64_t row, step, rows;
  __device__ __forceinline__ int64_t at(int k) const { return row + k * step; }
  __device__ __forceinline__ bool has(int k) const { return at(k) < rows; }
};

template <int R, class F>
__device__ __forceinline__ void for_each_group(const Place& p, int64_t rows, F f) {
#pragma unroll 1
  for (int64_t row = p.row; row < rows; row += R * p.step) f(Group{row, p.step, rows});
}

template <int W, int R, class T>
__device__ __forceinline__ void load_rows(Pack<T, W> (&packs)[R], const T* matrix, int64_t channels,
                                          const Place& p, const Group& group) {
#pragma unroll
  for (int k = 0; k < R; ++k) {
    if (group.has(k)) packs[k] = load<W>(matrix + group.at(k) * channels + p.channel);
  }
}

// Rows of `stats` and `sums`, see fusedres/kernels/rows.py.
enum StatsRow : int { kMean, kVar, kRstd, kScale, kShift };
enum SumsRow : int { kDbias, kDweight, kSlope, kOffset };

template <int W>
__device__ __forceinline__ Pack<float, W> load_row(const float* matrix, int row, int64_t channels,
                                                   int64_t channel) {
  return load<W>(matrix + row * channels + channel);
}

// What a batch norm does to a value; forward and backward must round alike.
__device__ __forceinline__ float affine(float x, float scale, float shift) {
  return fmaf(x, scale, shift);
}

// Threads of a block counted along its columns.
__device__ __forceinline__ int thread() { return threadIdx.y * blockDim.x + threadIdx.x; }
__device__ __forceinline__ int threads() { return blockDim.x * blockDim.y; }

// Puts the block's rows of threads together, half of them into the other half until one is left:
// calls take(thread) for the one to take in. Before, every thread has stored what it has where
// others find it; take stores again what its thread then has.
template <class Take>
__device__ __forceinline__ void merge_rows(Take take) {
  for (int rows = blockDim.y; rows > 1;) {
    const int half = (rows + 1) / 2;
    sync_block();
    if (static_cast<int>(threadIdx.y) < rows - half) take(thread() + half * blockDim.x);
    rows = half;
  }
}

// Adds up each of K quantities over the rows of the block, in a fixed order, and calls
// put(k, channel, sum) for the block's channels. Every thread of the block has to come.
template <int W, int K, class Put>
__device__ __forceinline__ void sum_over_rows(float (&mine)[K][W], int64_t channels, Put put) {
  float* all = shared_array<float, kThreads * W>();
  const int64_t channel = place<W>().channel;
#pragma unroll
  for (int k = 0; k < K; ++k) {
    if (k > 0) sync_block();
    const auto tell = [&] {
#pragma unroll
      for (int i = 0; i < W; ++i) store_shared(all + i * kThreads + thread(), mine[k][i]);
    };
    tell();
    merge_rows([&](int other) {
#pragma unroll
      for (int i = 0; i < W; ++i) mine[k][i] += load_shared(all + i * kThreads + other);
      tell();
    });
    if (threadIdx.y > 0 || channel >= channels) continue;
#pragma unroll
    for (int i = 0; i < W; ++i) put(k, channel + i, mine[k][i]);
  }
}

}  // namespace fusedres::cuda
