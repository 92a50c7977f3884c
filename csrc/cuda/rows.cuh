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
enum SumsRow : int { kDbias, kDweight };

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

// Adds up each of K quantities over the rows of the block, in their order, and calls
// put(k, channel, sum) for the block's channels. Every thread of the block has to come.
template <int W, int K, class Put>
__device__ __forceinline__ void sum_over_rows(const float (&mine)[K][W], int64_t channels,
                                              Put put) {
  float* all = shared_array<float, kThreads * W>();
  const int width = blockDim.x * W;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * width;
#pragma unroll
  for (int k = 0; k < K; ++k) {
    if (k > 0) sync_block();
#pragma unroll
    for (int i = 0; i < W; ++i) store_shared(all + thread() * W + i, mine[k][i]);
    sync_block();
    for (int c = thread(); c < width && first + c < channels; c += threads()) {
      float sum = 0.0f;
      for (int y = 0; y < static_cast<int>(blockDim.y); ++y) {
        sum += load_shared(all + y * width + c);
      }
      put(k, first + c, sum);
    }
  }
}

}  // namespace fusedres::cuda
