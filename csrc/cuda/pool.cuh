// How a max pool of 3x3, stride 2 and padding 1 walks an image in channels_last.
//
// A thread keeps a column of channels and walks down a strip of rows, so that what two windows
// share is loaded once.
#pragma once

#include "rows.cuh"

namespace fusedres::cuda {

constexpr int kStrip = 8;  // rows of the output
constexpr int kPoolBlocks = 2;

// Pixels of an image and places of a batch are counted in 32 bits, offsets in 64.
struct PoolShape {
  int n, height, width;
  int64_t channels;
  __host__ __device__ int out_height() const { return (height - 1) / 2 + 1; }
  __host__ __device__ int out_width() const { return (width - 1) / 2 + 1; }
  __host__ __device__ int strips() const { return (out_height() + kStrip - 1) / kStrip; }
  // Strips of one output column each: the rows of the matrix that a grid lies on.
  __host__ __device__ int places() const { return n * strips() * out_width(); }
};

// One strip: of image n, output rows [top, bottom), output column `column`.
struct Strip {
  int n, top, bottom, column;
  __device__ __forceinline__ Strip(const PoolShape& s, int place) {
    column = place % s.out_width();
    place /= s.out_width();
    top = place % s.strips() * kStrip;
    n = place / s.strips();
    bottom = top + kStrip < s.out_height() ? top + kStrip : s.out_height();
  }
};

// Where the image n begins that has so many pixels, and a pixel in it.
__device__ __forceinline__ int64_t image(int n, int pixels, const PoolShape& s) {
  return static_cast<int64_t>(n) * pixels * s.channels;
}
__device__ __forceinline__ int64_t pixel(int row, int column, int width, const PoolShape& s) {
  return static_cast<int64_t>(row * width + column) * s.channels;
}

// Takes into best the three pixels of a window that lie in one row of the image, as of(pixels)
// makes them; the first of them is `first` of the window.
template <class T, int W, class Best, class Of>
__device__ __forceinline__ void take_row(Best& best, int first, const T* x, const PoolShape& s,
                                         int row, int column, const Of& of) {
  if (row < 0 || row >= s.height) return;
  Pack<T, W> pixels[3];
#pragma unroll
  for (int k = 0; k < 3; ++k) {
    const int at = 2 * column - 1 + k;
    if (at >= 0 && at < s.width) pixels[k] = load<W>(x + pixel(row, at, s.width, s));
  }
#pragma unroll
  for (int k = 0; k < 3; ++k) {
    const int at = 2 * column - 1 + k;
    if (at < 0 || at >= s.width) continue;
    const auto u = of(widen(pixels[k]));
#pragma unroll
    for (int i = 0; i < W; ++i) best.take(i, u.v[i], first + k);
  }
}

// Goes over the windows of the thread's strips and calls put(offset, best) with what a Best has
// taken in of each, offset that of its value; x is read once, but for a strip's top.
template <class Best, class T, int W, class Of, class Put>
__device__ __forceinline__ void for_each_window(const T* x, const PoolShape& s, const Place& p,
                                                const Of& of, const Put& put) {
#pragma unroll 1
  for (int64_t at = p.row; at < s.places(); at += p.step) {
    const Strip strip(s, static_cast<int>(at));
    const T* from = x + image(strip.n, s.height * s.width, s) + p.channel;
    const int64_t to = image(strip.n, s.out_height() * s.out_width(), s) + p.channel;
    // of the row of pixels that a window shares with the one below it
    Best shared;
    take_row<T, W>(shared, 0, from, s, 2 * strip.top - 1, strip.column, of);
#pragma unroll 1
    for (int y = strip.top; y < strip.bottom; ++y) {
      Best best = shared;
      take_row<T, W>(best, 3, from, s, 2 * y, strip.column, of);
      shared = Best();
      take_row<T, W>(shared, 0, from, s, 2 * y + 1, strip.column, of);
#pragma unroll
      for (int i = 0; i < W; ++i) best.merge(i, shared, 6);
      put(to + pixel(y, strip.column, s.out_width(), s), best);
    }
  }
}

}  // namespace fusedres::cuda
