// The one __global__ function, and its launch.
#pragma once

#include "nvidia.cuh"
#include "stream.h"

namespace dynquant {

template <class Kernel>
__global__ void __launch_bounds__(Kernel::kThreads, Kernel::kBlocks)
    entry(const __grid_constant__ typename Kernel::Args args) {
  Kernel::template run<Nvidia>(args);
}

template <class Kernel>
void Stream::launch(const Grid& grid, int shared_bytes, const typename Kernel::Args& args) const {
  constexpr int kFreelyAvailable = 48 * 1024;
  if (error_ == cudaSuccess && shared_bytes > kFreelyAvailable) {
    error_ = cudaFuncSetAttribute(entry<Kernel>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                  shared_bytes);
  }
  if (error_ != cudaSuccess) return;
  const dim3 blocks(static_cast<unsigned>(grid.x), static_cast<unsigned>(grid.y));
  entry<Kernel><<<blocks, Kernel::kThreads, shared_bytes, stream_>>>(args);
  error_ = cudaGetLastError();
}

}  // namespace dynquant
