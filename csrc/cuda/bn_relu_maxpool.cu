#include "bn_relu_maxpool.cuh"
#include "pool_launch.cuh"

namespace fusedres::cuda {
namespace {

PoolShape pool(const Image& i) { return pool_shape("bn_relu_maxpool", i); }

}  // namespace

int64_t bn_relu_maxpool_workspace(DType dtype, Image i, int multiprocessors) {
  return bn_workspace(dtype, pool(i).places(), i.channels, 2, multiprocessors);
}

void bn_relu_maxpool(DType dtype, Image i, const void* x, const float* stats, void* z,
                     uint8_t* index, Device device) {
  with_type_and_width(dtype, i.channels, {x, stats, z, index}, [&](auto* type, auto width) {
    using T = std::remove_pointer_t<decltype(type)>;
    launch("bn_relu_maxpool", image(i), over_strips(pool(i), width, device.multiprocessors),
           device.stream, bn_relu_maxpool_kernel<T, width.value>, static_cast<const T*>(x), stats,
           static_cast<T*>(z), index, pool(i));
  });
}

void bn_relu_maxpool_backward_reduce(DType dtype, Image i, const void* grad, const uint8_t* index,
                                     const void* x, const float* stats, float* workspace,
                                     float* sums, Device device) {
  with_type_and_width(dtype, i.channels, {grad, index, x, stats}, [&](auto* type, auto width) {
    using T = std::remove_pointer_t<decltype(type)>;
    const Grid g = over_strips(pool(i), width, device.multiprocessors);
    launch("bn_relu_maxpool_backward_reduce", image(i), g, device.stream,
           bn_relu_maxpool_partial_kernel<T, width.value>, static_cast<const T*>(grad), index,
           static_cast<const T*>(x), stats, workspace, pool(i));
    launch("bn_relu_maxpool_backward_reduce (finalize)", image(i), over_partial_results(i.channels),
           device.stream, bn_act_backward_finalize_kernel<2>, workspace, stats, nullptr, sums,
           nullptr, i.n * i.height * i.width, static_cast<int>(g.grid.y), i.channels);
  });
}

void bn_relu_maxpool_backward_apply(DType dtype, Image i, const void* grad, const uint8_t* index,
                                    const void* x, const float* stats, const float* sums, void* dx,
                                    Device device) {
  with_type_and_width(
      dtype, i.channels, {grad, index, x, stats, sums, dx}, [&](auto* type, auto width) {
        using T = std::remove_pointer_t<decltype(type)>;
        const Grid g = over_strips(pool(i), width, device.multiprocessors);
        if (sums == nullptr) {
          launch("bn_relu_maxpool_backward_apply (fixed statistics)", image(i), g, device.stream,
                 bn_relu_maxpool_fixed_kernel<T, width.value>, static_cast<const T*>(grad), index,
                 stats, static_cast<T*>(dx), pool(i));
        } else {
          launch("bn_relu_maxpool_backward_apply", image(i), g, device.stream,
                 bn_relu_maxpool_apply_kernel<T, width.value>, static_cast<const T*>(grad), index,
                 static_cast<const T*>(x), stats, sums, static_cast<T*>(dx), pool(i));
        }
      });
}

}  // namespace fusedres::cuda
