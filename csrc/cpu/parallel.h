// Splits work into chunks whose number and order don't depend on the number of threads, so that
// sums over them don't either.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <type_traits>

#include "kernels.h"
#include "vec.h"

namespace fusedres::cpu::FUSEDRES_ISA {

// Activations of one chunk: large against a chunk's partial sums, small against a tensor.
constexpr int64_t kChunkValues = 128 * 1024;
// Rows of one chunk: float32 sums run over so many, chunks are added in double.
constexpr int64_t kLeastRows = 64, kMostRows = 512;

struct Chunks {
  int64_t total, size, number;

  // Of the rows of a channels_last activation.
  static Chunks of_rows(const Shape& s) { return of_bundles(s.count(), 1, s.c); }
  // Of `total` bundles of rows.
  static Chunks of_bundles(int64_t total, int64_t rows, int64_t channels) {
    const int64_t wanted = kChunkValues / channels / kLeastRows * kLeastRows;
    const int64_t most = wanted < kLeastRows ? kLeastRows : wanted > kMostRows ? kMostRows : wanted;
    const int64_t size = most < rows ? 1 : most / rows;
    return {total, size, (total + size - 1) / size};
  }
  int64_t begin(int64_t chunk) const { return chunk * size; }
  int64_t end(int64_t chunk) const { return chunk + 1 < number ? (chunk + 1) * size : total; }
};

template <class F>
inline void parallel_for(int64_t n, int threads, const F& f) {
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1 && n > 1)
  for (int64_t i = 0; i < n; ++i) f(i);
}

// Memory without an initial value, aligned for any vector; throws std::bad_alloc.
struct Free {
  void operator()(void* p) const { std::free(p); }
};
template <class T>
using Buffer = std::unique_ptr<T[], Free>;
template <class T>
inline Buffer<T> buffer(int64_t n) {
  const size_t lines = static_cast<size_t>(n) * sizeof(T) / 64 + 1;
  auto* p = static_cast<T*>(std::aligned_alloc(64, 64 * lines));
  if (p == nullptr) throw std::bad_alloc();
  return Buffer<T>(p);
}

// Calls f with a null pointer of the activation's type.
template <class F>
inline void with_type(DType dtype, F f) {
  switch (dtype) {
    case DType::float32:
      return f(static_cast<float*>(nullptr));
    case DType::bfloat16:
      return f(static_cast<BFloat16*>(nullptr));
    case DType::float16:
      return f(static_cast<Half*>(nullptr));
  }
}

// Calls f with a flag as a compile-time constant.
struct Yes {
  static constexpr bool value = true;
};
struct No {
  static constexpr bool value = false;
};
template <class F>
inline void with_flag(bool flag, F f) {
  flag ? f(Yes{}) : f(No{});
}

// Calls f(row, Rows) over rows [begin, end) in groups of R, the rest one by one; Rows::value is a
// compile-time constant.
template <int R>
struct Rows {
  static constexpr int value = R;
};
template <int R, class F>
inline void for_each_group(int64_t begin, int64_t end, F f) {
  int64_t row = begin;
  for (; row + R <= end; row += R) f(row, Rows<R>{});
  for (; row < end; ++row) f(row, Rows<1>{});
}

// The same for kernels that may take the rows as they come: a group shares the loads of per-channel
// vectors, but walks several rows at a time, which the prefetcher follows only while they are
// short.
template <class F>
inline void for_each_rows(int64_t channels, int64_t begin, int64_t end, F f) {
  if (channels <= 128) {
    for_each_group<4>(begin, end, f);
  } else {
    for_each_group<1>(begin, end, f);
  }
}

// Elementwise work on an activation in either layout. f(c, at, each) loads what it needs of its
// channels (load(v + c, at) of a v [C]) and calls each(g), which calls g(i, lanes) for vectors of
// their values, at offset i.
template <class F>
inline void for_each_value(const Shape& s, int threads, const F& f) {
  if (s.planes) {
    parallel_for(s.n * s.c, threads, [=](int64_t plane) {
      f(plane % s.c, One{}, [=](auto g) {
        for_each_vector(s.hw, [&](int64_t i, auto lanes) { g(plane * s.hw + i, lanes); });
      });
    });
    return;
  }
  const Chunks chunks = Chunks::of_rows(s);
  parallel_for(chunks.number, threads, [=](int64_t chunk) {
    for_each_rows(s.c, chunks.begin(chunk), chunks.end(chunk), [=](int64_t row, auto rows) {
      for_each_vector(s.c, [&](int64_t c, auto lanes) {
        f(c, lanes, [=](auto g) {
          for (int r = 0; r < rows.value; ++r) g((row + r) * s.c + c, lanes);
        });
      });
    });
  });
}

}  // namespace fusedres::cpu::FUSEDRES_ISA
