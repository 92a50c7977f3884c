#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <numeric>
#include <sstream>
#include <stdexcept>
#include <string_view>
#include <utility>

#include "gpu.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

// Goes on with another stack: what a call preserves is pushed on the one that is left. By hand,
// because ASan clears what it knows of a stack that swapcontext enters.
extern "C" void fusedres_switch_stack(void** left, void* entered);
asm(R"(
.text
fusedres_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");

namespace fusedres::cuda::emulation {

Gpu gpu;

void Fiber::go_to(Fiber& other) {
  __sanitizer_start_switch_fiber(&asan, other.stack, other.stack_bytes);
  fusedres_switch_stack(&pointer, other.pointer);
  __sanitizer_finish_switch_fiber(asan, &other.stack, &other.stack_bytes);
}

namespace {

constexpr std::size_t kStackBytes = 256 * 1024;
constexpr unsigned kAccessesToPreemption = 16;         // at most; half of it on average
constexpr std::size_t kMostDynamicBytes = 227 * 1024;  // compute capability 9.0 and 10.0

std::string text(uint3 v) {
  std::ostringstream out;
  out << "(" << v.x << ", " << v.y << ", " << v.z << ")";
  return out.str();
}
uint3 split(std::uint64_t number, dim3 extent) {
  const std::uint64_t row = number / extent.x;
  return {static_cast<unsigned>(number % extent.x), static_cast<unsigned>(row % extent.y),
          static_cast<unsigned>(row / extent.y)};
}

}  // namespace

std::string name(const Thread& thread) {
  return "thread " + text(thread.index) + " of block " + text(blockIdx);
}
std::string name(std::uint64_t stamp) {
  const std::uint64_t number = stamp - gpu.first_stamp;
  return "thread " + text(split(number % gpu.size, blockDim)) + " of block " +
         text(split(number / gpu.size, gridDim));
}

[[noreturn]] void fail(const Thread& thread, const std::string& what) {
  throw std::runtime_error(name(thread) + " " + what);
}

namespace {

const char* name(Call call) {
  switch (call) {
    case Call::syncthreads:
      return "__syncthreads";
    case Call::syncwarp:
      return "__syncwarp";
    case Call::ballot:
      return "__ballot_sync";
    case Call::any:
      return "__any_sync";
    case Call::all:
      return "__all_sync";
    case Call::shfl:
      return "__shfl_sync";
    case Call::shfl_up:
      return "__shfl_up_sync";
    case Call::shfl_down:
      return "__shfl_down_sync";
    case Call::shfl_xor:
      return "__shfl_xor_sync";
    case Call::load_matrices:
      return "load_matrices";
    case Call::mma:
      return "mma";
  }
  return "?";
}

std::string hexadecimal(unsigned mask) {
  std::ostringstream out;
  out << "0x" << std::hex << mask;
  return out.str();
}

// File and line of a call in a kernel, past the wrappers that were inlined into it.
std::string place(const void* site) {
  char frames[4096] = {};  // one string after another, the innermost first
  __sanitizer_symbolize_pc(static_cast<char*>(const_cast<void*>(site)) - 1, "%s:%l", frames,
                           sizeof(frames) - 1);
  std::string_view found;
  for (const char* frame = frames; *frame != 0; frame += std::strlen(frame) + 1) {
    found = frame;
    found.remove_prefix(found.rfind('/') + 1);
    const std::string_view file = found.substr(0, found.find(':'));
    if (file != "device.cuh" && file != "tensor_core.cuh" && file != "emulation.h") break;
  }
  return std::string(found);
}

std::string whereabouts(const Thread& thread) {
  if (thread.state == Thread::State::ended) return "ended";
  std::string where = std::string("waits in ") + name(thread.call);
  if (thread.call != Call::syncthreads) where += " with mask " + hexadecimal(thread.mask);
  return where + " at " + place(thread.site);
}

// ---- fibers

// What every stack runs: one kernel after another, until it is abandoned in the midst of one.
void run_kernels() {
  __sanitizer_finish_switch_fiber(nullptr, &gpu.host.stack, &gpu.host.stack_bytes);
  for (;;) {
    try {
      (*gpu.kernel)();
    } catch (...) {
      gpu.error = std::current_exception();
    }
    gpu.running->state = Thread::State::ended;
    gpu.running->go_to(gpu.host);
  }
}

void start(Thread& thread) {
  if (thread.stack == nullptr) {
    const auto guard = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
    void* memory = mmap(nullptr, guard + kStackBytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    mprotect(memory, guard, PROT_NONE);
    thread.stack = static_cast<char*>(memory) + guard;
    thread.stack_bytes = kStackBytes;
  }
  __asan_unpoison_memory_region(thread.stack, kStackBytes);  // frames that were abandoned
  // as fusedres_switch_stack leaves it: six registers, where to go on, and no caller
  void** top =
      reinterpret_cast<void**>(static_cast<char*>(const_cast<void*>(thread.stack)) + kStackBytes);
  std::fill(top - 8, top, nullptr);
  top[-2] = reinterpret_cast<void*>(&run_kernels);
  thread.pointer = top - 8;
  thread.asan = nullptr;
}

// ---- schedule

unsigned random_below(std::size_t n) { return static_cast<unsigned>(gpu.random() % n); }

void yield() { gpu.running->go_to(gpu.host); }

void wait(Call call, const void* site) {
  gpu.running->state = Thread::State::waiting;
  gpu.running->call = call;
  gpu.running->site = site;
}
void wake(Thread& thread) {
  thread.state = Thread::State::ready;
  gpu.ready.push_back(&thread);
}

[[noreturn]] void fail_stuck() {
  std::map<std::string, std::pair<int, uint3>> groups;  // whereabouts: how many, the first
  for (int i = 0; i < gpu.size; ++i) {
    const Thread& thread = gpu.threads[i];
    ++groups.try_emplace(whereabouts(thread), 0, thread.index).first->second.first;
  }
  std::string who;
  for (const auto& [where, group] : groups) {
    const auto& [number, first] = group;
    who += (who.empty() ? "thread " : "; thread ") + text(first) +
           (number > 1 ? ", one of " + std::to_string(number) + ", " : " ") + where;
  }
  throw std::runtime_error("block " + text(blockIdx) + " can't go on: " + who);
}

void run_block(std::uint64_t number) {
  blockIdx = split(number, gridDim);
  ++gpu.block;
  gpu.first_barrier = ++gpu.barrier;
  gpu.shared_bytes = 0;
  gpu.at_barrier.clear();
  gpu.ready.clear();
  for (int i = 0; i < gpu.size; ++i) {
    Thread& thread = gpu.threads[i];
    if (thread.state != Thread::State::ended) start(thread);
    thread.number = i;
    thread.index = split(i, blockDim);
    thread.stamp = gpu.first_stamp + number * gpu.size + i;
    thread.copies.assign(1, {});
    thread.accesses.clear();
    wake(thread);
  }
  while (!gpu.ready.empty()) {
    std::swap(gpu.ready[random_below(gpu.ready.size())], gpu.ready.back());
    gpu.running = gpu.ready.back();
    gpu.ready.pop_back();
    threadIdx = gpu.running->index;
    gpu.host.go_to(*gpu.running);
    gpu.running = nullptr;
    if (gpu.error) std::rethrow_exception(std::exchange(gpu.error, nullptr));
  }
  for (int i = 0; i < gpu.size; ++i) {
    const Thread& thread = gpu.threads[i];
    if (thread.state != Thread::State::ended) fail_stuck();
    for (const auto& group : thread.copies) {
      if (!group.empty()) fail(thread, "ended with copies on their way");
    }
  }
  serve_banks();
}

void say_who_died() {
  if (gpu.running) std::fprintf(stderr, "in %s\n", name(*gpu.running).c_str());
}

}  // namespace

void preempt_at_random() {
  if (!gpu.preempting || --gpu.accesses_left > 0) return;
  gpu.accesses_left = 1 + random_below(kAccessesToPreemption);
  gpu.ready.push_back(gpu.running);
  yield();
}

const char* launch(dim3 grid, dim3 block, std::size_t shared_bytes,
                   const std::function<void()>& kernel) {
  const std::uint64_t size = std::uint64_t{block.x} * block.y * block.z;
  const std::uint64_t blocks = std::uint64_t{grid.x} * grid.y * grid.z;
  if (size == 0 || blocks == 0 || std::max(block.x, block.y) > kMostThreads || block.z > 64 ||
      size > kMostThreads || grid.x > 0x7fffffffu || std::max(grid.y, grid.z) > 65535 ||
      shared_bytes > kMostDynamicBytes) {
    return "invalid configuration argument";
  }
  const std::lock_guard lock(gpu.in_use);
  __sanitizer_set_death_callback(&say_who_died);
  gridDim = grid;
  blockDim = block;
  gpu.kernel = &kernel;
  gpu.launches.push_back({grid, block, shared_bytes});
  gpu.bank_accesses.clear();
  gpu.dynamic = std::make_unique<SharedMemory>(shared_bytes);
  gpu.first_stamp = gpu.next_stamp;
  gpu.next_stamp += blocks * size;
  gpu.size = static_cast<int>(size);
  while (gpu.threads.size() < size) gpu.threads.emplace_back();
  std::vector<std::uint64_t> order(blocks);
  std::iota(order.begin(), order.end(), 0);
  std::shuffle(order.begin(), order.end(), gpu.random);
  for (const std::uint64_t number : order) run_block(number);
  return nullptr;
}

void seed(std::uint64_t value) {
  gpu.random.seed(static_cast<unsigned>(value % 0x7ffffffe + 1));
  gpu.accesses_left = 1;
}
void preempt(bool on) { gpu.preempting = on; }
const std::vector<Launch>& launches() { return gpu.launches; }

// ---- barriers, votes and shuffles

namespace {

unsigned lanes_of(const Thread& thread) {
  const int lanes = std::min(gpu.size - thread.warp() * kWarp, kWarp);
  return 0xffffffffu >> (kWarp - lanes);
}

// Whose value a lane gets: segments of `width` lanes, and its own value where it would leave its
// segment (shfl wraps around instead; xor may look back).
int source_lane(const Thread& thread) {
  const int lane = thread.lane();
  const int first = lane & ~(thread.width - 1);
  const int last = first + thread.width - 1;
  const int by = thread.argument & (kWarp - 1);
  switch (thread.call) {
    case Call::shfl:
      return first | (by & (thread.width - 1));
    case Call::shfl_up:
      return lane - by >= first ? lane - by : lane;
    case Call::shfl_down:
      return lane + by <= last ? lane + by : lane;
    default:
      return (lane ^ by) <= last ? lane ^ by : lane;
  }
}

// What every lane of the mask gets from the call that all have come to.
void exchange(Thread* const (&warp)[kWarp], Call call, unsigned mask) {
  std::uint64_t results[kWarp] = {};
  unsigned ballot = 0;
  for (int lane = 0; lane < kWarp; ++lane) {
    if (warp[lane]) ballot |= static_cast<unsigned>(warp[lane]->bits & 1) << lane;
  }
  for (int lane = 0; lane < kWarp; ++lane) {
    if (!warp[lane]) continue;
    switch (call) {
      case Call::syncthreads:
      case Call::syncwarp:
        break;
      case Call::ballot:
        results[lane] = ballot;
        break;
      case Call::any:
        results[lane] = ballot != 0;
        break;
      case Call::all:
        results[lane] = ballot == mask;
        break;
      case Call::load_matrices:
      case Call::mma: {
        auto& brought = gpu.brought[warp[lane]->warp()];
        std::memcpy(brought[lane], reinterpret_cast<const void*>(warp[lane]->bits), kMostBrought);
        results[lane] = reinterpret_cast<std::uint64_t>(brought);
        break;
      }
      default:
        const int source = source_lane(*warp[lane]);
        if (!warp[source]) {
          fail(*warp[lane], std::string("reads from lane ") + std::to_string(source) + " in " +
                                name(call) + " at " + place(warp[lane]->site) + ", but the mask " +
                                hexadecimal(mask) + " doesn't name it");
        }
        results[lane] = warp[source]->bits;
    }
  }
  for (int lane = 0; lane < kWarp; ++lane) {
    if (warp[lane]) warp[lane]->bits = results[lane];
  }
}

}  // namespace

std::uint64_t warp_call(Call call, unsigned mask, std::uint64_t bits, int argument, int width) {
  return warp_call_at(__builtin_return_address(0), call, mask, bits, argument, width);
}

std::uint64_t warp_call_at(const void* site, Call call, unsigned mask, std::uint64_t bits,
                           int argument, int width) {
  Thread& me = *gpu.running;
  wait(call, site);
  me.mask = mask;
  me.bits = bits;
  me.argument = argument;
  me.width = width;
  if ((mask >> me.lane() & 1) == 0) {
    fail(me, whereabouts(me) + ", which doesn't name its own lane " + std::to_string(me.lane()));
  }
  if ((mask & ~lanes_of(me)) != 0) {
    fail(me, whereabouts(me) + ", which names lanes that the block doesn't have");
  }
  if (width < 1 || width > kWarp || (width & (width - 1)) != 0) {
    fail(me, whereabouts(me) + " and width " + std::to_string(width) +
                 ", which must be a power of two up to 32");
  }
  Thread* warp[kWarp] = {};
  bool complete = true;
  for (int lane = 0; lane < kWarp; ++lane) {
    if ((mask >> lane & 1) == 0) continue;
    Thread& other = gpu.threads[me.warp() * kWarp + lane];
    complete &= other.state == Thread::State::waiting && other.call == call && other.mask == mask;
    warp[lane] = &other;
  }
  if (complete) {
    exchange(warp, call, mask);
    if (call == Call::syncwarp && mask == lanes_of(me)) ++gpu.warp_barriers[me.warp()];
    for (Thread* lane : warp) {
      if (lane) wake(*lane);
    }
  }
  yield();
  return me.bits;
}

}  // namespace fusedres::cuda::emulation

void __syncthreads() {
  using namespace fusedres::cuda::emulation;
  wait(Call::syncthreads, __builtin_return_address(0));
  gpu.at_barrier.push_back(gpu.running);
  const Thread& first = *gpu.at_barrier.front();
  if (first.site != gpu.running->site) {
    fail(*gpu.running, whereabouts(*gpu.running) + ", while " + name(first) + " " +
                           whereabouts(first) + ": a barrier in divergent code");
  }
  if (static_cast<int>(gpu.at_barrier.size()) == gpu.size) {
    for (Thread* thread : gpu.at_barrier) wake(*thread);
    gpu.at_barrier.clear();
    ++gpu.barrier;
  }
  yield();
}

unsigned __activemask() {
  using namespace fusedres::cuda::emulation;
  return 1u << gpu.running->lane();
}
