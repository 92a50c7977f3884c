#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "gpu.h"

namespace fusedres::cuda::emulation {

// ---- shared memory

namespace {

constexpr std::size_t kMostSharedBytes = 48 * 1024;

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

void access_shared(const void* address, std::size_t bytes, bool writes) {
  preempt_at_random();
  const auto* begin = static_cast<const unsigned char*>(address);
  const char* does = writes ? "writes" : "reads";
  for (SharedMemory* array : gpu.shared) {
    const unsigned char* memory = array->memory.get();
    if (array->block != gpu.block || begin < memory || begin + bytes > memory + array->bytes) {
      continue;
    }
    for (std::size_t at = begin - memory; at < begin - memory + bytes; ++at) {
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
    return;
  }
  fail(*gpu.running,
       std::string(does) + " " + std::to_string(bytes) + " bytes of shared memory out of bounds");
}

}  // namespace

SharedMemory::SharedMemory(std::size_t bytes)
    : bytes(bytes), memory(new unsigned char[bytes]), accesses(bytes) {
  gpu.shared.push_back(this);
}

void* SharedMemory::of_this_block() {
  if (block != gpu.block) {
    block = gpu.block;
    std::memset(memory.get(), 0xff, bytes);
    gpu.shared_bytes += bytes;
    if (gpu.shared_bytes > kMostSharedBytes) {
      fail(*gpu.running, "has " + std::to_string(gpu.shared_bytes) +
                             " bytes of shared memory, where nvcc allows " +
                             std::to_string(kMostSharedBytes));
    }
  }
  return memory.get();
}

void read_shared(const void* address, std::size_t bytes) { access_shared(address, bytes, false); }
void write_shared(void* address, std::size_t bytes) { access_shared(address, bytes, true); }

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
