// Many float32 weights in 16 bits and channels_last, in one launch: a block looks up in a table,
// which is a parameter of the kernel, which part of which weight is its own.
#pragma once

#include "rows.cuh"

namespace fusedres::cuda {

constexpr int kCastValues = 8;  // of a thread: 32 bytes in, 16 bytes out
constexpr int kCastOfBlock = kThreads * kCastValues;

// A weight [outer, inner, taps] becomes [outer, taps, inner]; blocks from `first_block` on are its.
struct CastEntry {
  const float* weight;
  void* cast;
  int64_t values, inner, taps;
  int64_t first_block;
  bool in_order;  // taps = 1, and both addresses are multiples of 16 bytes
};
template <int N>
struct CastTable {
  int number;
  CastEntry entries[N];
};

template <class T, int N>
__global__ void __launch_bounds__(kThreads)
    cast_weights_kernel(const __grid_constant__ CastTable<N> table) {
  int at = 0, end = table.number;  // the last entry that begins at or before this block
  while (end - at > 1) {
    const int middle = (at + end) / 2;
    (table.entries[middle].first_block <= blockIdx.x ? at : end) = middle;
  }
  const CastEntry& e = table.entries[at];
  T* cast = static_cast<T*>(e.cast);
  const int64_t begin = (blockIdx.x - e.first_block) * kCastOfBlock;
  const int64_t mine = begin + threadIdx.x * kCastValues;
  if (e.in_order) {
    if (mine + kCastValues <= e.values) {
      store(cast + mine, narrow<T>(load<kCastValues>(e.weight + mine)));
    } else {
      for (int64_t i = mine; i < e.values; ++i) store(cast + i, narrow<T>(load(e.weight + i)));
    }
    return;
  }
  // neighbouring threads write neighbouring values
  const int64_t left = e.values - begin < kCastOfBlock ? e.values - begin : kCastOfBlock;
  for (int64_t i = begin + threadIdx.x; i < begin + left; i += kThreads) {
    const int64_t inner = i % e.inner, tap = i / e.inner % e.taps, outer = i / e.inner / e.taps;
    store(cast + i, narrow<T>(load(e.weight + (outer * e.inner + inner) * e.taps + tap)));
  }
}

}  // namespace fusedres::cuda
