#include "bias_relu_maxpool.cuh"
#include "pool_launch.cuh"

namespace fusedres::cuda {

void bias_relu_maxpool(DType dtype, Image i, const void* x, const float* bias, void* z,
                       Device device) {
  const PoolShape s = pool_shape("bias_relu_maxpool", i);
  with_type_and_width(dtype, i.channels, {x, bias, z}, [&](auto* type, auto width) {
    using T = std::remove_pointer_t<decltype(type)>;
    launch("bias_relu_maxpool", image(i), over_strips(s, width, device.multiprocessors),
           device.stream, bias_relu_maxpool_kernel<T, width.value>, static_cast<const T*>(x), bias,
           static_cast<T*>(z), s);
  });
}

}  // namespace fusedres::cuda
