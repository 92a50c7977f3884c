// The emulated GPU, as emulation.cpp (threads) and memory.cpp (what they touch) share it.
#pragma once

#include <deque>
#include <exception>
#include <mutex>
#include <random>
#include <tuple>

#include "emulation.h"

namespace fusedres::cuda::emulation {

constexpr int kWarp = 32;
constexpr unsigned kMostThreads = 1024;
constexpr int kMostBrought = 32;  // bytes

// A stack of its own.
struct Fiber {
  void* pointer = nullptr;  // where it left its stack
  const void* stack = nullptr;
  std::size_t stack_bytes = 0;
  void* asan = nullptr;  // what ASan keeps of a stack that was left

  // Runs `other` until that goes back to this one.
  void go_to(Fiber& other);
};

// 16 bytes on their way to shared memory.
struct Copy {
  unsigned char* to;
  unsigned char bytes[16];
};

// A CUDA thread. Its stack outlives the block: a thread of the next block with the same number has
// it.
struct Thread : Fiber {
  enum class State { abandoned, ready, waiting, ended };

  int number = 0;  // in its block
  uint3 index{};
  std::uint64_t stamp = 0;  // its number among all threads ever launched
  State state = State::abandoned;

  // where it waits, and with what
  Call call{};
  const void* site = nullptr;
  unsigned mask = 0;
  std::uint64_t bits = 0;
  int argument = 0, width = 0;

  std::deque<std::vector<Copy>> copies;      // groups, the last not committed yet
  std::map<const void*, unsigned> accesses;  // to shared memory, by the instruction's address

  int lane() const { return number % kWarp; }
  int warp() const { return number / kWarp; }
};

// A lane's access to shared memory, from the start of its array.
struct BankAccess {
  int lane;
  std::size_t at, bytes;
};

struct Byte {
  std::uint64_t writer = 0, reader = 0, other_reader = 0;  // stamps
};
struct Buffer {
  std::string name;
  std::uintptr_t begin, end;
  Traffic traffic;
  std::vector<Byte> bytes;
};

// All there is: one launch runs at a time.
struct Gpu {
  std::mutex in_use;
  std::minstd_rand random{1};
  bool preempting = true;
  unsigned accesses_left = 1;  // before the next preemption

  Fiber host;
  std::deque<Thread> threads;
  const std::function<void()>* kernel = nullptr;
  std::exception_ptr error;

  // the launch
  std::vector<Launch> launches;
  std::uint64_t first_stamp = 1, next_stamp = 1;

  // the block
  int size = 0;  // threads
  std::uint64_t block = 0;
  Thread* running = nullptr;
  std::vector<Thread*> ready;
  std::vector<Thread*> at_barrier;
  std::uint32_t barrier = 0, first_barrier = 0;
  std::uint32_t warp_barriers[kMostThreads / kWarp] = {};
  std::size_t shared_bytes = 0;
  // what the lanes of each warp brought to the last call that takes more than 64 bits
  unsigned char brought[kMostThreads / kWarp][kWarp][kMostBrought] = {};

  // memory
  std::vector<SharedMemory*> shared;
  std::unique_ptr<SharedMemory> dynamic;  // of the launch
  std::vector<Buffer> buffers;
  Traffic other;
  std::uint64_t reset_stamp = 1;

  // banks: accesses of the block, by warp, instruction and how often the lane had come to it
  bool counting_banks = false;
  std::map<std::tuple<int, const void*, unsigned>, std::vector<BankAccess>> bank_accesses;
  std::map<std::uintptr_t, Banks> banks;  // by instruction
};
extern Gpu gpu;

// "thread (1, 0, 0) of block (0, 0, 0)": by itself, or by the stamp of one of this launch
std::string name(const Thread& thread);
std::string name(std::uint64_t stamp);

// What is wrong with what a thread does.
[[noreturn]] void fail(const Thread& thread, const std::string& what);

// Notes an access to shared memory by an instruction, and, at the end of a block, how the banks
// served what was noted.
void note_banks(const void* site, const void* address, std::size_t bytes);
void serve_banks();

// warp_call by an instruction.
std::uint64_t warp_call_at(const void* site, Call call, unsigned mask, std::uint64_t bits,
                           int argument, int width);
// What every lane of the warp brought, kMostBrought bytes each, until the warp's next such call.
const unsigned char (*bring(const void* site, Call call, const void* data))[kMostBrought];

// Now and then, lets another thread go on before the running one.
void preempt_at_random();

}  // namespace fusedres::cuda::emulation
