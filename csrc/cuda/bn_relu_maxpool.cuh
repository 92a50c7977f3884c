// relu(x * scale + shift) and the maximum over 3x3 windows, stride 2, padding 1, of an image in
// channels_last; and its backward, fused with the batch norm's. What is kept for the backward is
// the place of each maximum in its window, a byte.
#pragma once

#include "bn_act_backward.cuh"
#include "pool.cuh"

namespace fusedres::cuda {

constexpr uint8_t kNowhere = 9;  // the maximum is <= 0: no gradient flows

// The maximum of a window so far, by torch's rule: a NaN or something larger takes its place.
template <int W>
struct Maximum {
  float value[W];
  int place[W];
  __device__ __forceinline__ Maximum() {
#pragma unroll
    for (int i = 0; i < W; ++i) value[i] = -INFINITY, place[i] = 0;
  }
  __device__ __forceinline__ void take(int i, float other, int at) {
    if (other > value[i] || other != other) {
      value[i] = other;
      place[i] = at;
    }
  }
  // What another has taken in, its places counted from `first`.
  __device__ __forceinline__ void merge(int i, const Maximum& other, int first) {
    take(i, other.value[i], first + other.place[i]);
  }
};

// x -> z, index
template <class T, int W>
__global__ void __launch_bounds__(kThreads, kPoolBlocks)
    bn_relu_maxpool_kernel(const T* __restrict__ x, const float* __restrict__ stats,
                           T* __restrict__ z, uint8_t* __restrict__ index, PoolShape s) {
  const Place p = place<W>();
  if (p.channel >= s.channels) return;
  const auto scale = load_row<W>(stats, kScale, s.channels, p.channel);
  const auto shift = load_row<W>(stats, kShift, s.channels, p.channel);
  // maxima are those of the values as bn_act would store them
  const auto norm = [&](const Pack<float, W>& pixels) { return stored<T>(pixels, scale, shift); };
  for_each_window<Maximum<W>, T, W>(x, s, p, norm, [&](int64_t out, const Maximum<W>& best) {
    Pack<float, W> value;
    Pack<uint8_t, W> place;
#pragma unroll
    for (int i = 0; i < W; ++i) {
      const bool nothing = best.value[i] <= 0.0f;
      value.v[i] = nothing ? 0.0f : best.value[i];
      place.v[i] = static_cast<uint8_t>(nothing ? kNowhere : best.place[i]);
    }
    store(z + out, narrow<T>(value));
    store(index + out, place);
  });
}

// A window's gradient and the place that it goes to.
template <class T, int W>
struct Window {
  Pack<T, W> grad;
  Pack<uint8_t, W> index;

  __device__ __forceinline__ Window(const T* grads, const uint8_t* indices, const PoolShape& s,
                                    int row, int column) {
    if (row < s.out_height() && column < s.out_width()) {
      const int64_t at = pixel(row, column, s.out_width(), s);
      grad = load<W>(grads + at);
      index = load<W>(indices + at);
    } else {
      grad = narrow<T>(Pack<float, W>{});
#pragma unroll
      for (int i = 0; i < W; ++i) index.v[i] = kNowhere;
    }
  }
  // Adds to du what the pixel at `place` of the window gets.
  __device__ __forceinline__ void add(int place, Pack<float, W>& du) const {
    const auto wide = widen(grad);
#pragma unroll
    for (int i = 0; i < W; ++i) du.v[i] += index.v[i] == place ? wide.v[i] : 0.0f;
  }
};

// Walks over the pixels of a strip's output columns, two by two, and calls f(offset, du, x) for
// each; x is only loaded if it isn't null. Pixel (2i, 2j) lies in window (i, j) alone; one row
// further down it also lies in window row i + 1, one column further right in window column j + 1.
template <class T, int W, class F>
__device__ __forceinline__ void for_each_pixel(const T* grad, const uint8_t* index, const T* x,
                                               const PoolShape& s, const Strip& strip,
                                               int64_t channel, F f) {
  const int left = strip.column;
  grad += image(strip.n, s.out_height() * s.out_width(), s) + channel;
  index += image(strip.n, s.out_height() * s.out_width(), s) + channel;
  const int64_t begin = image(strip.n, s.height * s.width, s) + channel;
  using Win = Window<T, W>;
  Win here(grad, index, s, strip.top, left), right(grad, index, s, strip.top, left + 1);
#pragma unroll 1
  for (int y = strip.top; y < strip.bottom; ++y) {
    const auto has = [&](int k) { return 2 * y + k / 2 < s.height && 2 * left + k % 2 < s.width; };
    const auto at = [&](int k) {
      return begin + pixel(2 * y + k / 2, 2 * left + k % 2, s.width, s);
    };
    Pack<T, W> xs[4];
    if (x != nullptr) {
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        if (has(k)) xs[k] = load<W>(x + at(k));
      }
    }
    const Win below(grad, index, s, y + 1, left), across(grad, index, s, y + 1, left + 1);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      if (!has(k)) continue;
      Pack<float, W> du = {};
      here.add(4 + 3 * (k / 2) + k % 2, du);
      if (k % 2 == 1) right.add(k / 2 == 0 ? 3 : 6, du);
      if (k / 2 == 1) below.add(1 + k % 2, du);
      if (k == 3) across.add(0, du);
      f(at(k), du, xs[k]);
    }
    here = below;
    right = across;
  }
}

