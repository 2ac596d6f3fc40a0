// What the CUDA kernels require of a GPU.
//
// They are written once over a `Gpu` type, as those of the CPU are over an `Isa` type. Compiled by
// nvcc it is Nvidia (nvidia.cuh). In tests it is an emulator on the host, which runs the same
// kernels thread by thread, shows asynchronous copies as late as the hardware may, and counts the
// bank conflicts of shared memory.
//
// A Gpu has, all of them static:
//   thread block_x block_y grid_x grid_y  where this thread stands
//   shared                           the block's shared memory, 16-byte aligned
//   sync                             a barrier of the block
//   shuffle_xor(value, mask)         the value of the lane whose number differs in `mask`
//   kAsyncCopies                     whether copy_async returns before the copy has happened
//   copy_async(shared, global, real)  16 bytes, or zeros where not `real`
//   commit wait<N>                   a group of copies; until all groups but N have happened
//   load16 store16                   16 bytes of global memory, aligned
//   load_shared16                    16 bytes of shared memory, aligned
//   load_fragment                    ldmatrix x4: the lanes give the addresses of its rows
//   mma                              16 x 8 sums += 16 x 32 unsigned times 32 x 8 signed bytes
//   dot                              sum += four unsigned times four signed bytes
//   mul add div to_float round_to_int  fp32, each rounded once, to nearest even
//   widen narrow                     to and from fp32
// The layout of fragments over lanes is in tile.h.
#pragma once

#include <stdint.h>

#ifdef __CUDACC__
#define DYNQUANT_DEVICE __device__ __forceinline__
#else
#define DYNQUANT_DEVICE inline
#endif

namespace dynquant {

struct alignas(16) Bytes16 {
  uint32_t word[4];
};

struct Grid {
  int64_t x;
  int y;
};

}  // namespace dynquant
