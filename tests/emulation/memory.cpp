#include <dlfcn.h>

#include <algorithm>
#include <cstring>
#include <set>
#include <stdexcept>

#include "gpu.h"

namespace fusedres::cuda::emulation {

// ---- shared memory

namespace {

constexpr std::size_t kMostSharedBytes = 48 * 1024;  // of all arrays but the dynamic one

bool same_warp(int a, int b) { return a / kWarp == b / kWarp; }

Access now() {
  const Thread& me = *gpu.running;
  return {gpu.barrier, gpu.warp_barriers[me.warp()], me.number};
}

// Whether the running thread comes after an access: it was its own, or a barrier of the block or of
// the warp of both has passed. A __syncwarp of a part of a warp counts for nothing here.
bool is_past(const Access& before) {
  const Access here = now();
  return before.thread == here.thread || before.barrier != here.barrier ||
         (same_warp(before.thread, here.thread) && before.warp_barrier != here.warp_barrier);
}

// Two readers that no barrier separates stand for all: a writer can be past at most one of them,
// unless it is past them all.
void note_read(SharedByte& byte) {
  auto& [first, second] = byte.reads;
  if (is_past(first)) {
    first = now();
  } else if (is_past(second) || same_warp(first.thread, second.thread)) {
    second = now();
  }
}

[[noreturn]] void fail_race(const char* does, std::size_t at, const char* did, int other) {
  fail(*gpu.running, std::string(does) + " byte " + std::to_string(at) + " of shared memory that " +
                         name(gpu.threads[other]) + " " + did + " with no barrier in between");
}

// The array of the running block that has these bytes; nullptr if none has.
SharedMemory* array_of(const void* address, std::size_t bytes) {
  const auto* begin = static_cast<const unsigned char*>(address);
  for (SharedMemory* array : gpu.shared) {
    const unsigned char* memory = array->memory.get();
    if (array->block == gpu.block && begin >= memory && begin + bytes <= memory + array->bytes) {
      return array;
    }
  }
  return nullptr;
}

void access_shared(const void* address, std::size_t bytes, bool writes) {
  const auto* begin = static_cast<const unsigned char*>(address);
  const char* does = writes ? "writes" : "reads";
  SharedMemory* array = array_of(address, bytes);
  if (array == nullptr) {
    fail(*gpu.running,
         std::string(does) + " " + std::to_string(bytes) + " bytes of shared memory out of bounds");
  }
  const std::size_t from = begin - array->memory.get();
  for (std::size_t at = from; at < from + bytes; ++at) {
    SharedByte& byte = array->accesses[at];
    if (!is_past(byte.write)) fail_race(does, at, "wrote", byte.write.thread);
    if (writes) {
      for (const Access& read : byte.reads) {
        if (!is_past(read)) fail_race(does, at, "read", read.thread);
      }
      byte.write = now();
    } else {
      if (byte.write.barrier < gpu.first_barrier) {
        fail(*gpu.running, "reads byte " + std::to_string(at) +
                               " of shared memory that nobody wrote in this block");
      }
      note_read(byte);
    }
  }
}

}  // namespace

SharedMemory::SharedMemory(std::size_t bytes)
    : bytes(bytes), memory(new unsigned char[bytes]), accesses(bytes) {
  gpu.shared.push_back(this);
}
SharedMemory::~SharedMemory() {
  gpu.shared.erase(std::find(gpu.shared.begin(), gpu.shared.end(), this));
}

void* SharedMemory::of_this_block() {
  if (block != gpu.block) {
    block = gpu.block;
    std::memset(memory.get(), 0xff, bytes);
    if (this != gpu.dynamic.get()) gpu.shared_bytes += bytes;
    if (gpu.shared_bytes > kMostSharedBytes) {
      fail(*gpu.running, "has " + std::to_string(gpu.shared_bytes) +
                             " bytes of shared memory, where nvcc allows " +
                             std::to_string(kMostSharedBytes));
    }
  }
  return memory.get();
}

unsigned char* dynamic_shared() {
  return static_cast<unsigned char*>(gpu.dynamic->of_this_block());
}

void read_shared(const void* address, std::size_t bytes) {
  preempt_at_random();
  note_banks(__builtin_return_address(0), address, bytes);
  access_shared(address, bytes, false);
}
void write_shared(void* address, std::size_t bytes) {
  preempt_at_random();
  note_banks(__builtin_return_address(0), address, bytes);
  access_shared(address, bytes, true);
}

void copy_async(void* to, const void* from, bool there) {
  constexpr std::size_t kBytes = sizeof(Copy::bytes);
  if (reinterpret_cast<std::uintptr_t>(from) % kBytes != 0) {
    fail(*gpu.running, "copies from an address that is no multiple of 16 bytes");
  }
  Copy copy{static_cast<unsigned char*>(to), {}};
  if (there) {
    read(from, kBytes);
    std::memcpy(copy.bytes, from, kBytes);
  } else {
    preempt_at_random();
  }
  note_banks(__builtin_return_address(0), to, kBytes);
  access_shared(to, kBytes, true);
  std::memset(to, 0xff, kBytes);
  gpu.running->copies.back().push_back(copy);
}
void commit_copies() { gpu.running->copies.emplace_back(); }
void wait_copies(int groups) {
  // the last of the thread's groups isn't committed
  auto& copies = gpu.running->copies;
  while (copies.size() > static_cast<std::size_t>(groups) + 1) {
    for (const Copy& copy : copies.front()) {
      access_shared(copy.to, sizeof copy.bytes, true);
      std::memcpy(copy.to, copy.bytes, sizeof copy.bytes);
    }
    copies.pop_front();
  }
  preempt_at_random();
}

void load_matrices(std::uint32_t (&r)[4], const void* row, bool transposed) {
  const void* site = __builtin_return_address(0);
  Thread& me = *gpu.running;
  constexpr std::size_t kBytes = 16;
  if (array_of(row, kBytes) == nullptr ||
      (static_cast<const unsigned char*>(row) - array_of(row, kBytes)->memory.get()) % kBytes !=
          0) {
    fail(me, "names a row that isn't 16 aligned bytes of shared memory");
  }
  note_banks(site, row, kBytes);
  const unsigned char* mine[kMostBrought / sizeof(void*)] = {
      static_cast<const unsigned char*>(row)};
  const auto* brought = bring(site, Call::load_matrices, mine);
  const auto named = [&](int lane) {
    const unsigned char* address;
    std::memcpy(&address, brought[lane], sizeof address);
    return address;
  };
  // a row that a lane wrote itself may still not be there for the others: a second lane checks it
  access_shared(row, kBytes, false);
  access_shared(named(me.lane() ^ 1), kBytes, false);
  const int group = me.lane() / 4, member = me.lane() % 4;
  for (int matrix = 0; matrix < 4; ++matrix) {
    auto* to = reinterpret_cast<unsigned char*>(&r[matrix]);
    if (!transposed) {
      std::memcpy(to, named(8 * matrix + group) + 4 * member, 4);
      continue;
    }
    for (int i = 0; i < 2; ++i) {
      std::memcpy(to + 2 * i, named(8 * matrix + 2 * member + i) + 2 * group, 2);
    }
  }
}

// ---- banks of shared memory

void note_banks(const void* site, const void* address, std::size_t bytes) {
  if (!gpu.counting_banks) return;
  Thread& me = *gpu.running;
  const SharedMemory* array = array_of(address, bytes);
  if (array == nullptr) return;  // an access out of bounds, which says so itself
  const std::size_t at = static_cast<const unsigned char*>(address) - array->memory.get();
  const unsigned time = me.accesses[site]++;
  gpu.bank_accesses[{me.warp(), site, time}].push_back({me.lane(), at, bytes});
}

namespace {

// The address of a call's instruction, from the start of the module's file.
std::uintptr_t in_module(const void* site) {
  Dl_info module{};
  dladdr(site, &module);
  return reinterpret_cast<std::uintptr_t>(site) - 1 -
         reinterpret_cast<std::uintptr_t>(module.dli_fbase);
}

}  // namespace

// 128 bytes are served at a time: to all lanes of a warp if each wants 4, to 8 of them if it wants
// 16. Words of one bank that aren't the same have to wait for each other.
void serve_banks() {
  constexpr std::size_t kBanks = 32, kWord = 4;
  for (const auto& [instruction, accesses] : gpu.bank_accesses) {
    Banks& counted = gpu.banks[in_module(std::get<1>(instruction))];
    ++counted.accesses;
    std::map<int, std::map<std::size_t, std::set<std::size_t>>> times;  // time: bank: words
    for (const BankAccess& access : accesses) {
      const int lanes = static_cast<int>(kBanks * kWord / std::max(access.bytes, kWord));
      for (std::size_t at = access.at; at < access.at + access.bytes; at += kWord) {
        times[access.lane / lanes][at / kWord % kBanks].insert(at / kWord);
      }
    }
    for (const auto& [time, words_of] : times) {
      std::size_t most = 1;
      for (const auto& [bank, words] : words_of) most = std::max(most, words.size());
      counted.conflicts += most - 1;
    }
  }
  gpu.bank_accesses.clear();
}

void count_banks(bool on) {
  gpu.counting_banks = on;
  gpu.banks.clear();
}
std::map<std::uintptr_t, Banks> banks() { return gpu.banks; }

// ---- global memory

namespace {

[[noreturn]] void fail_race(const char* does, const Buffer& buffer, std::size_t at, const char* did,
                            std::uint64_t other) {
  fail(*gpu.running, std::string(does) + " byte " + std::to_string(at) + " of " + buffer.name +
                         ", which " + name(other) + " " + did + " in the same launch");
}

// Threads of one launch must not meet, whatever barriers lie between.
bool is_other(std::uint64_t stamp) {
  return stamp >= gpu.first_stamp && stamp != gpu.running->stamp;
}

void access(const void* address, std::size_t bytes, bool writes) {
  preempt_at_random();
  const auto begin = reinterpret_cast<std::uintptr_t>(address);
  const std::uint64_t me = gpu.running->stamp;
  const char* does = writes ? "writes" : "reads";
  for (Buffer& buffer : gpu.buffers) {
    if (begin + bytes <= buffer.begin || begin >= buffer.end) continue;
    if (begin < buffer.begin || begin + bytes > buffer.end) {
      fail(*gpu.running, std::string(does) + " " + std::to_string(bytes) +
                             " bytes across an end of " + buffer.name);
    }
    const std::size_t from = begin - buffer.begin;
    (writes ? buffer.traffic.written : buffer.traffic.read) += bytes;
    for (std::size_t at = from; at < from + bytes; ++at) {
      Byte& byte = buffer.bytes[at];
      if (is_other(byte.writer)) fail_race(does, buffer, at, "wrote", byte.writer);
      if (writes) {
        if (is_other(byte.reader)) fail_race(does, buffer, at, "read", byte.reader);
        if (is_other(byte.other_reader)) fail_race(does, buffer, at, "read", byte.other_reader);
        buffer.traffic.distinct_written += byte.writer < gpu.reset_stamp;
        byte.writer = me;
      } else {
        buffer.traffic.distinct_read += byte.reader < gpu.reset_stamp;
        (is_other(byte.reader) ? byte.other_reader : byte.reader) = me;
      }
    }
    return;
  }
  (writes ? gpu.other.written : gpu.other.read) += bytes;
}

}  // namespace

void read(const void* address, std::size_t bytes) { access(address, bytes, false); }
void write(void* address, std::size_t bytes) { access(address, bytes, true); }

void watch(const std::string& name, const void* address, std::size_t bytes) {
  const auto begin = reinterpret_cast<std::uintptr_t>(address);
  for (const Buffer& buffer : gpu.buffers) {
    if (buffer.name == name || (begin < buffer.end && begin + bytes > buffer.begin)) {
      throw std::invalid_argument(name + " must be a buffer of its own, got one that shares " +
                                  (buffer.name == name ? "the name" : "memory") + " with " +
                                  buffer.name);
    }
  }
  gpu.buffers.push_back({name, begin, begin + bytes, {}, std::vector<Byte>(bytes)});
}
void unwatch_all() { gpu.buffers.clear(); }

std::map<std::string, Traffic> traffic() {
  std::map<std::string, Traffic> all{{"other", gpu.other}};
  for (const Buffer& buffer : gpu.buffers) all[buffer.name] = buffer.traffic;
  return all;
}
void reset() {
  gpu.launches.clear();
  gpu.other = {};
  for (Buffer& buffer : gpu.buffers) buffer.traffic = {};
  gpu.reset_stamp = gpu.next_stamp;
}

}  // namespace fusedres::cuda::emulation