// partial[block] = sum(du), sum(du * (x - mean)): reads grad, index and x, writes 2C floats a block
template <class T, int W>
__global__ void __launch_bounds__(kThreads, kPoolBlocks)
    bn_relu_maxpool_partial_kernel(const T* __restrict__ grad, const uint8_t* __restrict__ index,
                                   const T* __restrict__ x, const float* __restrict__ stats,
                                   float* __restrict__ partial, PoolShape s) {
  const Place p = place<W>();
  float sums[2][W] = {};
  if (p.channel < s.channels) {
    const auto mean = load_row<W>(stats, kMean, s.channels, p.channel);
    const auto add = [&](int64_t, const Pack<float, W>& du, const Pack<T, W>& pixel) {
      const auto value = widen(pixel);
#pragma unroll
      for (int i = 0; i < W; ++i) {
        sums[0][i] += du.v[i];
        sums[1][i] = fmaf(du.v[i], value.v[i] - mean.v[i], sums[1][i]);
      }
    };
#pragma unroll 1
    for (int64_t at = p.row; at < s.places(); at += p.step) {
      for_each_pixel<T, W>(grad, index, x, s, Strip(s, static_cast<int>(at)), p.channel, add);
    }
  }
  float* out = partial + static_cast<int64_t>(blockIdx.y) * 2 * s.channels;
  sum_over_rows<W, 2>(sums, s.channels, [&](int k, int64_t c, float sum) {
    store(out + k * s.channels + c, Pack<float, 1>{sum});
  });
}

// grad, index, x -> dx
template <class T, int W>
__global__ void __launch_bounds__(kThreads, kPoolBlocks)
    bn_relu_maxpool_apply_kernel(const T* __restrict__ grad, const uint8_t* __restrict__ index,
                                 const T* __restrict__ x, const float* __restrict__ stats,
                                 const float* __restrict__ sums, T* __restrict__ dx, PoolShape s) {
  const Place p = place<W>();
  if (p.channel >= s.channels) return;
  const Gradient<W> of_x(stats, sums, s.channels, p.channel);
  const auto put = [&](int64_t offset, const Pack<float, W>& du, const Pack<T, W>& pixel) {
    store(dx + offset, narrow<T>(of_x(du, widen(pixel))));
  };
#pragma unroll 1
  for (int64_t at = p.row; at < s.places(); at += p.step) {
    for_each_pixel<T, W>(grad, index, x, s, Strip(s, static_cast<int>(at)), p.channel, put);
  }
}

// With fixed statistics: grad, index -> dx
template <class T, int W>
__global__ void __launch_bounds__(kThreads, kPoolBlocks)
    bn_relu_maxpool_fixed_kernel(const T* __restrict__ grad, const uint8_t* __restrict__ index,
                                 const float* __restrict__ stats, T* __restrict__ dx, PoolShape s) {
  const Place p = place<W>();
  if (p.channel >= s.channels) return;
  const auto scale = load_row<W>(stats, kScale, s.channels, p.channel);
  const auto put = [&](int64_t offset, Pack<float, W> du, const Pack<T, W>&) {
#pragma unroll
    for (int i = 0; i < W; ++i) du.v[i] *= scale.v[i];
    store(dx + offset, narrow<T>(du));
  };
  const T* x = nullptr;
#pragma unroll 1
  for (int64_t at = p.row; at < s.places(); at += p.step) {
    for_each_pixel<T, W>(grad, index, x, s, Strip(s, static_cast<int>(at)), p.channel, put);
  }
}

}  // namespace fusedres::cuda
