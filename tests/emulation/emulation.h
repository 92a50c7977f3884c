// CUDA's execution model on a CPU: kernels compiled as C++ run here, one fiber a thread, on
// ordinary memory. device.cuh includes this where nvcc isn't the compiler.
//
// Threads are preempted at random accesses, in an order that a seed fixes, and whatever a GPU would
// leave undefined is an error: races, barriers that not every thread reaches, lanes that a shuffle
// names in vain. Accesses to global memory are counted (see watch).
#pragma once

#include <cuda_runtime.h>
#include <math.h>  // nvcc has it without being asked

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

// the one attribute that CUDA's headers leave undefined for other compilers
#if !defined(__launch_bounds__)
#define __launch_bounds__(...)
#endif

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

namespace fusedres::cuda::emulation {

// Runs the kernel for every thread of every block, with so many bytes of dynamic shared memory.
// Returns why a GPU would refuse the launch, or nullptr; throws std::runtime_error for what goes
// wrong in the kernel.
const char* launch(dim3 grid, dim3 block, std::size_t shared_bytes,
                   const std::function<void()>& kernel);

// Called before every access to global and to shared memory. Either may switch threads.
void read(const void* address, std::size_t bytes);
void write(void* address, std::size_t bytes);
void read_shared(const void* address, std::size_t bytes);
void write_shared(void* address, std::size_t bytes);

// When a thread touched a byte of shared memory: after how many barriers of the block and of its
// warp.
struct Access {
  std::uint32_t barrier = 0, warp_barrier = 0;
  int thread = -1;
};
struct SharedByte {
  Access write, reads[2];
};

// A __shared__ array, in whichever block runs. On the heap, so that ASan knows where it ends.
struct SharedMemory {
  explicit SharedMemory(std::size_t bytes);
  ~SharedMemory();
  void* of_this_block();

  std::size_t bytes;
  std::unique_ptr<unsigned char[]> memory;
  std::vector<SharedByte> accesses;
  std::uint64_t block = 0;  // the last that used it
};

template <class T, int N, int kSlot>
T* shared_array() {
  static SharedMemory memory(N * sizeof(T));
  return static_cast<T*>(memory.of_this_block());
}

// That of the launch's size.
unsigned char* dynamic_shared();

// Where a thread may wait for others.
enum class Call {
  syncthreads,
  syncwarp,
  ballot,
  any,
  all,
  shfl,
  shfl_up,
  shfl_down,
  shfl_xor,
  load_matrices,
  mma
};

// Waits until every lane of the mask has come to the same call; `bits` is what the others see of
// this lane, `argument` and `width` are those of a shuffle. Returns what the call returns.
std::uint64_t warp_call(Call call, unsigned mask, std::uint64_t bits, int argument = 0,
                        int width = 32);

template <class T>
__forceinline__ T shuffle(Call call, unsigned mask, T value, int argument, int width) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "CUDA shuffles values of 4 and 8 bytes");
  std::uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = warp_call(call, mask, bits, argument, width);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

// Asynchronous copies. They arrive as late as they may: until the thread waits for them there is
// garbage.
void copy_async(void* to, const void* from, bool there);
void commit_copies();
void wait_copies(int groups);

// What tensor_core.cuh says of them; every lane of a warp has to come.
void load_matrices(std::uint32_t (&r)[4], const void* row, bool transposed);
std::uint32_t tf32(std::uint32_t bits);
// The values of 16 or 32 bits in the operands' registers, widened.
using Widen = float (*)(const void* value);
void mma(float (&c)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2], int bytes,
         Widen widen);
template <class T>
void mma(float (&c)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]) {
  mma(c, a, b, sizeof(T),
      [](const void* value) { return static_cast<float>(*static_cast<const T*>(value)); });
}

// The order of threads, from here on.
void seed(std::uint64_t value);
// Whether threads are switched at accesses too (they are, unless told not to), or at barriers
// alone.
void preempt(bool on);

struct Traffic {
  std::uint64_t read = 0, distinct_read = 0, written = 0, distinct_written = 0;  // bytes
};
struct Launch {
  dim3 grid, block;
  std::size_t shared_bytes;
};
// Accesses of a warp to shared memory by one instruction, and how often the banks served it beyond
// the fewest times that so many bytes take.
struct Banks {
  std::uint64_t accesses = 0, conflicts = 0;
};

// Counts accesses to a buffer, and checks that no two threads of a launch meet in a byte of it.
void watch(const std::string& name, const void* address, std::size_t bytes);
void unwatch_all();
// Since the last reset; accesses outside every buffer are under "other", which has no distinct
// bytes.
std::map<std::string, Traffic> traffic();
const std::vector<Launch>& launches();
// By the instruction's address in the module's file, while told to count.
void count_banks(bool on);
std::map<std::uintptr_t, Banks> banks();
void reset();

}  // namespace fusedres::cuda::emulation

void __syncthreads();
// Names the calling lane alone: which others run beside it is up to the hardware.
unsigned __activemask();

__forceinline__ void __syncwarp(unsigned mask = 0xffffffffu) {
  fusedres::cuda::emulation::warp_call(fusedres::cuda::emulation::Call::syncwarp, mask, 0);
}
__forceinline__ unsigned __ballot_sync(unsigned mask, int predicate) {
  using namespace fusedres::cuda::emulation;
  return static_cast<unsigned>(warp_call(Call::ballot, mask, predicate != 0));
}
__forceinline__ int __any_sync(unsigned mask, int predicate) {
  using namespace fusedres::cuda::emulation;
  return static_cast<int>(warp_call(Call::any, mask, predicate != 0));
}
__forceinline__ int __all_sync(unsigned mask, int predicate) {
  using namespace fusedres::cuda::emulation;
  return static_cast<int>(warp_call(Call::all, mask, predicate != 0));
}
template <class T>
__forceinline__ T __shfl_sync(unsigned mask, T value, int lane, int width = 32) {
  using namespace fusedres::cuda::emulation;
  return shuffle(Call::shfl, mask, value, lane, width);
}
template <class T>
__forceinline__ T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  using namespace fusedres::cuda::emulation;
  return shuffle(Call::shfl_up, mask, value, static_cast<int>(delta), width);
}
template <class T>
__forceinline__ T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  using namespace fusedres::cuda::emulation;
  return shuffle(Call::shfl_down, mask, value, static_cast<int>(delta), width);
}
template <class T>
__forceinline__ T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32) {
  using namespace fusedres::cuda::emulation;
  return shuffle(Call::shfl_xor, mask, value, lanes, width);
}
