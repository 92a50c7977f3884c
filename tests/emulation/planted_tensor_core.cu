// Products of a warp by tensor_core.cuh, and the same with one fault each.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <stdexcept>
#include <string>

#include "launch.cuh"
#include "tensor_core.cuh"

namespace py = pybind11;

namespace fusedres {
namespace planted {

using namespace cuda;

constexpr int kRows = 16, kColumns = 16, kBytes = 64;  // of the reduction: two steps
template <class T>
constexpr int kDepth = kBytes / sizeof(T);

enum class Fault {
  none,
  no_wait,
  no_barrier,
  overwritten,
  half_a_warp,
  misaligned,
  out_of_bounds,
  never_awaited,
  in_a_row
};

// Where a chunk lies: swizzled, or with all rows' chunks of a column in the same banks.
template <Fault fault>
__device__ int at(int row, int chunk) {
  return fault == Fault::in_a_row ? row * 128 + chunk * kAccessBytes
                                  : Swizzled<kBytes>::at(row, chunk);
}

// out [16, 16] = a [16, depth] b^T, b [16, depth] or, with kTransposed, b [depth, 16] (16 bits)
template <class T, bool kTransposed, Fault fault>
__global__ void product(const T* a, const T* b, float* out) {
  constexpr int kTile = kRows * (fault == Fault::in_a_row ? 128 : kBytes);
  unsigned char* const tile_a = dynamic_shared();
  unsigned char* const tile_b = tile_a + kTile;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  for (int i = threadIdx.x; i < kRows * 4; i += blockDim.x) {
    copy_async(tile_a + at<fault>(i / 4, i % 4), a + i * kAccessBytes / sizeof(T), true);
    // transposed: 32 rows of two chunks
    const int row = kTransposed ? i / 2 : i / 4, chunk = kTransposed ? i % 2 : i % 4;
    const int to = kTransposed ? row * kBytes / 2 + (chunk ^ (row / 4 % 2)) * kAccessBytes
                               : at<fault>(row, chunk);
    copy_async(tile_b + to, b + i * kAccessBytes / sizeof(T), true);
  }
  if (fault == Fault::never_awaited) return;
  commit_copies();
  if (fault != Fault::no_wait) wait_copies<0>();
  if (fault != Fault::no_barrier) sync_block();
  if (fault == Fault::half_a_warp && lane < 16) return;

  float c[2][4] = {};
  for (int step = 0; step < 2; ++step) {
    uint32_t ra[4], rb[4];
    const int row = lane % 16, chunk = 2 * step + lane / 16;
    const int off = fault == Fault::misaligned ? 4 : fault == Fault::out_of_bounds ? 1 << 20 : 0;
    load_matrices(ra, tile_a + at<fault>(row, chunk) + off);
    if constexpr (kTransposed) {
      const int k = 16 * step + lane % 16, half = lane / 16;
      load_matrices_transposed(rb, tile_b + k * kBytes / 2 + (half ^ (k / 4 % 2)) * kAccessBytes);
    } else {
      // columns 0 to 7 of both halves of the step, then 8 to 15
      const int column = lane % 8 + lane / 16 * 8;
      load_matrices(rb, tile_b + at<fault>(column, 2 * step + lane / 8 % 2));
    }
    if constexpr (sizeof(T) == 4) {
      for (uint32_t& r : ra) r = tf32(r);
      for (uint32_t& r : rb) r = tf32(r);
    }
    for (int half = 0; half < 2; ++half) {
      const uint32_t columns[2] = {rb[2 * half], rb[2 * half + 1]};
      mma<T>(c[half], ra, columns);
    }
    if (fault == Fault::overwritten && step == 0 && warp == 1) {
      copy_async(tile_a + at<fault>(lane % 16, lane / 16), a, true);
      commit_copies();
      wait_copies<0>();
    }
  }
  if (warp > 0) return;
  for (int half = 0; half < 2; ++half) {
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + i / 2 * 8, column = half * 8 + lane % 4 * 2 + i % 2;
      store(out + row * kColumns + column, Pack<float, 1>{{c[half][i]}});
    }
  }
}

template <class T, bool kTransposed, Fault fault>
void run(uintptr_t a, uintptr_t b, uintptr_t out) {
  const Grid g{dim3(1), dim3(2 * kWarp), 4 * 1024 + 1024};
  launch("product", "a warp", g, nullptr, product<T, kTransposed, fault>,
         reinterpret_cast<const T*>(a), reinterpret_cast<const T*>(b),
         reinterpret_cast<float*>(out));
}

}  // namespace planted

void bind_cuda(py::module_& m) {
  using namespace planted;
  using bf16 = __nv_bfloat16;
  const std::map<std::string, void (*)(uintptr_t, uintptr_t, uintptr_t)> all = {
      {"float32", run<float, false, Fault::none>},
      {"bfloat16", run<bf16, false, Fault::none>},
      {"float16", run<__half, false, Fault::none>},
      {"bfloat16 transposed", run<bf16, true, Fault::none>},
      {"float16 transposed", run<__half, true, Fault::none>},
      {"no wait", run<bf16, false, Fault::no_wait>},
      {"no barrier", run<bf16, false, Fault::no_barrier>},
      {"overwritten", run<bf16, false, Fault::overwritten>},
      {"half a warp", run<bf16, false, Fault::half_a_warp>},
      {"misaligned", run<bf16, false, Fault::misaligned>},
      {"out of bounds", run<bf16, false, Fault::out_of_bounds>},
      {"never awaited", run<bf16, false, Fault::never_awaited>},
      {"in a row", run<bf16, false, Fault::in_a_row>},
  };
  m.def("product", [all](const std::string& name, uintptr_t a, uintptr_t b, uintptr_t out) {
    all.at(name)(a, b, out);
  });
}

}  // namespace fusedres
