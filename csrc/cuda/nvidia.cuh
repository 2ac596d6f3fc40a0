// The Gpu type of gpu.h on NVIDIA's processors from Turing (sm_75) on.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "../cpu/convert.h"
#include "gpu.h"

namespace dynquant {

struct Nvidia {
  static __device__ __forceinline__ int thread() { return static_cast<int>(threadIdx.x); }
  static __device__ __forceinline__ int64_t block_x() { return blockIdx.x; }
  static __device__ __forceinline__ int block_y() { return static_cast<int>(blockIdx.y); }
  static __device__ __forceinline__ int64_t grid_x() { return gridDim.x; }
  static __device__ __forceinline__ int grid_y() { return static_cast<int>(gridDim.y); }

  static __device__ __forceinline__ uint8_t* shared() {
    extern __shared__ __align__(16) uint8_t memory[];
    return memory;
  }
  static __device__ __forceinline__ void sync() { __syncthreads(); }
  template <class T>
  static __device__ __forceinline__ T shuffle_xor(T value, int mask) {
    return __shfl_xor_sync(0xFFFFFFFFu, value, mask);
  }

#if __CUDA_ARCH__ >= 800
  static constexpr bool kAsyncCopies = true;
  static __device__ __forceinline__ void copy_async(void* to, const void* from, bool real) {
    const int bytes = real ? 16 : 0;  // what lies beyond them is filled with zeros
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address(to)), "l"(from),
                 "r"(bytes)
                 : "memory");
  }
  static __device__ __forceinline__ void commit() {
    asm volatile("cp.async.commit_group;" ::: "memory");
  }
  template <int N>
  static __device__ __forceinline__ void wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
  }
#else
  static constexpr bool kAsyncCopies = false;
  static __device__ __forceinline__ void copy_async(void* to, const void* from, bool real) {
    const Bytes16 zeros = {};
    *static_cast<Bytes16*>(to) = real ? load16(from) : zeros;
  }
  static __device__ __forceinline__ void commit() {}
  template <int N>
  static __device__ __forceinline__ void wait() {}
#endif

  static __device__ __forceinline__ Bytes16 load16(const void* from) {
    const uint4 v = __ldg(static_cast<const uint4*>(from));
    return {v.x, v.y, v.z, v.w};
  }
  static __device__ __forceinline__ void store16(void* to, const Bytes16& v) {
    *static_cast<uint4*>(to) = make_uint4(v.word[0], v.word[1], v.word[2], v.word[3]);
  }
  static __device__ __forceinline__ Bytes16 load_shared16(const void* from) {
    return *static_cast<const Bytes16*>(from);
  }
  static __device__ __forceinline__ void load_fragment(const void* row, uint32_t (&r)[4]) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address(row))
                 : "memory");
  }

  static __device__ __forceinline__ void mma(int32_t (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                             uint32_t b1) {
#if __CUDA_ARCH__ >= 800
    asm volatile(
        "mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
    // Turing's instruction is a quarter of that; its fragments are the same registers.
    mma_quarter(c[0], c[1], a[0], b0);
    mma_quarter(c[0], c[1], a[2], b1);
    mma_quarter(c[2], c[3], a[1], b0);
    mma_quarter(c[2], c[3], a[3], b1);
#endif
  }

  static __device__ __forceinline__ int32_t dot(uint32_t u, uint32_t s, int32_t sum) {
    int32_t result;
    asm("dp4a.u32.s32 %0, %1, %2, %3;" : "=r"(result) : "r"(u), "r"(s), "r"(sum));
    return result;
  }

  static __device__ __forceinline__ float mul(float a, float b) { return __fmul_rn(a, b); }
  static __device__ __forceinline__ float add(float a, float b) { return __fadd_rn(a, b); }
  static __device__ __forceinline__ float div(float a, float b) { return __fdiv_rn(a, b); }
  static __device__ __forceinline__ float to_float(int32_t a) { return __int2float_rn(a); }
  static __device__ __forceinline__ int32_t round_to_int(float a) { return __float2int_rn(a); }

  static __device__ __forceinline__ float widen(float x) { return x; }
  static __device__ __forceinline__ float widen(Bfloat16 x) {
    return __uint_as_float(uint32_t{x.bits} << 16);
  }
  static __device__ __forceinline__ float widen(Half x) {
    return __half2float(__ushort_as_half(x.bits));
  }
  static __device__ __forceinline__ void narrow(float x, float* out) { *out = x; }
  static __device__ __forceinline__ void narrow(float x, Bfloat16* out) {
    out->bits = __bfloat16_as_ushort(__float2bfloat16_rn(x));
  }
  static __device__ __forceinline__ void narrow(float x, Half* out) {
    out->bits = __half_as_ushort(__float2half_rn(x));
  }

 private:
  static __device__ __forceinline__ uint32_t address(const void* shared) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  }
  static __device__ __forceinline__ void mma_quarter(int32_t& c0, int32_t& c1, uint32_t a,
                                                     uint32_t b) {
    asm volatile("mma.sync.aligned.m8n8k16.row.col.s32.u8.s8.s32 {%0, %1}, {%2}, {%3}, {%0, %1};"
                 : "+r"(c0), "+r"(c1)
                 : "r"(a), "r"(b));
  }
};

}  // namespace dynquant
