// From a problem to a launch: grid and block from sizes and the device, the kernel for a dtype, and
// an error that says what was not launched.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "device.cuh"
#include "ops.h"
#include "rows.cuh"

namespace fusedres::cuda {

struct Grid {
  dim3 grid, block;
  int shared_bytes = 0;  // dynamic shared memory of a block
};

// Runs kernel(arguments...) on a grid; `problem` is what the error says of it.
template <class... Parameters, class... Arguments>
void launch(const char* name, const std::string& problem, const Grid& g, void* stream,
            void (*kernel)(Parameters...), Arguments... arguments) {
#if defined(__CUDACC__)
  constexpr int kFree = 48 * 1024;  // shared memory that a kernel gets without asking
  cudaError_t error = cudaSuccess;
  if (g.shared_bytes > kFree) {
    error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, g.shared_bytes);
  }
  if (error == cudaSuccess) {
    kernel<<<g.grid, g.block, g.shared_bytes, static_cast<cudaStream_t>(stream)>>>(arguments...);
  }
  if (const cudaError_t last = cudaGetLastError(); error == cudaSuccess) error = last;
  const char* reason = error == cudaSuccess ? nullptr : cudaGetErrorString(error);
#else
  static_cast<void>(stream);
  const char* reason =
      emulation::launch(g.grid, g.block, g.shared_bytes, [&] { kernel(arguments...); });
#endif
  if (reason != nullptr) {
    throw std::runtime_error(std::string(name) + " of " + problem + " was not launched: " + reason);
  }
}

inline std::string matrix(int64_t rows, int64_t channels) {
  return "[" + std::to_string(rows) + ", " + std::to_string(channels) + "]";
}

inline std::string image(const Image& i) {
  return "[" + std::to_string(i.n) + ", " + std::to_string(i.channels) + ", " +
         std::to_string(i.height) + ", " + std::to_string(i.width) + "]";
}

template <class T>
constexpr int kWidth = kAccessBytes / sizeof(T);

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

constexpr int64_t kMostRowBlocks = 65535;  // of gridDim.y

// Blocks over `rows` rows of `columns` columns, `in_flight` rows a thread at a time: enough to keep
// every multiprocessor busy; a block walks over the rows that are left.
inline Grid over_rows(int64_t rows, int64_t columns, int in_flight, int blocks_per_multiprocessor,
                      int multiprocessors) {
  const int64_t x = std::min<int64_t>(columns, kColumns);
  const int64_t y = kThreads / x;
  const int64_t across = divide_up(columns, x);
  const int64_t busy = int64_t{multiprocessors} * blocks_per_multiprocessor / across;
  const int64_t down =
      std::min({divide_up(rows, y * in_flight), std::max<int64_t>(busy, 1), kMostRowBlocks});
  return {dim3(static_cast<unsigned>(across), static_cast<unsigned>(down)),
          dim3(static_cast<unsigned>(x), static_cast<unsigned>(y))};
}

// The most row blocks that over_rows gives such a matrix, whatever a kernel has in flight; a kernel
// that sums has at most so many blocks on a multiprocessor.
constexpr int kMostBlocks = 3;
inline int64_t most_row_blocks(DType dtype, int64_t rows, int64_t channels, int multiprocessors) {
  const int64_t width = kAccessBytes / (dtype == DType::float32 ? 4 : 2);
  unsigned most = 0;
  for (const int64_t columns : {channels, divide_up(channels, width)}) {
    most = std::max(most, over_rows(rows, columns, 1, kMostBlocks, multiprocessors).grid.y);
  }
  return most;
}

// A thread for every channel.
inline Grid over_channels(int64_t channels) {
  return {dim3(static_cast<unsigned>(divide_up(channels, kThreads))), dim3(kThreads)};
}

// kFinalizeRows threads for every channel.
inline Grid over_partial_results(int64_t channels) {
  return {dim3(static_cast<unsigned>(divide_up(channels, kFinalizeColumns))),
          dim3(kFinalizeColumns, kFinalizeRows)};
}

// Blocks that a device holds at a time if its multiprocessors hold as many as the tile is meant
// for; workspaces are for so many.
template <class Tile>
int64_t most_together(int multiprocessors) {
  return int64_t{multiprocessors} * Tile::kBlocks;
}

constexpr int kReservedBytes = 1024;     // shared memory that a block takes beside what it asks for
constexpr int kMeantBytes = 228 * 1024;  // of a multiprocessor of 9.0 and 10.0

template <class Tile, int kBytes>
constexpr bool fits = Tile::kBlocks * (kBytes + kReservedBytes) <= kMeantBytes;

// Likewise, of the current device, for blocks of kBytes: where a multiprocessor has 164 KB (8.0) or
// 100 KB (8.6, 8.9, 12.0) there may be fewer than are meant to be.
template <class Tile, int kBytes>
int64_t together(int multiprocessors) {
  static_assert(fits<Tile, kBytes>);
  int64_t blocks = Tile::kBlocks;
#if defined(__CUDACC__)
  int device = 0, bytes = 0;
  if (cudaGetDevice(&device) == cudaSuccess &&
      cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device) ==
          cudaSuccess) {
    blocks = std::clamp<int64_t>(bytes / (kBytes + kReservedBytes), 1, blocks);
  }
#endif
  return multiprocessors * blocks;
}

// Calls f with a null pointer of the activation's type.
template <class F>
void with_type(DType dtype, F f) {
  switch (dtype) {
    case DType::float32:
      return f(static_cast<float*>(nullptr));
    case DType::bfloat16:
      return f(static_cast<__nv_bfloat16*>(nullptr));
    case DType::float16:
      return f(static_cast<__half*>(nullptr));
  }
}

// Calls f with how many values a thread takes at a time: 16 bytes where the channels can be divided
// so and every tensor begins at a multiple of it, else 1.
template <class T, class F>
void with_width(int64_t channels, std::initializer_list<const void*> tensors, F f) {
  bool wide = channels % kWidth<T> == 0;
  for (const void* tensor : tensors) {
    wide = wide && reinterpret_cast<uintptr_t>(tensor) % kAccessBytes == 0;
  }
  wide ? f(std::integral_constant<int, kWidth<T>>{}) : f(std::integral_constant<int, 1>{});
}

// Calls f with a flag as a compile-time constant.
template <class F>
void with_flag(bool flag, F f) {
  flag ? f(std::true_type{}) : f(std::false_type{});
}

// Calls f(type, width).
template <class F>
void with_type_and_width(DType dtype, int64_t channels, std::initializer_list<const void*> tensors,
                         F f) {
  with_type(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    with_width<T>(channels, tensors, [&](auto width) { f(type, width); });
  });
}

}  // namespace fusedres::cuda
