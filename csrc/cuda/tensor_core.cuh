// Tensor cores and what feeds them: asynchronous copies into shared memory, fragments out of it,
// products. tests/emulation has the same as work of a whole warp on a CPU; fragments lie as the PTX
// ISA says (9.7.14.5, "Matrix multiply-accumulate operation using mma instruction").
//
// With group = lane / 4 and member = lane % 4, and a step of the reduction being 32 bytes (16
// values of 16 bits, 8 of 32), a lane holds of
//   A, 16 x step:  rows group (a[0], a[2]) and group + 8 (a[1], a[3]), in bytes 4 * member (a[0],
//                  a[1]) and 16 + 4 * member (a[2], a[3]) of the step
//   B, step x 8:   column group, in bytes 4 * member (b[0]) and 16 + 4 * member (b[1])
//   C, 16 x 8:     rows group (c[0], c[1]) and group + 8 (c[2], c[3]), columns 2 * member and
//                  2 * member + 1
#pragma once

#include "device.cuh"

namespace fusedres::cuda {

constexpr int kWarp = 32;
constexpr int kStepBytes = 32;  // of the reduction, in one mma
template <class T>
constexpr int kStep = kStepBytes / sizeof(T);

__device__ __forceinline__ uint32_t shared_address(const void* p) {
#if defined(__CUDA_ARCH__)
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
#else
  return static_cast<uint32_t>(reinterpret_cast<uintptr_t>(p));
#endif
}

// The block's shared memory of a size that the launch gives, at a multiple of 128 bytes.
__device__ __forceinline__ unsigned char* dynamic_shared() {
#if defined(__CUDACC__)
  extern __shared__ __align__(128) unsigned char fusedres_dynamic_shared[];
  return fusedres_dynamic_shared;
#else
  return emulation::dynamic_shared();
#endif
}

// ---- asynchronous copies

// 16 bytes of global memory on their way to shared memory; zeros where nothing is there (from is
// then not read, but has to be an address).
__device__ __forceinline__ void copy_async(void* to, const void* from, bool there) {
#if defined(__CUDA_ARCH__)
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
               "r"(there ? 16 : 0)
               : "memory");
#elif !defined(__CUDACC__)
  emulation::copy_async(to, from, there);
#endif
}
// What this thread has on its way since the last such call is a group, also if it is nothing.
__device__ __forceinline__ void commit_copies() {
#if defined(__CUDA_ARCH__)
  asm volatile("cp.async.commit_group;" ::: "memory");
#elif !defined(__CUDACC__)
  emulation::commit_copies();
#endif
}
// Waits until no more than the last `groups` of this thread's groups are on their way. Other
// threads' copies are there after a barrier behind it.
template <int groups>
__device__ __forceinline__ void wait_copies() {
#if defined(__CUDA_ARCH__)
  asm volatile("cp.async.wait_group %0;" ::"n"(groups) : "memory");
#elif !defined(__CUDACC__)
  emulation::wait_copies(groups);
#endif
}

// ---- fragments

// Four matrices of 8 rows by 16 bytes: lane i names row i % 8 of matrix i / 8, at a multiple of 16
// bytes, and gets bytes 4 * member of row `group` of each.
__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], const void* row) {
#if defined(__CUDA_ARCH__)
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
#elif !defined(__CUDACC__)
  emulation::load_matrices(r, row, false);
#endif
}
// The same of matrices of 16-bit values, transposed: rows 2 * member and 2 * member + 1 of column
// `group`.
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&r)[4], const void* row) {
#if defined(__CUDA_ARCH__)
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
#elif !defined(__CUDACC__)
  emulation::load_matrices(r, row, true);
#endif
}

// float32 as tensor cores take it: 10 bits behind the point, to the nearest.
__device__ __forceinline__ uint32_t tf32(uint32_t bits) {
#if defined(__CUDA_ARCH__)
  uint32_t rounded;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(rounded) : "r"(bits));
  return rounded;
#elif !defined(__CUDACC__)
  return emulation::tf32(bits);
#else
  return bits;
#endif
}

// c += A B of one step. float operands have to be rounded to tf32.
template <class T>
__device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
#if defined(__CUDA_ARCH__)
#define FUSEDRES_MMA(T, shape, types)                                                 \
  template <>                                                                         \
  __device__ __forceinline__ void mma<T>(float (&c)[4], const uint32_t (&a)[4],       \
                                         const uint32_t (&b)[2]) {                    \
    asm volatile("mma.sync.aligned." shape ".row.col.f32." types                      \
                 ".f32 "                                                              \
                 "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"    \
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                     \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1])); \
  }
FUSEDRES_MMA(__nv_bfloat16, "m16n8k16", "bf16.bf16")
FUSEDRES_MMA(__half, "m16n8k16", "f16.f16")
FUSEDRES_MMA(float, "m16n8k8", "tf32.tf32")
#undef FUSEDRES_MMA
#elif !defined(__CUDACC__)
template <class T>
__device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  emulation::mma<T>(c, a, b);
}
#else
template <class T>
__device__ __forceinline__ void mma(float (&)[4], const uint32_t (&)[4], const uint32_t (&)[2]) {}
#endif

// ---- tiles in shared memory

// A matrix in shared memory of rows of kBytes bytes, a power of two from 64 on. The 16-byte chunks
// of a row are exchanged by its number (times kBy), so that eight rows' chunks of one column lie in
// different banks, and the chunks of a row as well.
template <int kBytes, int kBy = 1>
struct Swizzled {
  static constexpr int kChunks = kBytes / kAccessBytes;
  static constexpr int kInLine = 8;  // chunks in all banks
  static_assert(kChunks >= 4 && (kChunks & (kChunks - 1)) == 0 && (kChunks >= kInLine || kBy == 1));

  // bytes from the start to a chunk
  static __device__ __forceinline__ int at(int row, int chunk) {
    const int by = kChunks >= kInLine ? row * kBy % kInLine : row / (kInLine / kChunks) % kChunks;
    return row * kBytes + (chunk ^ by) * kAccessBytes;
  }
};

}  // namespace fusedres::cuda
