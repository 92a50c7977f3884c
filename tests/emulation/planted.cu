// Kernels with one fault each, and right ones beside them: what the emulation must and must not
// find. All take in, out and n.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <map>
#include <stdexcept>
#include <string>

#include "device.cuh"

namespace py = pybind11;

namespace fusedres {
namespace planted {

using namespace cuda;

constexpr unsigned kAll = 0xffffffffu;
constexpr int kThreads = 64;

__device__ int thread() { return static_cast<int>(threadIdx.x); }
__device__ int global_thread() { return static_cast<int>(blockIdx.x * blockDim.x) + thread(); }
__device__ float at(const float* p) { return load(p).v[0]; }
__device__ void put(float* p, float v) { store(p, Pack<float, 1>{{v}}); }

// ---- right

// n packs of 4
__global__ void copy(const float* in, float* out, int n) {
  const int step = static_cast<int>(gridDim.x * blockDim.x);
  for (int i = global_thread(); i < n; i += step) store(out + 4 * i, load<4>(in + 4 * i));
}

// out[block] = the sum of n values of a block of kThreads, one after another
template <bool kBarrier, bool kBarrierBeforeReuse>
__global__ void block_sum(const float* in, float* out, int n) {
  float* sums = shared_array<float, kThreads>();
  float total = 0.0f;
  for (int i = 0; i < n; ++i) {
    store_shared(sums + thread(), at(in + (blockIdx.x * n + i) * kThreads + thread()));
    sync_block();
    for (int half = kThreads / 2; half > 0; half /= 2) {
      if (thread() < half) {
        const float other = load_shared(sums + thread() + half);
        store_shared(sums + thread(), load_shared(sums + thread()) + other);
      }
      if (kBarrier || half > kThreads / 8) sync_block();
    }
    total += load_shared(sums);
    if (kBarrierBeforeReuse) sync_block();
  }
  if (thread() == 0) put(out + blockIdx.x, total);
}

// out[i] = in[the same warp's lane 31 - lane]
template <bool kBarrier>
__global__ void warp_reverse(const float* in, float* out, int) {
  float* values = shared_array<float, kThreads>();
  store_shared(values + thread(), at(in + thread()));
  if (kBarrier) __syncwarp();
  put(out + thread(), load_shared(values + (thread() ^ 31)));
}

// eight results of a warp, one after another
__global__ void warp_calls(const float* in, float* out, int) {
  const float x = at(in + thread());
  float sum = x;
  for (int lanes = 16; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(kAll, sum, lanes);
  float down = x;
  for (int by = 16; by > 0; by /= 2) down += __shfl_down_sync(kAll, down, by);
  const unsigned odd = __ballot_sync(kAll, thread() & 1);
  const double wide = __shfl_sync(kAll, static_cast<double>(x), thread() + 1, 8);
  float even = 0.0f;
  if (thread() % 2 == 0) even = __shfl_sync(0x55555555u, x, 2);
  const float results[] = {
      sum,
      down,
      static_cast<float>(odd == 0xaaaaaaaau),
      static_cast<float>(wide),
      __shfl_up_sync(kAll, x, 3, 16),
      __shfl_xor_sync(kAll, x, 12, 8),
      even,
      static_cast<float>(__any_sync(kAll, thread() == 7) * 2 + __all_sync(kAll, thread() != 7))};
  for (int i = 0; i < 8; ++i) put(out + 32 * i + thread(), results[i]);
}

// a barrier between two pieces of code that the same threads run, which a compiler may join
__global__ void barrier_amid_divergent_code(const float* in, float* out, int n) {
  float* values = shared_array<float, kThreads>();
  const bool some = thread() % 3 == n;
  if (some) store_shared(values + thread(), at(in));
  sync_block();
  put(out + thread(), some ? load_shared(values + thread()) : load_shared(values + n));
}

// out[1 + i] = 1 where another thread ran between two accesses of thread i
__global__ void preempted(const float*, float* out, int) {
  const float mine = static_cast<float>(thread());
  put(out, mine);
  put(out + 1 + thread(), at(out) == mine ? 0.0f : 1.0f);
}

// ---- wrong

// Every lane of the warp comes here before one goes on, which orders their accesses in time, but
// not in memory.
__device__ void in_step() { __shfl_sync(kAll, 0, 0); }

__global__ void shared_read_after_write(const float*, float*, int) {
  float* values = shared_array<float, kThreads>();
  store_shared(values + thread(), 0.0f);
  in_step();
  load_shared(values + (thread() ^ 1));
}
__global__ void shared_write_after_read(const float*, float*, int) {
  float* values = shared_array<float, kThreads>();
  store_shared(values + thread(), 0.0f);
  sync_block();
  load_shared(values + (thread() ^ 1));
  in_step();
  store_shared(values + thread(), 0.0f);
}
__global__ void shared_write_after_many_reads(const float*, float*, int n) {
  float* value = shared_array<float, 1>();
  if (thread() == n) store_shared(value, 0.0f);
  sync_block();
  for (int turn = 0; turn < 3; ++turn) {  // the writer, the others of its warp, the writer
    if (thread() < 32 && (thread() == n) == (turn != 1)) load_shared(value);
    in_step();
  }
  if (thread() == n) store_shared(value, 0.0f);
}
__global__ void shared_write_after_reads_of_warps(const float*, float*, int n) {
  float* value = shared_array<float, 1>();
  if (thread() == n) store_shared(value, 0.0f);
  sync_block();
  load_shared(value);
  __syncwarp();
  if (thread() == n) store_shared(value, 0.0f);
}
__global__ void shared_written_twice(const float*, float*, int n) {
  store_shared(shared_array<float, kThreads>() + thread() % n, 1.0f);
}
// a barrier of a warp is none for the other
__global__ void shared_race_of_warps(const float*, float*, int) {
  float* values = shared_array<float, kThreads>();
  store_shared(values + thread(), 0.0f);
  sync_block();
  load_shared(values + (thread() ^ 32));
  __syncwarp();
  store_shared(values + thread(), 0.0f);
}
__global__ void shared_out_of_bounds(const float*, float*, int n) {
  store_shared(shared_array<float, kThreads>() + thread() + n, 1.0f);
}
__global__ void shared_out_of_bounds_unseen(const float*, float*, int n) {
  shared_array<float, kThreads>()[thread() + n] = 1.0f;
}
__global__ void shared_not_written(const float*, float* out, int) {
  put(out + thread(), load_shared(shared_array<float, kThreads>() + thread()));
}
__global__ void shared_too_large(const float*, float*, int) {
  shared_array<float, 8192>();
  shared_array<float, 8192, 1>();
}
__global__ void local_out_of_bounds(const float*, float* out, int n) {
  float values[4] = {};
  values[thread() % 4] = 1.0f;
  put(out + thread(), values[n]);
}
__global__ void signed_overflow(const float*, float* out, int n) {
  put(out + thread(), static_cast<float>((thread() + 1) * n));
}
__global__ void barrier_after_exit(const float*, float*, int n) {
  if (thread() >= n) return;
  sync_block();
}
__global__ void barrier_in_branches(const float*, float* out, int n) {
  if (thread() < n) {
    put(out + thread(), 1.0f);
    sync_block();
  } else {
    sync_block();
    put(out + thread(), 2.0f);
  }
}
__global__ void shuffle_reads_unnamed_lane(const float*, float*, int) {
  if (thread() < 16) __shfl_xor_sync(0xffffu, 1.0f, 16);
}
__global__ void shuffle_from_unnamed_lane(const float*, float*, int) {
  __shfl_xor_sync(0xffffu, 1.0f, 1);
}
__global__ void shuffle_without_a_lane(const float*, float*, int n) {
  if (thread() != n) __shfl_xor_sync(kAll, 1.0f, 1);
}
__global__ void shuffle_beside_ballot(const float*, float*, int n) {
  if (thread() == n) {
    __ballot_sync(kAll, 1);
  } else {
    __shfl_xor_sync(kAll, 1.0f, 1);
  }
}
__global__ void shuffle_beside_barrier(const float*, float*, int n) {
  if (thread() < n) {
    __syncwarp();
  } else {
    sync_block();
  }
}
__global__ void shuffle_of_odd_width(const float*, float*, int n) { __shfl_sync(kAll, 1.0f, 0, n); }
__global__ void written_twice(const float*, float* out, int n) {
  put(out + global_thread() % n, 1.0f);
}
__global__ void read_after_write(const float*, float* out, int n) {
  if (thread() == n) put(out, 1.0f);
  in_step();
  if (thread() == 0) at(out);
}
__global__ void write_after_read(const float*, float* out, int n) {
  if (thread() == 0) at(out);
  in_step();
  if (thread() == n) put(out, 1.0f);
}
__global__ void write_after_many_reads(const float*, float* out, int n) {
  if (thread() == n) at(out);
  in_step();
  at(out);
  in_step();
  if (thread() == n) put(out, 1.0f);
}

using Kernel = void (*)(const float*, float*, int);
const std::map<std::string, Kernel> kKernels = {
    {"copy", copy},
    {"block_sum", block_sum<true, true>},
    {"block_sum_without_barrier", block_sum<false, true>},
    {"block_sum_without_barrier_before_reuse", block_sum<true, false>},
    {"warp_reverse", warp_reverse<true>},
    {"warp_reverse_without_barrier", warp_reverse<false>},
    {"warp_calls", warp_calls},
    {"barrier_amid_divergent_code", barrier_amid_divergent_code},
    {"preempted", preempted},
    {"shared_read_after_write", shared_read_after_write},
    {"shared_write_after_read", shared_write_after_read},
    {"shared_write_after_many_reads", shared_write_after_many_reads},
    {"shared_write_after_reads_of_warps", shared_write_after_reads_of_warps},
    {"shared_written_twice", shared_written_twice},
    {"shared_race_of_warps", shared_race_of_warps},
    {"shared_out_of_bounds", shared_out_of_bounds},
    {"shared_out_of_bounds_unseen", shared_out_of_bounds_unseen},
    {"shared_not_written", shared_not_written},
    {"shared_too_large", shared_too_large},
    {"local_out_of_bounds", local_out_of_bounds},
    {"signed_overflow", signed_overflow},
    {"barrier_after_exit", barrier_after_exit},
    {"barrier_in_branches", barrier_in_branches},
    {"shuffle_reads_unnamed_lane", shuffle_reads_unnamed_lane},
    {"shuffle_from_unnamed_lane", shuffle_from_unnamed_lane},
    {"shuffle_without_a_lane", shuffle_without_a_lane},
    {"shuffle_beside_ballot", shuffle_beside_ballot},
    {"shuffle_beside_barrier", shuffle_beside_barrier},
    {"shuffle_of_odd_width", shuffle_of_odd_width},
    {"written_twice", written_twice},
    {"read_after_write", read_after_write},
    {"write_after_read", write_after_read},
    {"write_after_many_reads", write_after_many_reads},
};

}  // namespace planted

void bind_cuda(py::module_& m) {
  using Extent = std::array<unsigned, 3>;
  m.def(
      "run",
      [](const std::string& name, std::uintptr_t in, std::uintptr_t out, int n, Extent grid,
         Extent block) {
        const planted::Kernel kernel = planted::kKernels.at(name);
        const char* refused = cuda::emulation::launch(
            dim3(grid[0], grid[1], grid[2]), dim3(block[0], block[1], block[2]), 0,
            [&] { kernel(reinterpret_cast<const float*>(in), reinterpret_cast<float*>(out), n); });
        if (refused) throw std::runtime_error(name + " was not launched: " + refused);
      },
      py::arg("name"), py::arg("input"), py::arg("output"), py::arg("n"),
      py::arg("grid") = Extent{1, 1, 1}, py::arg("block") = Extent{planted::kThreads, 1, 1});
}

}  // namespace fusedres
