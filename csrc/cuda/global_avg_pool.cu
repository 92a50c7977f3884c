#include "global_avg_pool.cuh"
#include "launch.cuh"

namespace fusedres::cuda {
namespace {

// Calls f(image number, how many) for as many images at a time as a grid can have.
template <class F>
void in_batches(int64_t n, F f) {
  for (int64_t first = 0; first < n; first += kMostRowBlocks) {
    f(first, std::min(n - first, kMostRowBlocks));
  }
}

// A block of rows for every image.
Grid over_images(int64_t n, int64_t columns) {
  const int64_t x = std::min<int64_t>(columns, kColumns);
  return {dim3(static_cast<unsigned>(divide_up(columns, x)), static_cast<unsigned>(n)),
          dim3(static_cast<unsigned>(x), static_cast<unsigned>(kThreads / x))};
}

}  // namespace

void global_avg_pool(DType dtype, Image i, const void* x, void* out, Device device) {
  const int64_t pixels = i.height * i.width;
  with_type_and_width(dtype, i.channels, {x, out}, [&](auto* type, auto width) {
    using T = std::remove_pointer_t<decltype(type)>;
    in_batches(i.n, [&](int64_t first, int64_t n) {
      launch("global_avg_pool", image(i), over_images(n, i.channels / width), device.stream,
             global_avg_pool_kernel<T, width.value>,
             static_cast<const T*>(x) + first * pixels * i.channels,
             static_cast<T*>(out) + first * i.channels, pixels, i.channels);
    });
  });
}

void global_avg_pool_backward(DType dtype, Image i, const void* grad, void* dx, Device device) {
  const int64_t pixels = i.height * i.width;
  with_type_and_width(dtype, i.channels, {grad, dx}, [&](auto* type, auto width) {
    using T = std::remove_pointer_t<decltype(type)>;
    in_batches(i.n, [&](int64_t first, int64_t n) {
      launch("global_avg_pool_backward", image(i), over_images(n, i.channels / width),
             device.stream, global_avg_pool_backward_kernel<T, width.value>,
             static_cast<const T*>(grad) + first * i.channels,
             static_cast<T*>(dx) + first * pixels * i.channels, pixels, i.channels);
    });
  });
}

}  // namespace fusedres::cuda
